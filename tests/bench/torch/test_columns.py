# SPDX-License-Identifier: Apache-2.0
"""bench/torch/columns.py on the stub of the driver: each way brings the right bytes, and one that does not is told."""

import json
import os
import pathlib
import subprocess
import sys

TREE = pathlib.Path(__file__).resolve().parents[3]
STUB = pathlib.Path(os.environ["LAYERSHARD_TEST_BUILD"]) / "tests" / "support" / "libstub_cuda.so"


def run(program, *options, driver=STUB, **more):
    environment = os.environ | {"LAYERSHARD_CUDA_SO_PATH": str(driver)} | more
    command = [sys.executable, "-c", program, "--rows", "40", "--rounds", "1", *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def program(change=""):
    return f"import sys; sys.path.insert(0, {str(TREE / 'bench' / 'torch')!r}); import columns; {change}columns.main()"


def test_every_way_is_timed(tmp_path):
    done = run(program(), "--save", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["schema"] == "layershard-bench/2" and saved["gpus"] == [{"ordinal": 0, "name": "Stub 0"}]
    found = saved["result"]
    assert len(found["o_proj"]) == len(found["down_proj"]) == 11 and all(found["down_proj"].values())
    assert done.stdout.splitlines()[0] == "Stub 0 reads inside itself"
    evaluate = [sys.executable, str(TREE / "bench" / "results" / "targets.py"), str(tmp_path)]
    done = subprocess.run(evaluate, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr  # it lies among other results


def test_a_way_that_leaves_rows_out_is_told():
    done = run(program("columns.Stripe.part = lambda self, stream, first, rows: None; "))
    assert done.returncode == 1 and "pitched destination: wrong bytes in row 0" in done.stderr


def test_what_cannot_be_saved_is_told_first(tmp_path):
    done = run(program(), "--save", tmp_path / "found.json", LAYERSHARD_LIBRARY=str(tmp_path / "nowhere.so"))
    assert done.returncode == 1 and "nowhere.so" in done.stderr and not done.stdout


def test_a_machine_without_a_driver_is_told():
    done = run(program(), driver="libno_driver.so")
    assert done.returncode == 1 and done.stderr.startswith("there is no NVIDIA driver: libno_driver.so"), done.stderr
    done = run(program(), "--devices", "one")
    assert done.returncode == 2 and "argument --devices: invalid" in done.stderr

# SPDX-License-Identifier: Apache-2.0
"""bench/torch/pipeline.py, long_prompt.py and rounding.py on NVIDIA GPUs, small. Needs a GPU and its driver. One prompt
needs two; stages that share one GPU signal through symmetric memory where torch lets them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from patience import LONG_S

torch = pytest.importorskip("torch", reason="torch is not installed")
TREE = pathlib.Path(__file__).resolve().parents[3]
GPUS = len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
if not GPUS or torch.version.cuda is None:
    pytest.skip("there is no NVIDIA GPU, or torch is built without CUDA", allow_module_level=True)

DEVICES = ["--devices", "0,1" if GPUS > 1 else "0,0"]
SMALL = [*DEVICES, *"--shape 256,704,8,2 --layers 6 --rounds 2 --margin 1000".split()]


def result_of(folder, script, *options):
    path = folder / "found.json"
    environment = dict(os.environ, TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1")
    command = [sys.executable, f"bench/torch/{script}", *options, "--save", str(path)]
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text(encoding="utf-8"))["result"]


def variants_of(table):
    return {row["variant"]: row for row in table["rows"]}


def test_requests(tmp_path):
    result = result_of(tmp_path, "pipeline.py", *SMALL, "--tokens", "64", "--most-tokens", "256", "--requests", "6")
    assert [table["load"] for table in result["tables"]] == ["equal", "mixed", "one"]
    for table in result["tables"]:
        rows = variants_of(table)
        assert rows["layershard k=1"]["bits_equal"] and rows["layershard k=1"]["first_token_ms"]["median"] > 0
        if GPUS > 1:
            assert rows.keys() > {"PP2", "PP2 in chunks", "PP2 by send and recv", "TP2"}


@pytest.mark.skipif(GPUS < 2, reason="NCCL refuses two ranks on one GPU")
def test_one_prompt(tmp_path):
    result = result_of(tmp_path, "long_prompt.py", *SMALL, "--tokens", "256,512", "--chunk", "64")
    for table in result["tables"]:
        rows = variants_of(table)
        assert rows["context parallel, layershard k=1"]["bits_equal"]
        assert rows.keys() > {"PP2 in chunks", "TP2 sequence parallel", "TP2 sequence parallel overlapped"}
        assert all(row["peak_bytes"] > row["weight_bytes"] > 0 for row in rows.values())


def test_rounding(tmp_path):
    sizes = "--shape 256,704,8,2 --layers 4 --tokens 64 --vocabulary 512 --seeds 2 --limit 2".split()
    result = result_of(tmp_path, "rounding.py", *DEVICES, *sizes)
    assert all(each["eager_bits_equal"] for each in result["seeds"]) and len(result["rows"]) == 5
    assert result["as_cut"] is not None

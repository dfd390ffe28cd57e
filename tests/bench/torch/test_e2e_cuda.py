# SPDX-License-Identifier: Apache-2.0
"""bench/torch/e2e.py on NVIDIA GPUs, small: passes from graphs, a late rank, a rank alone, several sizes. Needs a GPU;
with one alone the ranks share it, and uneven passes are named with the reason."""

import json
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

SMALL = "--shape 256,704,8,2 --layers 6 --tokens 64,128 --rounds 2 --passes 2 --warm-ms 5 --margin 1000".split()
UNEVEN = ["layershard k=1, last rank late", "broadcast, last rank late", "layershard k=1, last rank alone"]


def test_passes_from_graphs_and_of_uneven_ranks(tmp_path):
    path = tmp_path / "e2e.json"
    variants = "replicated*;layershard k=1;layershard k=1, graph;layershard k=1, compiled graphs;broadcast;*last rank*"
    command = [sys.executable, "bench/torch/e2e.py", "--devices", "0,1" if GPUS > 1 else "0,0", *SMALL]
    command += ["--variants", variants, "--save", str(path)]
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stdout + done.stderr
    _, table = json.loads(path.read_text(encoding="utf-8"))["result"]["tables"]
    rows = {row["variant"]: row for row in table["rows"] if not row["again"]}
    assert rows["layershard k=1, graph"]["bits_equal"]
    assert rows["layershard k=1, compiled graphs"]["mode"] == "compiled graphs"  # and close enough, by the status
    # One launch and what prepares it, against those of each operator and each call.
    assert rows["layershard k=1, graph"]["host_ns"] < rows["layershard k=1"]["host_ns"]
    if GPUS > 1:
        assert [name for name in UNEVEN if not rows[name]["bits_equal"]] == []
    else:
        assert {each["variant"] for each in table["not_run"]} >= set(UNEVEN)

# SPDX-License-Identifier: Apache-2.0
"""bench/torch/rounding.py and compiled_speed.py on CPUs, with shapes of a few KiB and compilers that compute as they
are told."""

import json
import pathlib
import sys

import forked_scripts
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("torch.distributed.fsdp._fully_shard", reason="this torch has no fully_shard")

TREE = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(TREE / "bench" / "torch"))

import compiled_speed  # noqa: E402
import rounding  # noqa: E402
import torch_launch  # noqa: E402

torch.set_num_threads(1)  # a forked process cannot use the parent's OpenMP threads

SMALL = "--devices cpu,cpu --shape 32,64,4,2 --layers 4 --tokens 16 --vocabulary 48 --seeds 2".split()


def less_exact(graph, _inputs):
    """A compiler that rounds more where there are borders."""
    arrivals = sum("layershard." in str(node.target) for node in graph.graph.nodes)
    return lambda *args: [each * (1 + arrivals * 2**-5) for each in graph(*args)]


def run(module, folder, *options):
    script = TREE / "bench" / "torch" / f"{module.__name__}.py"
    return forked_scripts.run(module.main, [script, *options], folder, torch_launch)


def test_the_same_rounding_is_within_the_limit(tmp_path):
    done = run(rounding, tmp_path, *SMALL, "--backend", "eager", "--save", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["result"]
    assert [row["layer"] for row in result["rows"]] == ["0", "1", "2", "3", "logits"]
    assert all(row["most"] == 1 and 0 < row["replicated"] < 0.1 for row in result["rows"])
    assert result["as_cut"] is True and len(result["seeds"]) == 2
    assert [row["result"] for row in result["targets"]] == ["met", "met"]


def test_more_rounding_is_missed(tmp_path):
    torch._dynamo.register_backend(less_exact, name="less_exact")
    done = run(rounding, tmp_path, *SMALL, "--backend", "less_exact", "--save", tmp_path / "found.json")
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["result"]
    assert [row["result"] for row in result["targets"]] == ["MISSED", "met"]
    assert result["rows"][-1]["most"] > 1.1


def test_speed_of_compiled_models(tmp_path):
    tiny = "--devices cpu,cpu --layers 6 --tokens 8 --batch 1 --rounds 2 --passes 1 --warm-ms 0 --margin 1000".split()
    tiny += ["--models", "written-out,no-such-model", "--backend", "eager", "--save", tmp_path / "found.json"]
    done = run(compiled_speed, tmp_path, *tiny, "--sizes", '{"hidden_size": 32, "num_attention_heads": 2}')
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["result"]
    (table,) = result["tables"]
    compiled = ["replicated, compiled", "sharded, compiled", "cut, compiled"]
    assert [row["variant"] for row in table["rows"] if not row["again"]] == [*compiled, "replicated", "sharded"]
    assert table["model"] == "written-out" and all(row["bits_equal"] for row in table["rows"])
    assert [each["model"] for each in result["not_run"]] == ["no-such-model"]

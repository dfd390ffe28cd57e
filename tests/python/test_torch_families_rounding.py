# SPDX-License-Identifier: Apache-2.0
"""bench/torch/family_sweep.py with a compiler that computes otherwise where operators cut the graph: only a copy that
is cut at the same places tells that from wrong weights."""

import importlib
import pathlib
import sys

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "bench" / "torch"))
families = importlib.import_module("family_ranks")


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def rounding(graph, _inputs):
    """A compiler: one bit off for each operator that the graph has to arrive at weights."""
    arrivals = sum("arrive" in str(node.target) for node in graph.graph.nodes)
    return lambda *args: [each * (1 + arrivals * 2**-23) for each in graph(*args)]


def shard(model):
    sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
    return "layers.*"


def shard_other_weights(model):
    with torch.no_grad():
        model.layers[3].weight += 1e-6
    return shard(model)


def result_of(shard):
    torch.manual_seed(0)
    case = families.Case("layers", Layers().eval(), lambda seed: {"x": torch.full((2, 8), float(seed))}, shard)
    (found,) = families.run([case], backend=rounding)
    return found


def test_what_is_only_rounded_otherwise_is_equal_and_says_so():
    found = result_of(shard)
    assert found["result"] == "equal" and found["windows"] > 0
    assert found["reason"] == families.OTHER_ROUNDING


def test_other_weights_are_wrong_however_small_the_difference():
    assert result_of(shard_other_weights)["result"] == "wrong"

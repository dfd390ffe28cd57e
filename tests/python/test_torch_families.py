# SPDX-License-Identifier: Apache-2.0
"""bench/torch/family_sweep.py: a sample of what it tries is shared and gives the same bits, and it tells what is wrong
from what is refused and from what cannot be tried."""

import importlib
import json
import pathlib
import sys

import pytest

import torch_ranks as ranks

torch = ranks.torch
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")
sharding = pytest.importorskip("layershard.torch")

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "bench" / "torch"))
families = importlib.import_module("family_ranks")
sweep = importlib.import_module("family_sweep")

SAMPLE = {
    "family_language": (
        "bart bloom deepseek_v3 falcon_mamba gemma2 gpt2 gpt_neox gpt_oss jamba llama mixtral opt phi3 qwen3_next xlnet"
    ),
    "family_diffusion": (
        "DiTTransformer2DModel FluxTransformer2DModel Lumina2Transformer2DModel SD3Transformer2DModel "
        "WanTransformer3DModel"
    ),
}
NAMES = [name for names in SAMPLE.values() for name in names.split()]


@pytest.fixture(scope="module")
def eager():
    """What became of each, by its name: two ranks are forked once for all."""
    cases = []
    for library, names in SAMPLE.items():
        module = importlib.import_module(library)
        cases += [sweep.case_of(module, name) for name in names.split()]
    return {found["family"]: found for found in families.run(cases)}


@pytest.mark.parametrize("family", NAMES)
def test_a_family_gives_the_same_bits(eager, family):
    assert eager[family]["result"] == "equal", eager[family]["reason"]
    assert eager[family]["windows"] > 0  # something was fetched


# ---- What it says of others ----


def case_of(model, shard, inputs=None):
    return families.Case("one", model, inputs or (lambda seed: {"x": ranks.inputs(seed)}), shard)


def shared(model):
    sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
    return "layers.*"


def spoilt(model):
    with torch.no_grad():
        model.head.weight += 1
    return shared(model)


def refused(model):
    sharding.shard(model, "nothing.*")


def lost(model):
    raise SystemExit(3)


class Drifting(ranks.Stack):
    """Each pass of a copy gives something else."""

    passes = 0

    def forward(self, x):
        Drifting.passes += 1
        return super().forward(x) + Drifting.passes


@pytest.mark.parametrize(
    "model, shard, result, reason",
    [
        (ranks.stack(), shared, "equal", None),
        (ranks.stack(), spoilt, "wrong", "tensor 0 of 2 differs"),
        (ranks.stack(), refused, "refused", "matches no module"),
        (ranks.stack(), lost, "failed", "status 3"),
        (Drifting().eval(), shared, "not made", "twice"),
    ],
)
def test_what_a_model_is_said_to_be(model, shard, result, reason):
    (found,) = families.run([case_of(model, shard)])
    assert found["result"] == result and (reason is None or reason in found["reason"])


class Unmakeable(ranks.Stack):
    def forward(self, x):
        raise ValueError("no pass of this one")


def test_a_rank_that_only_stores_is_not_waited_for():
    """Where the one that computes has nothing to compare with, the other waits for it in vain."""
    (found,) = families.run([case_of(Unmakeable().eval(), shared)], backend="eager", limit_s=10)
    assert found["result"] == "not made" and "no pass of this one" in found["reason"]


def test_zeros_and_what_was_never_set_count_for_something():
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(float("nan"))
    families.spread(model, seed=0)
    assert model.weight.unique().numel() == 6 and model.bias.isfinite().all()


def test_rows_are_counted_and_reasons_are_grouped(tmp_path):
    row = {"library": "transformers", "mode": "eager"}
    rows = [
        {**row, "family": "a", "result": "equal", "reason": None},
        {**row, "family": "b", "result": "refused", "reason": "layers 0 and 3 of model.layers.* differ: why"},
        {**row, "family": "c", "result": "refused", "reason": "layers 1 and 7 of h.* differ: why not"},
    ]
    sweep.save(str(tmp_path / "saved.json"), rows)
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert saved["schema"].startswith("layershard-bench/") and saved["result"]["libraries"]["diffusers"]
    assert saved["result"]["rows"] == rows
    (counted,) = saved["result"]["counts"]
    assert (counted["models"], counted["equal"], counted["refused"], counted["wrong"]) == (3, 1, 2, 0)
    (grouped,) = saved["result"]["reasons"]
    assert (grouped["models"], grouped["names"]) == (2, "b, c")

# SPDX-License-Identifier: Apache-2.0
"""layershard.diffusers with its defaults: which blocks it takes, and diffusers' own transformers, made tiny."""

import importlib
import logging
import pathlib
import sys

import pytest

import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
sharding = pytest.importorskip("layershard.torch")
from layershard.diffusers import apply_layer_sharding, LayerShardingConfig  # noqa: E402, I001


class Patches(nn.Linear):
    """Listed as not to be split, though there is one only."""


class Listing(ranks.Stack):
    _no_split_modules = ["Block", "Patches"]

    def __init__(self):
        super().__init__(n_layers=6)
        self.embed = Patches(8, 37)


def share_blocks(rank, size):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("layershard").addHandler(handler)
    torch.manual_seed(1)
    model = Listing().eval()
    with torch.inference_mode():
        want = model(ranks.inputs(rank))
        handle = apply_layer_sharding(model, LayerShardingConfig(transport="shm:copy"))
        assert torch.equal(model(ranks.inputs(rank)), want)
    assert list(handle.stats()) == ["layers.*"]
    assert [line for line in lines if "embed (Listing) stays replicated" in line]


def test_what_is_listed_without_a_number_stays_replicated_and_is_named():
    ranks.run(2, share_blocks)


def test_blocks_that_a_model_does_not_name_are_asked_for():
    with pytest.raises(sharding.Refused, match="give the configuration modules"):
        apply_layer_sharding(ranks.stack())


# ---- diffusers' own ----

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "bench" / "torch"))


def made(name):
    """By the sweep's table, which needs diffusers: a model and what a pass is given."""
    families = importlib.import_module("family_diffusion")
    fields, given = families.FAMILIES[name]
    build = families.families()[name]
    torch.manual_seed(0)
    model = build(**{**fields, **PLAINER[name]}) if name in PLAINER else families.build(name)
    return model.eval(), given(families.Draw(0))


def denoise(rank, size, name, compiled):
    model, inputs = made(name)
    with torch.inference_mode():
        want = model(**inputs, return_dict=False)[0]
        handle = apply_layer_sharding(model, LayerShardingConfig(transport="shm:copy"))
        assert list(handle.stats()) == SERIES[name]
        for block in model.transformer_blocks if compiled else ():
            block.compile(backend="eager", fullgraph=True)
        for _ in range(2):
            assert torch.equal(model(**inputs, return_dict=False)[0], want)
    stats = [(each.series.stats(), len(each.plan.places)) for each in handle.shared]
    return all(s.shard_bytes + s.windows * s.layer_bytes <= n * s.layer_bytes for s, n in stats)


PLAINER = {"SD3Transformer2DModel": {"num_layers": 7, "dual_attention_layers": ()}}  # blocks of two kinds, not three
SERIES = {  # of SD3 and Mochi the last block differs, and saves nothing
    "SD3Transformer2DModel": ["transformer_blocks.* #1"],
    "MochiTransformer3DModel": ["transformer_blocks.* #1"],
    "CogVideoXTransformer3DModel": ["transformer_blocks.*"],
    "DiTTransformer2DModel": ["transformer_blocks.*"],
}


@pytest.mark.parametrize("name, compiled", [*((name, False) for name in SERIES), ("DiTTransformer2DModel", True)])
def test_a_transformer_of_diffusers_has_the_same_bits(name, compiled):
    pytest.importorskip("diffusers")
    made(name)  # what that imports is there when ranks are forked
    assert ranks.run(2, denoise, name, compiled) == [True, True]

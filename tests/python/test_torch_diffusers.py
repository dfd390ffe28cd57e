# SPDX-License-Identifier: Apache-2.0
"""layershard.diffusers with its defaults: which blocks it takes, and diffusers' own transformers, made tiny."""

import logging

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


def sd3():
    import diffusers

    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=7,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=16,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "pooled_projections": torch.randn(1, 20),
        "timestep": torch.tensor([7]),
    }
    return model, inputs, ["transformer_blocks.* #1"]  # the last one of another kind


def mochi():
    import diffusers

    model = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=7,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=8,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "encoder_attention_mask": torch.ones(1, 8).bool(),
        "timestep": torch.tensor([7]),
    }
    return model, inputs, ["transformer_blocks.* #1"]


def cogvideox():
    import diffusers

    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=8,
        num_layers=5,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        patch_size=2,
        max_text_seq_length=8,
    )
    inputs = {
        "hidden_states": torch.randn(1, 2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 8, 8),
        "timestep": torch.tensor([7]),
    }
    return model, inputs, ["transformer_blocks.*"]


def dit():
    """Lists nothing, and calls a part of its first block by itself."""
    import diffusers

    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=2,
    )
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([7])}
    inputs["class_labels"] = torch.tensor([1])
    return model, inputs, ["transformer_blocks.*"]


def denoise(rank, size, build, compiled):
    torch.manual_seed(0)
    model, inputs, series = build()
    model.eval()
    with torch.inference_mode():
        want = model(**inputs, return_dict=False)[0]
        handle = apply_layer_sharding(model, LayerShardingConfig(transport="shm:copy"))
        assert list(handle.stats()) == series
        for block in model.transformer_blocks if compiled else ():
            block.compile(backend="eager", fullgraph=True)
        for _ in range(2):
            assert torch.equal(model(**inputs, return_dict=False)[0], want)
    stats = [(each.series.stats(), len(each.plan.places)) for each in handle.shared]
    return all(s.shard_bytes + s.windows * s.layer_bytes <= n * s.layer_bytes for s, n in stats)


EACH = [(sd3, False), (mochi, False), (cogvideox, False), (dit, False), (dit, True)]


@pytest.mark.parametrize("build, compiled", EACH)
def test_a_transformer_of_diffusers_has_the_same_bits(build, compiled):
    pytest.importorskip("diffusers")
    build()  # what that imports is there when ranks are forked
    assert ranks.run(2, denoise, build, compiled) == [True, True]

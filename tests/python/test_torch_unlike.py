# SPDX-License-Identifier: Apache-2.0
"""Models of transformers whose layers differ, or have more numbers than one in their names: bits, names and memory.

Made tiny, with layers enough to save memory by. bench/torch/family_sweep.py goes through all that there are.
"""

import pytest

import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
sharding = pytest.importorskip("layershard.torch")
transformers = pytest.importorskip("transformers")

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def language(kind, n_layers, **options):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = type(transformers.AutoConfig.for_model(kind))(num_hidden_layers=n_layers, **sizes, **tokens, **options)
    return transformers.AutoModelForCausalLM.from_config(config), {"input_ids": torch.arange(3, 10)[None]}


def deepseek():
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    routing = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, **EXPERTS}
    return language("deepseek_v3", 9, num_key_value_heads=4, **latent, **routing)


def qwen3_next():
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
    return language("qwen3_next", 12, num_key_value_heads=2, num_experts=4, **EXPERTS, **linear)


def gemma3n():
    sizes = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    sizes |= {"num_kv_shared_layers": 4, "activation_sparsity_pattern": None, "altup_num_inputs": 2}
    model, inputs = language("gemma3n_text", 12, num_key_value_heads=2, **sizes)
    return model, inputs | {"use_cache": False}


def jamba():
    mamba = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    return language("jamba", 16, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1, **mamba)


def t5():
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=7, num_heads=4)
    tokens = torch.arange(3, 10)[None]
    return transformers.T5Model(config), {"input_ids": tokens, "decoder_input_ids": tokens}


class Sentences(nn.Sequential):
    """Named as sentence_transformers names a BERT: 0.auto_model.encoder.layer.3."""

    def __init__(self):
        super().__init__()
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        self.append(nn.Module())
        self[0].auto_model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=7, **sizes))

    def forward(self, input_ids):
        return self[0].auto_model(input_ids)


def sentences():
    return Sentences(), {"input_ids": torch.arange(3, 10)[None]}


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[3, 3, 9, 3], image_size=32)
    return transformers.ConvNextModel(config), {"pixel_values": torch.randn(1, 3, 32, 32)}


def unet():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 6),
    )
    text = torch.randn(1, 5, 12)
    return model, {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": text}


SERIES = {  # what is shared, and what would save nothing and is not
    deepseek: ("model.layers.*", {"model.layers.* #2": 7}),
    qwen3_next: ("model.layers.*", {"model.layers.* #1": 9}),
    gemma3n: ("model.layers.*", {"model.layers.* #1": 8}),
    jamba: ("model.layers.*", {"model.layers.* #1": 6, "model.layers.* #2": 8}),
    t5: (["encoder.block.*", "decoder.block.*"], {"encoder.block.* #2": 6, "decoder.block.* #2": 6}),
    sentences: ("*.encoder.layer.*", {"0.auto_model.encoder.layer.*": 7}),
    convnext: ("*.layers.*", {"encoder.stages.2.layers.*": 9}),
    unet: (
        ["*.transformer_blocks.*", "*.resnets.*"],
        {
            "down_blocks.1.attentions.0.transformer_blocks.*": 6,
            "up_blocks.0.attentions.0.transformer_blocks.*": 6,
            "up_blocks.0.attentions.1.transformer_blocks.*": 6,
            "mid_block.attentions.0.transformer_blocks.*": 6,
        },
    ),
}


def made(build):
    torch.manual_seed(0)
    model, inputs = build()
    return model.eval(), inputs


def compute_alike(rank, size, build, compiled):
    (model, inputs), (want, _), (pattern, series) = made(build), made(build), SERIES[build]
    with torch.inference_mode():
        expected = want(**inputs)[0]
        sharding.shard(model, pattern, scope="block", transport="shm:copy")
        if compiled:
            for each in sharding.of(model).shared:
                for units in each.plan.units:
                    units[0].module.compile(backend="eager")
        for _ in range(2):
            assert torch.equal(model(**inputs)[0], expected)
    shared = sharding.of(model).shared
    assert {each.plan.name: len(each.plan.places) for each in shared} == series
    stats = [(each.series.stats(), len(each.plan.places)) for each in shared]
    for each, n_layers in stats:
        assert each.shard_bytes + each.windows * each.layer_bytes <= n_layers * each.layer_bytes
    shards = sum(each.shard_bytes for each, _ in stats)
    held = shards + sum(each.windows * each.layer_bytes for each, _ in stats)
    return shards, held, sum(each.layer_bytes * n for each, n in stats), max(each.layer_bytes for each, _ in stats)


@pytest.mark.parametrize("build, compiled", [*((build, False) for build in SERIES), (deepseek, True), (t5, True)])
def test_a_family_has_the_same_bits_and_is_smaller(build, compiled):
    made(build)  # what that imports is there when ranks are forked
    (one, held, whole, largest), (other, held_by_other, *_) = ranks.run(2, compute_alike, build, compiled)
    assert abs(one - other) <= largest and one + other == whole
    assert held + held_by_other < 2 * whole and max(held, held_by_other) <= whole

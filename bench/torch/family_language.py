# SPDX-License-Identifier: Apache-2.0
"""Every language model of transformers (its mapping for causal language models), made tiny: the class of the
configuration as it is, with small numbers for what is large by default, by the names of the fields.

Knows transformers' configurations; nothing of ranks or layershard.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 8  # four of a kind where every second one differs
TOKENS = 12
# The first pattern that matches the whole name of a field says what its number is at most.
AT_MOST = {
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers": LAYERS,
    r"depth|num_blocks|conf_num_hidden_layers|num_global_layers": 2,
    r".*vocab_size(_per_layer_input)?|codebook_size": 128,
    r".*(key_value|kv)_(n_)?heads|num_query_groups": 2,
    r"qk_(rope|nope)_head_dim": 8,
    r"(.*_)?head_?dim|attention_head_size|d_kv|(mamba_)?d_head|dim_head|kv_channels|rotary_dim": 16,
    r"(.*_)?n?heads?": 4,
    r"(.*_)?hidden_size(_global)?|d_model|n_embd|emb(edding)?_(dim|size)|(.*_)?embed(ding)?_(dim|size)": 64,
    r"lru_width|word_embed_proj_dim|(in|out)put_embedding_size|adapter_(in|out)_dim|adapter_input_size": 64,
    r".*intermediate_size(_mlp)?|.*ffn_dim|d_ff|dff|dim_ff|d_inner|feed_forward_size|.*ffn_hidden_size|mlp_dim": 96,
    r".*lora_rank|hc_lowrank|laurel_rank|adapter_rank|gated_norm_rank|time_step_rank|mamba_d_ssm|.*state(_size)?": 16,
    r".*experts|zero_expert_num": 8,
    r".*experts_per_tok(en)?|moe_top_?k|moe_k|n_group|num_expert_group|n_groups": 2,
    r"topk_group": 1,
    r"index_topk(_blocks)?|index_block_size": 4,
    r".*sliding_window(_size)?|.*window_(size|len)|local_attention|(.*_)?chunk_size": 8,
    r".*max_position_embeddings|n_positions|n_ctx|max_seq_len|.*max_length|context_length|max_.*_positions": 128,
}
_LAYER_COUNTS = next(iter(AT_MOST))
_TOKEN = re.compile(r"_token_(id|index)|_id")

_HYBRID = ["linear_attention", "linear_attention", "linear_attention", "hybrid"] * 2
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_MLA = {"num_key_value_heads": 4, "head_dim": 8}
_WIDE = {"attention_hidden_size": 128, "attention_head_dim": 32}
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_hidden_layers": LAYERS,
    "num_kv_shared_layers": LAYERS,
}
_KEPT_WHOLE = ["sliding_attention", "full_attention"] * 4
# What a family needs besides: numbers that must fit each other, fields without a default.
FAMILIES: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": _MLA,
    "bamba": {**_MAMBA, "attn_layer_indices": [3, 7]},
    "blenderbot": {"encoder_layers": LAYERS},
    "blt": {"encoder_hash_byte_group_vocab": 512, "global_config": {"num_hidden_layers": LAYERS}},
    "bloom": {"n_layer": LAYERS},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 2},
    "dots3_note_text": {
        **_MLA,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _KEPT_WHOLE, "intermediate_size": 96},
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "kimi_linear": _MLA,
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "longcat_flash": {**_MLA, "qk_head_dim": 16},
    "mamba2": {"num_heads": 8},
    "minicpm3": _MLA,
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 3},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 48)},
    "whisper": {"decoder_layers": LAYERS},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": LAYERS},
    "xmod": {"default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {"num_key_value_heads": 4, "mamba_dt_rank": 8, **_WIDE},
    "zamba2": {"layers_block_type": _HYBRID, "num_key_value_heads": 4, "n_mamba_heads": 8, **_WIDE},
}


def families() -> dict[str, type]:
    """Each class of the mapping once: by the name of its own configuration where that is in the mapping."""
    found: dict[type, str] = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = CONFIG_MAPPING[name]
        model = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        if model not in found or model.config_class is config:
            found[model] = name
    return {name: model for model, name in found.items()}


def _at_most(name: str, value: int) -> int:
    if _TOKEN.search(name):
        return value if value < 128 else 100 + len(name) % 28
    return min([value, *[most for pattern, most in AT_MOST.items() if re.fullmatch(pattern, name)][:1]])


def _smaller(config: PreTrainedConfig, beside: bool = False) -> dict[str, Any]:
    """The fields that are to be smaller than by default. Parts @beside the language model have two layers."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = _smaller(value, beside or name not in ("text_config", "decoder"))
        elif type(value) is int and not name.startswith("_"):
            most = 2 if beside and re.fullmatch(_LAYER_COUNTS, name) else _at_most(name, value)
            if most != value:
                found[name] = most
    return found


def _merge(into: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    for name, value in other.items():
        into[name] = _merge(into.get(name, {}), value) if isinstance(value, dict) and name in into else value
    return into


def _layers(config: PreTrainedConfig) -> int:
    return next((v for k, v in vars(config).items() if type(v) is int and re.fullmatch(_LAYER_COUNTS, k)), 0)


def _shorter(before: PreTrainedConfig, now: PreTrainedConfig) -> dict[str, Any]:
    """Lists with a value for each layer, which a default gives as long as before, cut to the layers there are now."""
    found: dict[str, Any] = {}
    many, few = _layers(before), _layers(now)
    for name, value in vars(now).items():
        if isinstance(value, PreTrainedConfig) and isinstance(getattr(before, name, None), PreTrainedConfig):
            found[name] = _shorter(getattr(before, name), value)
        elif isinstance(value, list | tuple) and many != few and len(value) == many:
            found[name] = value[:few]
    return {name: value for name, value in found.items() if value != {}}


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of a family, tiny."""
    kind, own = CONFIG_MAPPING[name], FAMILIES.get(name, {})
    try:
        default = kind()
    except Exception:  # some make sense with their own fields only
        default = kind(**own)
    small = _merge(_smaller(default), own)
    shorter = _merge(_shorter(default, kind(**small)), own)
    return kind(**_merge(small, shorter))


def build(name: str) -> torch.nn.Module:
    config, model = tiny_config(name), MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
    if model.config_class is not type(config):
        config = config.get_text_config(decoder=True)
    transformers.utils.logging.set_verbosity_error()
    return model(config)


def inputs(name: str, model: Any, seed: int) -> dict[str, Any]:
    """Tokens, beside each other's embeddings: not the small ones, which are special."""
    draw = torch.Generator().manual_seed(seed)
    rows = 2 * getattr(model.config, "num_codebooks", 1) if name.startswith("musicgen") else 2
    tokens = torch.randint(8, 90, (rows, TOKENS), generator=draw)
    if name.endswith("_assistant"):
        return _drafting(model.config, draw)
    return {"input_ids": tokens, **({"use_cache": False} if name == "blt" else {})}


def _drafting(config: Any, draw: torch.Generator) -> dict[str, Any]:
    """What a drafting model is given by the model that it drafts for: states, and keys and values of a layer of each
    kind."""
    text, states = config.get_text_config(), torch.randn(2, 1, 2 * config.backbone_hidden_size, generator=draw)
    found = {}
    for kind in dict.fromkeys(text.layer_types):
        layer = text.per_layer_config[kind]
        shape = 2, layer.num_key_value_heads, TOKENS, layer.head_dim
        found[kind] = tuple(torch.randn(shape, generator=draw) for _ in range(2))
    return {"inputs_embeds": states, "position_ids": torch.full((2, 1), TOKENS), "shared_kv_states": found}


def _longest(model: torch.nn.Module) -> str:
    """The list of modules with the most entries, of two such the larger one. One of experts, inside a layer, is none of
    layers."""
    lists = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return max(outer, key=lambda name: (len(lists[name]), sum(each.numel() for each in lists[name].parameters())))


def shard(model: torch.nn.Module) -> str:
    """As a user would: the layers, whole."""
    import layershard.torch as sharding

    modules = f"{_longest(model)}.*"
    sharding.shard(model, modules, scope="block", transport="shm:copy")
    return modules

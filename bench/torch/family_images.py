# SPDX-License-Identifier: Apache-2.0
"""Transformers of diffusers that make images: small fields for each, and what a pass is given. Layers are counted
elsewhere. Shapes are as in diffusers' own tests where it has some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Given = dict[str, Any]
Families = dict[str, tuple[Given, Callable[["Draw"], Given]]]


class Draw:
    """Random tensors of one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def whole(self, end: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, end, shape, generator=self._generator)


def _packed(r: Draw, channels: int, text: int, width: int = 3) -> Given:
    """Rows of patches and of words, with their places, as Flux takes them."""
    return {
        "hidden_states": r(1, 16, channels),
        "encoder_hidden_states": r(1, 12, text),
        "img_ids": r(16, width),
        "txt_ids": r(12, width),
        "timestep": torch.ones(1),
    }


def _grid(r: Draw, channels: int, text: int, size: int = 8, rows: int = 2) -> Given:
    """Pictures beside words."""
    return {
        "hidden_states": r(rows, channels, size, size),
        "encoder_hidden_states": r(rows, 8, text),
        "timestep": r.whole(1000, rows),
    }


def _cogview(r: Draw) -> Given:
    size = torch.tensor([[64, 64], [64, 64]])
    return {**_grid(r, 4, 8), "original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}


def _hunyuan_dit(r: Draw) -> Given:
    return {
        "hidden_states": r(2, 4, 8, 8),
        "timestep": torch.tensor([500.0, 400.0]),
        "encoder_hidden_states": r(2, 4, 8),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": r(2, 4, 8),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * 2),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": [torch.ones(1, 8), torch.zeros(1, 8)],
    }


def _ideogram(r: Draw) -> Given:
    """Four words, then four patches, in one sequence."""
    from diffusers.models.transformers import transformer_ideogram4 as module

    is_word = torch.arange(8) < 4
    places = torch.arange(4)
    image = torch.stack([torch.zeros(4, dtype=torch.long), places // 2, places % 2], dim=1)
    return {
        "hidden_states": r(1, 8, 16) * ~is_word[:, None],
        "encoder_hidden_states": r(1, 8, 24) * is_word[:, None],
        "timestep": torch.tensor([0.5]),
        "position_ids": torch.cat([places[:, None].expand(4, 3), image + module.IMAGE_POSITION_OFFSET])[None],
        "segment_ids": torch.ones(1, 8, dtype=torch.long),
        "indicator": torch.where(is_word, module.LLM_TOKEN_INDICATOR, module.OUTPUT_IMAGE_INDICATOR)[None],
    }


def _omnigen(r: Draw) -> Given:
    length = 24 + 1 + 16
    return {
        "hidden_states": r(2, 4, 8, 8),
        "timestep": torch.rand(2),
        "input_ids": r.whole(10, 2, 24),
        "input_img_latents": [r(1, 4, 8, 8)],
        "input_image_sizes": {0: [[0, 16]]},
        "attention_mask": torch.ones(2, length, length),
        "position_ids": torch.arange(length).expand(2, length).clone(),
    }


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_FLUX = {
    "in_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
_QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}
_COGVIEW = {"in_channels": 4, "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4, **_HEADS}
_LUMINA = {"sample_size": 16, "in_channels": 4, "hidden_size": 24, "num_attention_heads": 3, "num_kv_heads": 1}


def _qwen(r: Draw) -> Given:
    return {
        "hidden_states": r(1, 16, 16),
        "encoder_hidden_states": r(1, 8, 16),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.bool),
        "timestep": torch.ones(1),
        "img_shapes": [(1, 4, 4)],
    }


FAMILIES: Families = {
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "joint_attention_dim": 32, "caption_projection_dim": 16, "pos_embed_max_size": 64, **_HEADS},
        lambda r: _grid(r, 4, 32),
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "in_channels": 4,
            "dim": 32,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1, 3),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 32,
            "axes_dims": (8, 4, 4),
            "axes_lens": (64, 32, 32),
        },
        lambda r: {"hidden_states": r(1, 4, 8, 8), "timestep": torch.rand(1), "encoder_hidden_states": r(1, 3, 8, 16)},
    ),
    "BriaFiboTransformer2DModel": (
        {**_FLUX, "in_channels": 48, "attention_head_dim": 8, "axes_dims_rope": (0, 4, 4), "text_encoder_dim": 16},
        lambda r: {**_packed(r, 48, 32), "text_encoder_layers": [r(1, 12, 16) for _ in range(12)]},
    ),
    "BriaTransformer2DModel": (
        {**_FLUX, "attention_head_dim": 8, "axes_dims_rope": (0, 4, 4)},
        lambda r: _packed(r, 4, 32),
    ),
    "ChromaTransformer2DModel": (
        {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 2},
        lambda r: _packed(r, 4, 32),
    ),
    "CogView3PlusTransformer2DModel": ({**_COGVIEW, "pos_embed_max_size": 8, "sample_size": 8}, _cogview),
    "CogView4Transformer2DModel": (_COGVIEW, _cogview),
    "DiTTransformer2DModel": (
        {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 8, "sample_size": 8, **_HEADS},
        lambda r: {"hidden_states": r(2, 4, 8, 8), "timestep": r.whole(1000, 2), "class_labels": r.whole(4, 2)},
    ),
    "DreamLiteTransformer2DModel": (
        {"in_channels": 16, "norm_num_groups": 4, "cross_attention_dim": 8, **_HEADS},
        lambda r: {"hidden_states": r(2, 16, 8, 8), "encoder_hidden_states": r(2, 8, 8)},
    ),
    "ErnieImageTransformer2DModel": (
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "ffn_hidden_size": 48,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_axes_dim": (8, 4, 4),
        },
        lambda r: {
            "hidden_states": r(1, 16, 8, 8),
            "timestep": torch.ones(1),
            "text_bth": r(1, 16, 16),
            "text_lens": torch.tensor([16]),
        },
    ),
    "Flux2Transformer2DModel": (
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4)},
        lambda r: {**_packed(r, 4, 32, 4), "guidance": torch.ones(1)},
    ),
    "Flux3Transformer2DModel": (
        {**_FLUX, "cond_in_channels": 4, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        lambda r: _packed(r, 4, 32, 4),
    ),
    "FluxTransformer2DModel": (
        {**_FLUX, "pooled_projection_dim": 32},
        lambda r: {**_packed(r, 4, 32), "pooled_projections": r(1, 32)},
    ),
    "GlmImageTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
            **_HEADS,
        },
        lambda r: {
            **_grid(r, 4, 32, rows=1),
            "prior_token_id": r.whole(64, 1),
            "prior_token_drop": torch.zeros(1, dtype=torch.bool),
            "target_size": torch.tensor([[8.0, 8.0]]),
            "crop_coords": torch.zeros(1, 2),
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1] * 6,
            "force_inference_output": True,
            **_HEADS,
        },
        lambda r: {
            "hidden_states": r(2, 4, 8, 8),
            "encoder_hidden_states_t5": r(2, 8, 8),
            "encoder_hidden_states_llama3": r(2, 2, 8, 4),
            "pooled_embeds": r(2, 8),
            "timesteps": r.whole(1000, 2),
        },
    ),
    "HunyuanDiT2DModel": (
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
            **_HEADS,
        },
        _hunyuan_dit,
    ),
    "HunyuanImageTransformer2DModel": (
        {"in_channels": 4, "out_channels": 4, "text_embed_dim": 16, "rope_axes_dim": (4, 4), **_HEADS},
        lambda r: {
            **_grid(r, 4, 16, rows=1),
            "timestep": torch.tensor([500.0]),
            "encoder_attention_mask": torch.ones(1, 8),
        },
    ),
    "Ideogram4Transformer2DModel": (
        {
            "in_channels": 16,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (2, 1, 1),
        },
        _ideogram,
    ),
    "Krea2Transformer2DModel": (
        {
            "in_channels": 16,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda r: {
            "hidden_states": r(1, 4, 16),
            "encoder_hidden_states": r(1, 4, 3, 16),
            "timestep": torch.tensor([0.5]),
            "position_ids": r.whole(4, 8, 3).float(),
            "encoder_attention_mask": torch.tensor([[True, True, True, False]]),
        },
    ),
    "LongCatImageTransformer2DModel": (
        {**_FLUX, "pooled_projection_dim": 32},
        lambda r: {**_packed(r, 4, 32), "guidance": torch.ones(1)},
    ),
    "Lumina2Transformer2DModel": (
        {**_LUMINA, "multiple_of": 2, "axes_dim_rope": (4, 2, 2), "axes_lens": (128, 128, 128), "cap_feat_dim": 32},
        lambda r: {
            **_grid(r, 4, 32, size=16),
            "timestep": torch.rand(2),
            "encoder_attention_mask": torch.ones(2, 8, dtype=torch.bool),
        },
    ),
    "LuminaNextDiT2DModel": (
        {**_LUMINA, "multiple_of": 16, "learn_sigma": False, "cross_attention_dim": 32},
        lambda r: {
            **_grid(r, 4, 32, size=16),
            "timestep": torch.rand(2),
            "encoder_mask": torch.ones(2, 8),
            "image_rotary_emb": r(384, 384, 4),
            "cross_attention_kwargs": {},
        },
    ),
    "NucleusMoEImageTransformer2DModel": (
        {**_QWEN, "num_experts": 8, "moe_intermediate_dim": 16, "capacity_factors": 2.0},
        _qwen,
    ),
    "OmniGenTransformer2DModel": (
        {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "pad_token_id": 0,
            "vocab_size": 100,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
        },
        _omnigen,
    ),
    "OvisImageTransformer2DModel": ({**_FLUX, "out_channels": 4}, lambda r: _packed(r, 4, 32)),
    "PRXTransformer2DModel": (
        {
            "in_channels": 16,
            "patch_size": 2,
            "context_in_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "axes_dim": [8, 8],
        },
        lambda r: {**_grid(r, 16, 16, rows=1), "timestep": torch.ones(1)},
    ),
    "PixArtTransformer2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "use_additional_conditions": False,
            **_HEADS,
        },
        lambda r: {**_grid(r, 4, 8), "added_cond_kwargs": {"aspect_ratio": None, "resolution": None}},
    ),
    "PriorTransformer": (
        {"embedding_dim": 8, "num_embeddings": 7, "additional_embeddings": 4, **_HEADS},
        lambda r: {
            "hidden_states": r(2, 8),
            "timestep": 2,
            "proj_embedding": r(2, 8),
            "encoder_hidden_states": r(2, 7, 8),
        },
    ),
    "QwenImage21Transformer2DModel": (
        {
            "in_channels": 16,
            "out_channels": 16,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda r: {
            "hidden_states": r(1, 16, 16),
            "encoder_hidden_states": r(1, 8, 16),
            "timestep": torch.rand(1),
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.arange(12)[None] >= 8,
        },
    ),
    "QwenImageTransformer2DModel": (_QWEN, _qwen),
    "SD3Transformer2DModel": (
        {
            "sample_size": 8,
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "caption_projection_dim": 16,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 64,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
            **_HEADS,
        },
        lambda r: {**_grid(r, 4, 32), "pooled_projections": r(2, 64)},
    ),
    "SanaTransformer2DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "sample_size": 8,
            **_HEADS,
        },
        lambda r: _grid(r, 4, 8),
    ),
    "Transformer2DModel": (
        {"in_channels": 16, "norm_num_groups": 4, "cross_attention_dim": 8, **_HEADS},
        lambda r: {"hidden_states": r(2, 16, 8, 8), "encoder_hidden_states": r(2, 8, 8)},
    ),
    "ZImageTransformer2DModel": (
        {
            "dim": 32,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        lambda r: {"x": [r(16, 1, 8, 8)], "cap_feats": [r(16, 16)], "t": torch.zeros(1)},
    ),
}

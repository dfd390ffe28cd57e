# SPDX-License-Identifier: Apache-2.0
"""Transformers of diffusers that make videos, sounds and molecules: as family_images."""

from __future__ import annotations

import torch
from family_images import Draw, Families, Given


def _video(r: Draw, channels: int, text: int, size: int = 8, frames: int = 2, rows: int = 1) -> Given:
    """Frames beside words."""
    return {
        "hidden_states": r(rows, channels, frames, size, size),
        "encoder_hidden_states": r(rows, 12, text),
        "timestep": r.whole(1000, rows),
    }


def _frames_first(r: Draw) -> Given:
    return {
        "hidden_states": r(2, 1, 4, 8, 8),
        "encoder_hidden_states": r(2, 8, 8),
        "timestep": r.whole(1000, 2),
    }


def _any_flow(r: Draw, frames: int) -> Given:
    return {
        "hidden_states": r(1, frames, 4, 16, 16),
        "timestep": torch.full((1, frames), 500.0),
        "r_timestep": torch.full((1, frames), 250.0),
        "encoder_hidden_states": r(1, 12, 16),
    }


def _cosmos3(r: Draw) -> Given:
    """Two words and four patches in one sequence."""
    seen = torch.arange(2, 6)
    return {
        "input_ids": torch.tensor([1, 2]),
        "text_indexes": torch.tensor([0, 1]),
        "position_ids": torch.zeros(3, 6, dtype=torch.long),
        "und_len": 2,
        "sequence_length": 6,
        "vision_tokens": [r(1, 2, 1, 2, 2)],
        "vision_token_shapes": [(1, 2, 2)],
        "vision_sequence_indexes": seen,
        "vision_mse_loss_indexes": seen,
        "vision_timesteps": torch.ones(4),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def _helios(r: Draw) -> Given:
    return {
        **_video(r, 4, 16, size=16),
        "indices_hidden_states": torch.ones(1, 2),
        "indices_latents_history_short": torch.ones(1, 1),
        "indices_latents_history_mid": torch.ones(1, 1),
        "indices_latents_history_long": torch.ones(1, 4),
        "latents_history_short": r(1, 4, 1, 16, 16),
        "latents_history_mid": r(1, 4, 1, 16, 16),
        "latents_history_long": r(1, 4, 4, 16, 16),
    }


def _hunyuan(r: Draw, size: int, frames: int) -> Given:
    return {
        **_video(r, 4, 16, size, frames),
        "pooled_projections": r(1, 8),
        "encoder_attention_mask": torch.ones(1, 12),
        "guidance": torch.full((1,), 500.0),
    }


def _framepack(r: Draw) -> Given:
    return {
        **_hunyuan(r, size=4, frames=3),
        "image_embeds": r(1, 12, 16),
        "indices_latents": torch.ones(3),
        "latents_clean": r(1, 4, 2, 4, 4),
        "indices_latents_clean": torch.ones(2),
        "latents_history_2x": r(1, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.ones(2),
        "latents_history_4x": r(1, 4, 8, 4, 4),
        "indices_latents_history_4x": torch.ones(8),
    }


def _hunyuan15(r: Draw) -> Given:
    return {
        **_video(r, 4, 16, frames=1),
        "timestep": torch.ones(1),
        "encoder_attention_mask": torch.ones(1, 12),
        "encoder_hidden_states_2": r(1, 4, 8),
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": torch.zeros(1, 3, 12),
    }


def _ltx(r: Draw) -> Given:
    return {
        "hidden_states": r(2, 32, 4),
        "encoder_hidden_states": r(2, 16, 16),
        "timestep": r.whole(1000, 2),
        "encoder_attention_mask": torch.ones(2, 16, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def _ltx2(r: Draw) -> Given:
    heard = {
        "audio_hidden_states": r(2, 9, 4),
        "audio_encoder_hidden_states": r(2, 16, 16),
        "audio_num_frames": 9,
        "fps": 25.0,
    }
    return {**_ltx(r), **heard, "timestep": torch.full((2,), 500.0)}


def _minimax(r: Draw) -> Given:
    """Four words, six sounds and eight patches in one sequence."""
    text, audio, video = torch.arange(4), torch.arange(4, 10), torch.arange(10, 18)
    return {
        "hidden_states": r(2, 8, 16),
        "audio_hidden_states": r(2, 6, 6),
        "encoder_hidden_states": r(2, 4, 8),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": torch.tensor([0] * 4 + [1] * 6 + [0] * 8),
        "token_tags": torch.tensor([1] * 4 + [2] * 6 + [0] * 8),
        "position_ids": torch.arange(18.0)[:, None].expand(18, 3).contiguous(),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


def _sana_refiner(r: Draw) -> Given:
    turned = r(1, 32, 16)
    return {
        "hidden_states": r(1, 32, 4),
        "encoder_hidden_states": r(1, 16, 16),
        "timestep": torch.full((1, 32), 500.0),
        "video_rotary_emb": (turned.cos(), turned.sin()),
    }


def _wan_animate(r: Draw) -> Given:
    return {
        **_video(r, 12, 16, size=16, frames=21),
        "encoder_hidden_states_image": r(1, 12, 16),
        "pose_hidden_states": r(1, 4, 20, 16, 16),
        "face_pixel_values": r(1, 3, 77, 16, 16),
    }


def _wan_animate_2(r: Draw) -> Given:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [r(16, 2, 4, 4)],
        "timestep": torch.ones(1),
        "encoder_hidden_states": [r(8, 32)],
        "condition_latents": [r(20, 2, 4, 4)],
        "encoder_hidden_states_image": r(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(6),
        "kv_cache_mode": "extract",
        "seq_len": 8,
        "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
    }


def _protein(r: Draw) -> Given:
    return {
        "bb_ca": r(1, 6, 3),
        "local_latents": r(1, 6, 8),
        "bb_ca_time": torch.rand(1),
        "local_latents_time": torch.rand(1),
        "padding_mask": torch.ones(1, 6, dtype=torch.bool),
        "token_type": r.whole(7, 1, 6),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(1, 6, dtype=torch.bool),
            "supports_local_latent": torch.ones(1, 6, dtype=torch.bool),
        },
    }


def _ace(r: Draw) -> Given:
    return {
        "hidden_states": r(2, 8, 8),
        "timestep": torch.rand(2),
        "timestep_r": torch.rand(2),
        "encoder_hidden_states": r(2, 10, 32),
        "context_latents": r(2, 8, 16),
    }


def _kandinsky(r: Draw) -> Given:
    return {
        "hidden_states": r(1, 2, 4, 4, 4),
        "encoder_hidden_states": r(1, 8, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": r(1, 8),
    }


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_LATENT = {"in_channels": 4, "out_channels": 4}
_WAN = {
    **_LATENT,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "rope_max_seq_len": 32,
}
_COGVIDEO = {
    **_HEADS,
    **_LATENT,
    "time_embed_dim": 4,
    "text_embed_dim": 8,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "max_text_seq_length": 8,
}
_HUNYUAN = {
    **_LATENT,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
_LTX2 = {
    **_HEADS,
    **_LATENT,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "caption_channels": 16,
    "rope_double_precision": False,
}
_JOY = {
    "in_channels": 16,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "rope_dim_list": [4, 6, 6],
    "theta": 256,
}
_KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 48,
    "axes_dims": (8, 4, 4),
}

FAMILIES: Families = {
    "AceStepTransformer1DModel": (
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "sliding_window": 4,
        },
        _ace,
    ),
    "AllegroTransformer3DModel": (
        {
            **_HEADS,
            **_LATENT,
            "cross_attention_dim": 16,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "caption_channels": 8,
        },
        lambda r: _video(r, 4, 8),
    ),
    "AnyFlowFARTransformer3DModel": (_WAN, lambda r: {**_any_flow(r, 4), "chunk_partition": [2, 2]}),
    "AnyFlowTransformer3DModel": (_WAN, lambda r: _any_flow(r, 2)),
    "ChronoEditTransformer3DModel": (_WAN, lambda r: _video(r, 4, 16)),
    "CogVideoXTransformer3DModel": (_COGVIDEO, _frames_first),
    "ConsisIDTransformer3DModel": (
        {
            **_COGVIDEO,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 8,
            "LFE_vit_dim": 8,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        lambda r: {**_frames_first(r), "id_vit_hidden": [r(2, 2, 8)], "id_cond": r(2, 8)},
    ),
    "Cosmos3OmniTransformer": (
        {
            "head_dim": 6,
            "hidden_size": 12,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "rope_axes_dim": [1, 1, 1],
            "vocab_size": 32,
        },
        _cosmos3,
    ),
    "CosmosTransformer3DModel": (
        {
            **_LATENT,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "concat_padding_mask": False,  # it would need torchvision
        },
        lambda r: {**_video(r, 4, 16, frames=1), "fps": 30},
    ),
    "EasyAnimateTransformer3DModel": (
        {
            **_LATENT,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "patch_size": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
        lambda r: _video(r, 4, 16, size=16),
    ),
    "HeliosTransformer3DModel": (
        {name: value for name, value in _WAN.items() if name != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
        _helios,
    ),
    "HunyuanVideo15Transformer3DModel": (
        {
            **_HEADS,
            **_LATENT,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
        },
        _hunyuan15,
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {**_HUNYUAN, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        _framepack,
    ),
    "HunyuanVideoTransformer3DModel": (_HUNYUAN, lambda r: _hunyuan(r, size=8, frames=1)),
    "JoyImageEditPlusTransformer3DModel": (
        _JOY,
        lambda r: {
            "hidden_states": r(1, 2, 16, 1, 2, 2),
            "encoder_hidden_states": r(1, 12, 16),
            "timestep": torch.ones(1),
            "shape_list": [[(1, 1, 1), (1, 1, 1)]],
        },
    ),
    "JoyImageEditTransformer3DModel": (
        _JOY,
        lambda r: {**_video(r, 16, 16, size=4, frames=1), "timestep": torch.ones(1)},
    ),
    "Kandinsky5Transformer3DModel": (
        {**_KANDINSKY},
        lambda r: {
            **_kandinsky(r),
            "visual_rope_pos": (torch.arange(2), torch.arange(2), torch.arange(2)),
            "text_rope_pos": torch.arange(8),
        },
    ),
    "Kandinsky6SRTransformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "axes_dims": (8, 4, 4),
        },
        lambda r: {"hidden_states": r(1, 2, 8, 8, 9), "timestep": torch.tensor([500.0])},
    ),
    "Kandinsky6Transformer3DModel": (
        {**_KANDINSKY, "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
        lambda r: {**_kandinsky(r), "audio_hidden_states": r(1, 6, 4)},
    ),
    "LTX2VideoTransformer3DModel": (_LTX2, _ltx2),
    "LTXVideoTransformer3DModel": ({**_HEADS, **_LATENT, "cross_attention_dim": 16, "caption_channels": 16}, _ltx),
    "LatteTransformer3DModel": (
        {
            **_HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
        },
        lambda r: _video(r, 4, 8, frames=1),
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": 64, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "text_conv": False},
        lambda r: {
            "hidden_states": r(1, 16, 8),
            "encoder_hidden_states": r(1, 10, 32),
            "encoder_attention_mask": torch.ones(1, 10, dtype=torch.bool),
            "attention_mask": torch.ones(1, 16, dtype=torch.bool),
            "timestep": torch.ones(1),
        },
    ),
    "MiniMaxH3Transformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax,
    ),
    "MiniMaxMusic3RVQDepthDecoder": (
        {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "audio_vocab_size": 64},
        lambda r: {"inputs_embeds": r(2, 8, 32)},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {
            **_HEADS,
            "in_channels": 8,
            "condition_dim": 16,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda r: {
            "hidden_states": r(1, 8, 24),
            "encoder_hidden_states": r(1, 24, 16),
            "timestep": torch.full((1,), 0.5),
        },
    ),
    "MochiTransformer3DModel": (
        {**_HEADS, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4},
        lambda r: {**_video(r, 4, 16, rows=2), "encoder_attention_mask": torch.ones(2, 12, dtype=torch.bool)},
    ),
    "MotifVideoTransformer3DModel": (
        {
            "in_channels": 33,
            "out_channels": 16,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_decoder_layers": 2,
            "patch_size": 1,
            "text_embed_dim": 32,
            "image_embed_dim": 4,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda r: _video(r, 33, 32, size=4, frames=3),
    ),
    "RFD4ProteinaTransformer": (
        {
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": 8,
            "token_type_emb_dim": 8,
            "cath_emb_dim": 8,
            "t_emb_dim": 16,
            "seq_sep_dim": 8,
            "xt_pair_dist_dim": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 16,
        },
        _protein,
    ),
    "SanaVideoTransformer3DModel": (
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        lambda r: _video(r, 16, 16),
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (_LTX2, _sana_refiner),
    "SanaWMTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 48,
            "num_attention_heads": 2,
            "linear_head_dim": 24,
            "caption_channels": 16,
            "chunk_plucker_channels": 6,
        },
        lambda r: {
            "hidden_states": r(1, 4, 3, 4, 4),
            "timestep": torch.full((1, 1, 3), 500.0),
            "encoder_hidden_states": r(1, 1, 8, 16),
            "encoder_attention_mask": torch.ones(1, 8),
            "camera_conditions": r(1, 3, 20),
            "chunk_plucker": r(1, 6, 3, 4, 4),
        },
    ),
    "SkyReelsV2Transformer3DModel": (_WAN, lambda r: _video(r, 4, 16)),
    "StableAudio3DiTModel": (
        {
            "io_channels": 8,
            "embed_dim": 32,
            "num_heads": 4,
            "cond_token_dim": 16,
            "global_cond_dim": 12,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
        },
        lambda r: {
            "hidden_states": r(2, 8, 16),
            "timestep": torch.rand(2),
            "encoder_hidden_states": r(2, 4, 16),
            "global_hidden_states": r(2, 12),
        },
    ),
    "StableAudioDiTModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 16,
            "time_proj_dim": 16,
            "global_states_input_dim": 32,
            "cross_attention_input_dim": 16,
        },
        lambda r: {
            "hidden_states": r(2, 4, 16),
            "timestep": torch.rand(2),
            "encoder_hidden_states": r(2, 8, 16),
            "global_hidden_states": r(2, 1, 32),
            "rotary_embedding": (r(17, 4), r(17, 4)),
        },
    ),
    "T5FilmDecoder": (
        {"input_dims": 8, "targets_length": 16, "d_model": 32, "num_heads": 2, "d_kv": 16, "d_ff": 48},
        lambda r: {
            "encodings_and_masks": [(r(2, 6, 32), torch.ones(2, 6))],
            "decoder_input_tokens": r(2, 16, 8),
            "decoder_noise_time": torch.rand(2),
        },
    ),
    "TransformerTemporalModel": (
        {**_HEADS, "in_channels": 8, "norm_num_groups": 2},
        lambda r: {"hidden_states": r(4, 8, 4, 4), "num_frames": 2},
    ),
    "WanAnimate2Transformer3DModel": (
        {"text_len": 16, "in_dim": 36, "dim": 128, "ffn_dim": 128, "freq_dim": 16, "text_dim": 32, "num_heads": 4},
        _wan_animate_2,
    ),
    "WanAnimateTransformer3DModel": (
        {
            **_WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        _wan_animate,
    ),
    "WanTransformer3DModel": (_WAN, lambda r: _video(r, 4, 16)),
    "WanVACETransformer3DModel": (
        {**_WAN, "vace_layers": [0, 2, 4], "vace_in_channels": 12},
        lambda r: {**_video(r, 4, 16), "control_hidden_states": r(1, 12, 2, 8, 8)},
    ),
}

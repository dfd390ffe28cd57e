# SPDX-License-Identifier: Apache-2.0
"""Wan2.2-A14B's transformer with random weights: whole, sharded by layershard or by FSDP2; its tokens split over ranks.

The model is diffusers' own, and so is its context parallelism (Ulysses). Weights depend on their names only: every rank
and every way of storing them has the same ones. They are made where they stay, so no rank ever has more than it keeps.

Knows diffusers, layershard and FSDP2; nothing of rounds or clocks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

# Of the public configuration: Wan2.2's wan_t2v_A14B and the diffusers model made from it. Two such experts make Wan2.2.
SHAPES: dict[str, dict[str, int]] = {
    "a14b": {
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "rope_max_seq_len": 1024,
    },
    # For tests: heads that two and four ranks can divide, and more blocks than windows.
    "tiny": {
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 90,
        "num_layers": 8,
        "rope_max_seq_len": 32,
    },
}
BOUNDARY = 0.875  # of the noise: above it the first expert, below it the second one
TEXT_TOKENS = 512
PIXELS_A_TOKEN = 16  # 8 by the video's encoder, 2 by the patch
FRAMES_A_TOKEN = 4


def latent_size(video: str) -> tuple[int, int, int]:
    """Frames, height and width of the latents of "WIDTHxHEIGHTxFRAMES", as the pipeline makes them."""
    try:
        width, height, frames = (int(part) for part in video.split("x"))
    except ValueError:
        raise ValueError(f"'{video}' is not WIDTHxHEIGHTxFRAMES, such as 832x480x81") from None
    if width % PIXELS_A_TOKEN or height % PIXELS_A_TOKEN or frames % FRAMES_A_TOKEN != 1:
        raise ValueError(f"{video}: width and height must be multiples of {PIXELS_A_TOKEN}, frames 4 n + 1")
    return (frames - 1) // FRAMES_A_TOKEN + 1, height // 8, width // 8


def tokens_of(video: str) -> int:
    frames, height, width = latent_size(video)
    return frames * height * width // 4


def width_of(shape: dict[str, int]) -> int:
    return shape["num_attention_heads"] * shape["attention_head_dim"]


# ---- Weights ----


def random_values(name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What the parameter @name is in every run, on every rank: of a size that keeps activations near one."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)
    if ".norm" in name and name.endswith("weight"):
        return values.mul_(0.02).add_(1)
    if name.endswith("bias"):
        return values.mul_(0.02)
    return values.mul_(math.prod(like.shape[1:]) ** -0.5)


def empty(shape: dict[str, int], layers: int, device: torch.device) -> nn.Module:
    """On the meta device but for the rotary table; in bfloat16 but for what diffusers keeps in float32."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(**(shape | {"num_layers": layers})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    rotary = type(model.rope)(shape["attention_head_dim"], model.config.patch_size, shape["rope_max_seq_len"])
    model.rope = rotary.to(device)
    return model


def _materialize(model: nn.Module, names: Iterable[str], prefix: str, device: torch.device) -> None:
    for name in names:
        owner, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        values = random_values(prefix + name, owner._parameters[key], device)
        owner._parameters[key] = nn.Parameter(values, requires_grad=False)


def outside(model: nn.Module) -> list[str]:
    """Parameters that belong to no block; every scheme stores them whole."""
    return [name for name, _ in model.named_parameters() if not name.startswith("blocks.")]


def bytes_of(parameters: Iterable[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in parameters)


# ---- Ways to store the blocks ----


def replicate(model: nn.Module, prefix: str, device: torch.device) -> None:
    _materialize(model, [name for name, _ in model.named_parameters()], prefix, device)


def shard(model: nn.Module, prefix: str, device: torch.device, **config: Any) -> Any:
    """By layershard: each rank makes the blocks that it is source of. The handle."""
    import layershard.torch
    from layershard.diffusers import LayerShardingConfig, apply_layer_sharding

    _materialize(model, outside(model), prefix, device)
    handle = apply_layer_sharding(model, LayerShardingConfig(**config))
    layershard.torch.fill(model, lambda name, there: random_values(prefix + name, there, device))
    return handle


def shard_by_fsdp(model: nn.Module, prefix: str, device: torch.device, mesh: Any) -> None:
    """By FSDP2: 1/n of each weight of each block. What is in float32 is tiny and stays whole: no casts, one gather."""
    from torch.distributed.fsdp import fully_shard

    _materialize(model, outside(model), prefix, device)
    kept = {each for each in model.parameters() if each.dtype is torch.float32 or each.device.type != "meta"}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    model.blocks.to_empty(device=device)
    for name, parameter in model.blocks.named_parameters(prefix="blocks"):
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        values = random_values(prefix + name, parameter, device)
        local.copy_(values if local.shape == values.shape else values.chunk(mesh.size())[mesh.get_local_rank()])


def prefetch_by_fsdp(model: nn.Module, ahead: int) -> None:
    """Each block's gather is started @ahead blocks before it."""
    blocks = list(model.blocks)
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + ahead])


# ---- Tokens over ranks ----


def make_meshes(size: int, device: torch.device) -> tuple[Any, Any]:
    """For context parallelism, in the words of diffusers, and for FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh

    if device.type == "cuda":
        torch.cuda.init()  # a mesh takes LOCAL_RANK for the number of the GPU as long as none is in use
    names = ("ring", "ulysses")
    return init_device_mesh(device.type, (1, size), mesh_dim_names=names), init_device_mesh(device.type, (size,))


def ulysses(ranks: Any, mesh: Any) -> Any:
    """The configuration that all models of a run share."""
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=ranks.size, mesh=mesh))
    config.setup(ranks.rank, ranks.size, ranks.device, mesh=mesh)
    return config


def split_tokens(model: nn.Module, config: Any) -> None:
    """What model.enable_parallelism does, which refuses the processor for want of an accelerator."""
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models.attention import AttentionModuleMixin

    for module in model.modules():
        if isinstance(module, AttentionModuleMixin):
            module.processor._parallel_config = config
    # The entry without a name is about a timestep for each token, which this model has not.
    plan = {name: what for name, what in model._cp_plan.items() if name}
    apply_context_parallel(model, config.context_parallel_config, plan)


# ---- Denoising ----


def schedule(steps: int) -> list[float]:
    """Noise before each step and after the last one."""
    return [1 - step / steps for step in range(steps + 1)]


class Denoiser:
    """Steps of the pipeline's kind with one expert or two: what a pass is here. Ranks have the same video."""

    def __init__(self, shape: dict[str, int], video: str, steps: int, device: torch.device, text_tokens: int) -> None:
        generator = torch.Generator(device).manual_seed(1)
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        self._latents = torch.randn(1, shape["in_channels"], *latent_size(video), **options)
        self._text = torch.randn(1, text_tokens, shape["text_dim"], **options)
        self._noise = schedule(steps)
        self._times = [torch.tensor([1000 * noise], device=device) for noise in self._noise]

    def expert_of(self, step: int, experts: int) -> int:
        return 0 if self._noise[step] >= BOUNDARY else experts - 1

    def run(self, experts: Sequence[nn.Module]) -> torch.Tensor:
        latents = self._latents
        for step, time in enumerate(self._times[:-1]):
            model = experts[self.expert_of(step, len(experts))]
            flow = model(hidden_states=latents, timestep=time, encoder_hidden_states=self._text, return_dict=False)[0]
            latents = latents + (self._noise[step + 1] - self._noise[step]) * flow
        return latents

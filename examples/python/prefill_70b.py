#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prefill of a model of a 70B Llama's shape with random weights, data-parallel, each layer stored once.

    torchrun --nproc-per-node 2 examples/python/prefill_70b.py                                    # two GPUs, 80 layers
    torchrun --nproc-per-node 2 examples/python/prefill_70b.py --layers 6 --width 256 --heads 8 --kv-heads 2 \
        --hidden 700 --tokens 128 --dtype float32 --transport shm:copy                            # a try on a processor

In bf16 the 80 layers are 137 GB: beside a KV cache they do not fit on one GPU, but half of them and two windows do. No
rank ever holds more: layers are made at random on the rank that is their source, one at a time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import layershard.torch


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q_proj = nn.Linear(width, heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads)
        self.post_norm = nn.RMSNorm(width)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x))
        y = self.post_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Stack(nn.Module):
    def __init__(self, n_layers: int, *shape: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(*shape) for _ in range(n_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def random_tensor(name: str, like: torch.Tensor) -> torch.Tensor:
    """Norms are ones; a linear keeps the size of what goes through it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = torch.ones(like.shape, dtype=like.dtype, device=device)
    return value if like.dim() == 1 else value.normal_(0, like.shape[1] ** -0.5)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 80), ("width", 8192), ("hidden", 28672), ("heads", 64), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank's own sequence")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prefetch", type=int, default=1)
    parser.add_argument("--resident", default="0", help="bytes, a share of the layers (30%%), all, or auto")
    parser.add_argument("--transport", default="auto")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    with torch.device("meta"):
        model = Stack(options.layers, options.width, options.hidden, options.heads, options.kv_heads)
    model = model.to(getattr(torch, options.dtype)).eval()
    layershard.torch.shard(
        model,
        "layers.*",
        scope="block",
        prefetch=options.prefetch,
        transport=options.transport,
        resident=int(options.resident) if options.resident.isdigit() else options.resident,
        device=device,
    )
    layershard.torch.fill(model, random_tensor)
    if rank == 0:
        print(layershard.torch.of(model).report(), flush=True)
    x = torch.randn(1, options.tokens, options.width, device=device, dtype=getattr(torch, options.dtype))
    took = []
    with torch.inference_mode():
        for _ in range(options.passes + 1):
            synchronize(device)
            begin = time.perf_counter()
            y = model(x)
            synchronize(device)
            took.append(time.perf_counter() - begin)
    seconds = statistics.median(took[1:])
    free = f", {torch.cuda.mem_get_info(device)[0] / 1e9:.1f} GB free" if device.type == "cuda" else ""
    sane = "finite" if torch.isfinite(y).all() else "NOT FINITE"
    speed = f"{options.tokens / seconds:.0f} tokens/s, {1e3 * seconds:.2f} ms a pass"
    # The end of the line goes with it in one write: between print()'s two another rank's line may come.
    print(f"rank {rank} of {size}: {speed}, {sane}{free}\n", end="", flush=True)
    dist.barrier()
    layershard.torch.of(model).close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The model of e2e.py: a stack of a Llama's layers with random weights, whole or as one tensor-parallel rank's.

A weight's values depend on its name alone, so that every way to store the model has the same ones. Knows shapes and
arithmetic; nothing of ranks that talk to each other, or of layershard.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

ALIGNMENT = 256  # of a tensor inside a layer's bytes, as allocators have it


@dataclasses.dataclass(frozen=True)
class Shape:
    """By default of a 70B Llama: 1.71 GB a layer in bfloat16."""

    layers: int = 12
    width: int = 8192
    hidden: int = 28672
    heads: int = 64
    kv_heads: int = 8
    dtype: torch.dtype = torch.bfloat16

    @property
    def head(self) -> int:
        return self.width // self.heads

    def part(self, n_ranks: int) -> Shape:
        """One rank's heads and hidden columns. A head keeps its size: it is told to the layers apart."""
        return dataclasses.replace(
            self, hidden=self.hidden // n_ranks, heads=self.heads // n_ranks, kv_heads=self.kv_heads // n_ranks
        )

    def divides_by(self, n_ranks: int) -> bool:
        return not any(each % n_ranks for each in (self.hidden, self.heads, self.kv_heads))

    @property
    def layer_bytes(self) -> int:
        with torch.device("meta"):
            return sum(end - begin for _, begin, end in pieces(Layer(self, self.head).to(self.dtype)))

    @property
    def bytes(self) -> int:
        return self.layers * self.layer_bytes


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


class Attention(nn.Module):
    def __init__(self, shape: Shape, head: int) -> None:
        super().__init__()
        self.head = head
        self.q_proj = nn.Linear(shape.width, shape.heads * head, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(shape.heads * head, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.mix(q, k, v).transpose(1, 2).flatten(2))

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Layer(nn.Module):
    """@combine adds up what the ranks of a tensor-parallel layer have."""

    attention_kind = Attention

    def __init__(self, shape: Shape, head: int, combine: Callable[[torch.Tensor], torch.Tensor] = _as_it_is) -> None:
        super().__init__()
        self.combine = combine
        self.input_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.attention = self.attention_kind(shape, head)
        self.post_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.combine(self.attention(self.input_norm(x)))
        y = self.post_norm(x)
        return x + self.combine(self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y)))


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def empty_stack(shape: Shape, kind: type[Layer] = Layer) -> Stack:
    """On the meta device: no memory yet."""
    with torch.device("meta"):
        layers: list[nn.Module] = [kind(shape, shape.head).to(shape.dtype) for _ in range(shape.layers)]
    return Stack(layers).eval().requires_grad_(False)


# ---- Values -------------------------------------------------------------------------------------------------------


def values(name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Of the whole tensor @name: a norm's are about one, a linear keeps the size of what goes through it."""
    draw = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    made = torch.empty(like.shape, dtype=like.dtype, device=device)
    return (
        made.normal_(1, 0.1, generator=draw)
        if made.dim() == 1
        else made.normal_(0, made.shape[1] ** -0.5, generator=draw)
    )


def part_of(name: str, whole: torch.Tensor, rank: int, n_ranks: int) -> torch.Tensor:
    """What a tensor-parallel rank has of it: inputs of o and down, outputs of the other linears, norms whole."""
    if whole.dim() == 1:
        return whole
    return whole.chunk(n_ranks, dim=1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0)[rank]


def tokens_of(rank: int, tokens: int, shape: Shape, device: torch.device) -> torch.Tensor:
    """The sequence that @rank has of its own."""
    draw = torch.Generator(device).manual_seed(1000 + rank)
    return torch.empty(1, tokens, shape.width, dtype=shape.dtype, device=device).normal_(generator=draw)


def borrow(layer: nn.Module, source: nn.Module) -> nn.Module:
    """Let @layer, of the meta device, compute from the parameters of @source."""
    for name, parameter in source.named_parameters():
        owner, _, key = name.rpartition(".")
        layer.get_submodule(owner)._parameters[key] = parameter
    return layer


# ---- A layer's tensors in one piece of memory ---------------------------------------------------------------------


def pieces(layer: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name, first and last byte of each parameter, where all of them lie in a row."""
    begin = 0
    for name, parameter in layer.named_parameters():
        end = begin + -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        yield name, begin, end
        begin = end


def use_memory(layer: nn.Module, memory: torch.Tensor) -> nn.Module:
    """Let the parameters of a layer of the meta device be views of @memory, bytes."""
    for name, begin, _ in list(pieces(layer)):
        owner, _, key = name.rpartition(".")
        module = layer.get_submodule(owner)
        old = module._parameters[key]
        assert old is not None
        view = memory[begin : begin + old.nbytes].view(old.dtype).view(old.shape)
        module._parameters[key] = nn.Parameter(view, requires_grad=False)
    return layer

# SPDX-License-Identifier: Apache-2.0
"""Layers of e2e.py's model that compute a part of one sequence: attention over keys and values of other ranks (context
parallel), or of passes before (chunks), and tensor parallel with every rank's tokens between the products.

Knows torch.distributed; nothing of layershard or of rounds.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from e2e_model import Attention, Layer
from torch.nn.attention.bias import causal_lower_right


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """@q are the last positions of @k and @v."""
    few, many = q.shape[2], k.shape[2]
    if few == many:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mask = causal_lower_right(few, many) if q.is_cuda else torch.ones(few, many, dtype=torch.bool).tril(many - few)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


# ---- Context parallel ---------------------------------------------------------------------------------------------


def pieces_of(rank: int, size: int, tokens: int) -> list[slice]:
    """The positions that @rank has: one piece of the first half and its mirror image in the second, so that all ranks'
    attention is the same work. @tokens must divide by twice the ranks."""
    length = tokens // (2 * size)
    return [slice(each * length, (each + 1) * length) for each in (rank, 2 * size - 1 - rank)]


def in_order(everyones: torch.Tensor) -> torch.Tensor:
    """The whole sequence from what each rank has of it: @everyones is (ranks, ..., tokens of one, size of a head)."""
    first, second = everyones.chunk(2, dim=-2)
    return torch.cat([*first.unbind(0), *reversed(second.unbind(0))], dim=-2)


class ContextAttention(Attention):
    """Keys and values of all ranks are gathered; each rank's queries are its own."""

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rank, size = dist.get_rank(), dist.get_world_size()
        mine = torch.stack([k, v])
        everyones = torch.empty(size, *mine.shape, dtype=mine.dtype, device=mine.device)
        dist.all_gather_into_tensor(everyones.view(-1, *mine.shape[1:]), mine)
        k, v = in_order(everyones).unbind(0)
        pieces = pieces_of(rank, size, k.shape[2])
        parts = zip(q.chunk(2, dim=2), pieces, strict=True)
        return torch.cat([attend(part, k[:, :, : at.stop], v[:, :, : at.stop]) for part, at in parts], dim=2)


class ContextLayer(Layer):
    attention_kind = ContextAttention


# ---- Chunks of a sequence, one after the other --------------------------------------------------------------------


class ChunkAttention(Attention):
    """Of the chunk that begins at `begin`; keys and values of those before are in `cache`."""

    begin = 0
    cache: torch.Tensor  # (2, 1, key-value heads, tokens, size of a head)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        end = self.begin + k.shape[2]
        for kept, new in zip(self.cache, (k, v), strict=True):
            kept[:, :, self.begin : end] = new
        keys, values = (each[:, :, :end] for each in self.cache)
        return attend(q, keys, values)


class ChunkLayer(Layer):
    attention_kind = ChunkAttention


# ---- Tensor parallel, a sequence's tokens divided between the products ---------------------------------------------


class SequenceParallelLayer(Layer):
    """Gathers tokens before the products that are divided by outputs, sums up for its own after those divided by
    inputs."""

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(dist.get_world_size() * x.shape[1], x.shape[2], dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(whole, x.squeeze(0))
        return whole.unsqueeze(0)

    def _scattered(self, x: torch.Tensor) -> torch.Tensor:
        part = torch.empty(x.shape[1] // dist.get_world_size(), x.shape[2], dtype=x.dtype, device=x.device)
        dist.reduce_scatter_tensor(part, x.squeeze(0))
        return part.unsqueeze(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._scattered(self.attention(self._gathered(self.input_norm(x))))
        y = self._gathered(self.post_norm(x))
        return x + self._scattered(self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y)))

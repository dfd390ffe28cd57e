# SPDX-License-Identifier: Apache-2.0
"""One store, two regimes: prefill from gathered layers, decode tensor-parallel from this rank's own stripes.

A weight striped by rows gives this rank's part of the outputs, one striped by columns takes this rank's part of the
inputs and sums over the ranks: q, k, v, gate and up by rows, o and down by columns, as Megatron pairs them. No second
copy of anything is made. Knows linears, stripes and one all-reduce; nothing of windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .handle import Handle, of
from .membership import process_group
from .refusals import Refused


class DualLinear(nn.Linear):
    """A linear that computes from the whole weight, or, while its regime is parallel, from this rank's stripe."""

    regime: Regime
    stripe: torch.Tensor
    stripe_bias: torch.Tensor | None
    sums: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.regime.is_parallel:
            return super().forward(x)
        part = F.linear(x, self.stripe, self.stripe_bias)
        if self.sums:
            dist.all_reduce(part, group=self.regime.group)
        return part


class Regime:
    """Made by dual; says how the model's linears compute now."""

    def __init__(self, handle: Handle, group: Any) -> None:
        self.group = group
        self.is_parallel = False
        self._handle = handle

    @contextmanager
    def parallel(self) -> Iterator[None]:
        """Passes inside are tensor-parallel: all ranks make them together, on the same tokens. Nothing is fetched."""
        self._handle.pause(True)
        self.is_parallel = True
        try:
            yield
        finally:
            self.is_parallel = False
            self._handle.pause(False)


def _convert(name: str, linear: nn.Linear, handle: Handle, regime: Regime) -> None:
    stripe = handle.stripe(f"{name}.weight")
    sums = stripe.shape[1] != linear.in_features
    if linear.bias is not None and sums:
        raise Refused(
            f"{name} sums over the ranks and has a bias, which no rank has whole in a tensor-parallel pass: cut its "
            f"weight by rows, or leave it out of the patterns"
        )
    bias = None if linear.bias is None else handle.stripe(f"{name}.bias")
    linear.__dict__.update(regime=regime, stripe=stripe, sums=sums, stripe_bias=bias)
    linear.__class__ = DualLinear


def _refuse_others(handle: Handle, ranks: Any) -> None:
    """Sums over other ranks than those that hold the stripes would be wrong."""
    sums, mine = (dist.get_rank(ranks), dist.get_world_size(ranks)), (handle.group.rank, handle.group.size)
    if sums != mine:
        raise Refused(
            f"this is rank {mine[0]} of the {mine[1]} that share the model, and rank {sums[0]} of {sums[1]} in the "
            f"process group that would sum: give dual the group of the ranks that share it"
        )


def dual(model: nn.Module, group: Any = None) -> Regime:
    """Give the sharded linears of a model striped by rows and columns their second way to compute. Local.

    @group sums, and must have the ranks of the shard. All that is shared must be such linears: what else a layer holds
    would not be here without being gathered.
    """
    handle, ranks = of(model), process_group(group)
    if handle.group.size > 1:
        if ranks is None:
            raise Refused("tensor-parallel passes need torch.distributed: give the process group")
        _refuse_others(handle, ranks)
    regime = Regime(handle, ranks)
    modules = dict(handle.model.named_modules())
    names = dict.fromkeys(place.name.rpartition(".")[0] for place in handle.all_places())
    for name in names:
        if type(modules[name]) is not nn.Linear:
            raise Refused(f"{name} is a {type(modules[name]).__name__}; only linears can compute from a stripe")
    for name in names:
        _convert(name, modules[name], handle, regime)
    handle.is_dual = True
    return regime

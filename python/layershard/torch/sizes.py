# SPDX-License-Identifier: Apache-2.0
"""What the series of one call take on each rank, and how long a pass is, for any number of resident layers.

Knows plans and the library's arithmetic; nothing of what memory there is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..planning import Plan
from ..planning import plan as cost_of
from ..series import Tensor
from .grouping import SeriesPlan
from .spreading import Spreading

_PAGE = 4096  # what the transports for host memory round buffers up to
_BLOCK = 2**21  # what the driver of a GPU rounds memory up to


@dataclass(frozen=True)
class Sizes:
    """What the series of one call take on a rank."""

    spreading: Spreading
    plans: Sequence[SeriesPlan]
    tensors: Sequence[Sequence[Tensor]]
    device: torch.device
    memory: str  # whose: "library", "torch"

    @property
    def layers(self) -> int:
        return max(len(plan.places) for plan in self.plans)

    def _poison(self) -> str:
        """Ready, it takes memory but where that is the library's in host memory."""
        asked = os.environ.get("LAYERSHARD_POISON", "")
        is_taken = self.device.type == "cuda" or self.memory == "torch"
        return "on" if asked == "1" or (asked == "ready" and is_taken) else "off"

    def cost(self, index: int, rank: int, resident_bytes: int = 0) -> Plan:
        plan, spreading = self.plans[index], self.spreading
        placement = spreading.placement_of(plan)
        return cost_of(
            layer_count=len(plan.places),
            tensors=self.tensors[index],
            size=spreading.size,
            rank=(rank - plan.first_layer) % spreading.size,
            prefetch=spreading.prefetch,
            placement=placement,  # type: ignore[arg-type]
            resident_bytes=resident_bytes,
            poison=self._poison(),  # type: ignore[arg-type]
            collective=spreading.in_step,
            direct=int(spreading.in_place and placement == "whole"),
        )

    def _bytes(self, index: int, rank: int, resident_bytes: int) -> int:
        found = self.cost(index, rank, resident_bytes)
        rounded = 2 * _BLOCK if self.device.type == "cuda" else _PAGE * (2 + 2 * found.windows + found.residents)
        is_gathered = self.spreading.in_step and self.spreading.placement_of(self.plans[index]) == "striped"
        staged = 2 * found.layer_bytes if is_gathered else 0
        return found.shard_bytes + found.window_bytes + found.resident_bytes + rounded + staged

    def needed(self, rank: int, turned: int) -> int:
        return sum(self._bytes(index, rank, nbytes) for index, nbytes in enumerate(self.spending(turned)))

    def lacking(self, index: int, rank: int) -> int:
        """Layers that are to be fetched, without residents."""
        plan = self.plans[index]
        cost, n_layers = self.cost(index, rank), len(plan.places)
        if not cost.windows:
            return 0
        whole = self.spreading.placement_of(plan) == "whole"
        return n_layers - cost.shard_bytes // cost.layer_bytes if whole else n_layers

    def pass_ns(self, rank: int, turned: int, compute_ns: int, link_bytes_per_s: int) -> int:
        """Of a steady pass. Series over the same layers come as one, since one link carries them."""
        spreading = self.spreading
        together: dict[tuple[int, int, str], int] = {}
        for index, plan in enumerate(self.plans):
            key = plan.first_layer, len(plan.places), spreading.placement_of(plan)
            together[key] = together.get(key, 0) + self.cost(index, rank).layer_bytes
        total = 0
        for (first, n_layers, placement), nbytes in together.items():
            total += cost_of(
                layer_count=n_layers,
                tensors=[Tensor("layer", nbytes)],
                size=spreading.size,
                rank=(rank - first) % spreading.size,
                prefetch=spreading.prefetch,
                placement=placement,  # type: ignore[arg-type]
                resident_bytes=turned * n_layers // self.layers * nbytes,
                collective=spreading.in_step,
                compute_ns=compute_ns,
                link_bytes_per_s=link_bytes_per_s,
            ).pass_ns
        return total

    def stored_elsewhere(self, rank: int) -> int:
        costs = [self.cost(index, rank) for index in range(len(self.plans))]
        return sum(each.replicated_bytes - each.shard_bytes for each in costs)

    def spending(self, turned: int) -> list[int]:
        """What the library is told to spend on residents of each series."""
        layer_bytes = [self.cost(index, 0).layer_bytes for index in range(len(self.plans))]
        return [
            turned * len(plan.places) // self.layers * nbytes
            for plan, nbytes in zip(self.plans, layer_bytes, strict=True)
        ]

    def most(self, rank: int, budget: int) -> int:
        """How far the dial can be turned."""
        low, high = 0, self.layers + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.needed(rank, middle) <= budget else (low, middle)
        return low

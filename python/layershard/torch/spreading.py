# SPDX-License-Identifier: Apache-2.0
"""What the ranks make of the planned series: which are worth sharing, how each is placed, where each begins.

Knows sizes and the library's arithmetic; nothing of modules or memory. Every rank finds the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..group import Group
from ..planning import plan as cost_of
from ..series import Tensor
from .grouping import SeriesPlan

_log = logging.getLogger("layershard")


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Spreading:
    """How the series of one call are to be spread over the ranks. On GPUs layers count as fetched into windows, though
    some may be read in place."""

    size: int
    prefetch: int
    placement: str  # as asked for, "auto" too
    in_place: bool  # ranks read each other's memory, and nothing moves
    in_step: bool  # a collective transport

    @classmethod
    def over(cls, group: Group, prefetch: int, placement: str) -> Spreading:
        kind = group.transport.split(" (")[0].rsplit(",", 1)[-1]
        in_step = kind.startswith("callback") or "lockstep" in kind
        return cls(group.size, prefetch, placement, kind == "shm", in_step)

    def _saves(self, plan: SeriesPlan, placement: str) -> bool:
        """Whether any rank then holds less than all layers. The first rank stores the most of them, the last one the
        fewest, and may need more windows."""
        for rank in (0, self.size - 1):
            cost = cost_of(
                layer_count=len(plan.places),
                tensors=[Tensor("layer", plan.layer_bytes)],
                size=self.size,
                rank=rank,
                prefetch=self.prefetch,
                placement=placement,  # type: ignore[arg-type]
                collective=self.in_step,
                direct=int(self.in_place),
            )
            if cost.shard_bytes + cost.window_bytes < cost.replicated_bytes:
                return True
        return False

    def placement_of(self, plan: SeriesPlan) -> str:
        """auto: whole layers, unless there are too few of them for every rank to store one and stripes save memory."""
        if self.placement != "auto":
            return self.placement
        few = len(plan.places) < self.size
        return "striped" if few and (not plan.is_part or self._saves(plan, "striped")) else "whole"

    def worth_sharing(self, plans: Sequence[SeriesPlan]) -> list[SeriesPlan]:
        """Without those that would save nothing anywhere: told. If none would save anything, all of them."""
        useless = [plan for plan in plans if self.size > 1 and not self._saves(plan, self.placement_of(plan))]
        if not useless or len(useless) == len(plans):
            return list(plans)
        named = [f"{plan.name} (layers {plan.numbers_text}, {_mib(plan.nbytes)})" for plan in useless]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        _log.warning(
            "%s%s stay replicated: shared by %d ranks with prefetch=%d they would save nothing, as windows take as "
            "much as is not stored",
            ", ".join(named[:3]),
            more,
            self.size,
            self.prefetch,
        )
        return [plan for plan in plans if plan not in useless]

    def place(self, plans: Sequence[SeriesPlan]) -> None:
        """Let parts begin on such ranks that the ranks' bytes are as even as can be: the largest layers first. What is
        no part is on the ranks that its layers' numbers say."""
        stored = [0] * self.size
        whole = [plan for plan in plans if self.placement_of(plan) == "whole"]
        for plan in whole:
            if not plan.is_part:
                stored = _with(stored, plan, plan.first_layer)
        for plan in sorted((plan for plan in whole if plan.is_part), key=lambda plan: -plan.layer_bytes):
            own = plan.first_layer % self.size
            ranks = [(own + step) % self.size for step in range(self.size)]
            best = min(ranks, key=lambda rank: sorted(_with(stored, plan, rank), reverse=True))
            plan.start = plan.first_layer if best == own else best
            stored = _with(stored, plan, best)


def _with(stored: Iterable[int], plan: SeriesPlan, start: int) -> list[int]:
    """The bytes of each rank with a series that begins at @start."""
    found = list(stored)
    each, more = divmod(len(plan.places), len(found))
    for step in range(len(found)):
        found[(start + step) % len(found)] += plan.layer_bytes * (each + (step < more))
    return found

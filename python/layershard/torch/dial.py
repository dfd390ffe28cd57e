# SPDX-License-Identifier: Apache-2.0
"""resident="auto": how many further layers fit into the memory that is free, and what one more would gain.

Knows sizes, what ranks found free, and the library's arithmetic; nothing of modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..group import Group
from ..series import Series, Stats, unsigned
from .exchange import exchange
from .free_memory import ADDRESSES, Free, free_memory
from .refusals import Refused
from .sizes import Sizes
from .torch_memory import kind_of

AUTO = "auto"


def refuse_reserve(resident: object, reserve: object) -> None:
    """What says nothing, or is no number of bytes."""
    if reserve is None:
        return
    if resident != AUTO:
        raise Refused(f"reserve is {reserve!r}: it counts with resident='auto' alone, and resident is {resident!r}")
    if isinstance(reserve, bool) or not isinstance(reserve, int) or reserve < 0:
        raise Refused(f"reserve is {reserve!r}: give the bytes that are to be left free, a whole number from 0 on")
    unsigned("reserve", reserve, 63)


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Share:
    """What one rank may use: its part of the pool in which it has the least."""

    free: int
    pool: str  # words for people
    ranks: int  # that share the pool
    reserve: int
    cached: int

    @property
    def budget(self) -> int:
        """For shards, windows and residents. What torch has cached cannot be used for them, but for what is to be left
        free."""
        return min(self.free, self.free + self.cached - self.reserve)

    @property
    def words(self) -> str:
        part = f", a part for each of the {self.ranks} ranks that share it" if self.ranks > 1 else ""
        kept = f" and {gib(self.cached)} in torch's cache" if self.cached else ""
        return f"{gib(self.free)} of the {self.pool}{part}{kept}"


@dataclass(frozen=True)
class Rates:
    """What a prediction needs: what one layer computes, all that is chosen of a block, and the link into this rank."""

    compute_ns: int = 0
    link_bytes_per_s: int = 0


@dataclass(frozen=True)
class Dial:
    """What was chosen: of the longest series @turned layers, of others as large a part."""

    rank: int
    share: Share
    sizes: Sizes
    turned: int
    least: int  # the rank by which all go, on a transport in step; else this one

    @property
    def spending(self) -> list[int]:
        return self.sizes.spending(self.turned)

    def lines(self, series: Sequence[Series], rates: Rates) -> list[str]:
        """Where it stands, and what the next step would gain."""
        stats = [each.stats() for each in series]
        residents, nbytes = sum(each.residents for each in stats), sum(each.resident_bytes for each in stats)
        lacking = sum(self.sizes.lacking(index, self.rank) for index in range(len(stats)))
        if not any(each.windows or each.residents for each in stats):
            return ["resident='auto' keeps nothing: every layer is read where it lies"]
        others = f"; as many as fit on rank {self.least}, the same on all" if self.least != self.rank else ""
        return [
            f"resident='auto' keeps {residents} of the {lacking} layers that other ranks store, {gib(nbytes)}: there "
            f"were {self.share.words}, of which {gib(self.share.reserve)} are reserved{others}",
            self._next(residents < lacking, stats, rates),
        ]

    def _next(self, is_more: bool, stats: Sequence[Stats], rates: Rates) -> str:
        if not is_more:
            return "nothing is fetched: there is no next step"
        taken, then_taken = (self.sizes.needed(self.rank, turned) for turned in (self.turned, self.turned + 1))
        left = gib(self.share.budget - taken)
        step = f"the next step needs {gib(then_taken - taken)} more on this rank, and {left} are left above reserve"
        link = rates.link_bytes_per_s or _measured(stats)
        if not rates.compute_ns or not link:
            missing = "what a layer computes (compute_ns)" if link else "compute_ns and link_bytes_per_s"
            return f"{step}; what it would gain is not known: give report() {missing}"
        now, then = (
            self.sizes.pass_ns(self.rank, turned, rates.compute_ns, link) / 1e6
            for turned in (self.turned, self.turned + 1)
        )
        return f"{step}; a pass would take {then:.3f} ms instead of {now:.3f}, by plan at {link / 1e9:.2f} GB/s"


def _measured(stats: Sequence[Stats]) -> int:
    """The link's rate in bytes per second, where the transport has told how long it was busy; else 0."""
    busy_ns = sum(each.link_busy_ns for each in stats)
    return sum(each.fetched_bytes for each in stats) * 10**9 // busy_ns if busy_ns else 0


def _told(group: Group, device: torch.device, found: Free, reserve: int | None) -> list[tuple[Free, int | None]]:
    record = {"pools": list(found.pools.items()), "cached": found.cached, "reserve": reserve}
    told = exchange(group, device, record, "shard(resident='auto')")
    return [(Free(dict(each["pools"]), each["cached"]), each["reserve"]) for each in told]


def _shares(told: Sequence[tuple[Free, int | None]], mapped: Sequence[int]) -> list[Share]:
    """Of each rank. Those that share a pool have equal parts of the least that any of them saw there."""
    users = Counter(name for found, _ in told for name in found.pools)
    least = {name: min(found.pools[name] for found, _ in told if name in found.pools) for name in users}
    shares = []
    for rank, (found, reserve) in enumerate(told):
        if not found.pools:
            raise Refused(f"resident='auto': rank {rank} cannot see how much memory is free: give resident in bytes")
        parts = {name: least[name] // users[name] for name in found.pools}
        parts = {name: part - (mapped[rank] if name.startswith(ADDRESSES) else 0) for name, part in parts.items()}
        name = min(parts, key=lambda each: parts[each])
        free = max(0, parts[name])
        left = (free + found.cached) // 10 if reserve is None else reserve
        shares.append(Share(free, name.split(":")[0], users[name], left, found.cached))
    return shares


def choose(group: Group, sizes: Sizes, reserve: int | None) -> Dial:
    """Collective. On transports in step all ranks keep the same layers, as many as the rank can that has the least; on
    others each rank as many as it can."""
    told = _told(group, sizes.device, free_memory(sizes.device, sizes.memory), reserve)
    ranks = range(group.size)
    mapped = [sizes.stored_elsewhere(rank) if kind_of(group) == "shm" else 0 for rank in ranks]
    shares = _shares(told, mapped)
    for rank, share in enumerate(shares):
        needed = sizes.needed(rank, 0)
        if needed > share.budget:
            raise Refused(
                f"resident='auto' on rank {rank}: its shards and windows need {gib(needed)}, and there are "
                f"{share.words}, of which reserve={share.reserve} leaves {gib(max(0, share.budget))}: give a smaller "
                f"reserve or prefetch, free memory, or shard over more ranks"
            )
    concerned = ranks if sizes.spreading.in_step else [group.rank]
    turned = {rank: sizes.most(rank, shares[rank].budget) for rank in concerned}
    least = min(turned, key=lambda rank: (turned[rank], rank != group.rank))
    return Dial(group.rank, shares[group.rank], sizes, turned[least], least)

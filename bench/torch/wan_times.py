# SPDX-License-Identifier: Apache-2.0
"""The own time of all-to-alls, with fetches under way beside them and without.

Knows variants, layershard's series and clocks; nothing of how a model is kept.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch_launch
import torch_table
import wan_alltoall
from wan_schemes import Scheme


def of_calls(everyones: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """For each all-to-all: the shortest time of any rank, its own, for the rank that begins last waits for nobody; and
    the longest, which has waiting for the last one in it."""
    return [min(call) for call in zip(*everyones)], [max(call) for call in zip(*everyones)]


def alltoall_row(name: str, samples: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """samples[i][rank][call], seconds."""
    owns, longests = zip(*(of_calls(everyones) for everyones in samples))
    flat = sorted(itertools.chain(*owns))
    return {
        "variant": name,
        "calls": len(owns[0]),
        "own_ns": {
            "median": 1e9 * statistics.median(flat),
            "p90": 1e9 * flat[len(flat) * 9 // 10],
            "pass": 1e9 * statistics.median(map(sum, owns)),
        },
        "with_waiting_ns": {"pass": 1e9 * statistics.median(map(sum, longests))},
    }


def in_passes(
    ranks: torch_launch.Ranks, alltoalls: wan_alltoall.AllToAlls, variants: Sequence[torch_table.Variant], rounds: int
) -> list[dict[str, Any]]:
    """Each variant's all-to-alls where they stand: in steady passes, in shuffled rounds."""
    samples: dict[str, list[Any]] = {variant.name: [] for variant in variants}
    order, draw = list(variants), random.Random(2)
    for number in range(rounds):
        ranks.note(f"all-to-alls in passes, round {number + 1} of {rounds}")
        draw.shuffle(order)
        for variant in order:
            ranks.barrier()
            variant.begin()
            variant.run()
            times = alltoalls.timed(variant.run)
            variant.rest()
            ranks.synchronize()
            samples[variant.name].append(ranks.gather(times))
    return [alltoall_row(name, each) for name, each in samples.items()]


def fetch_all(scheme: Scheme, stream: torch.cuda.Stream, passes: int) -> torch.cuda.Event:
    """Fetch every layer as often, with nothing computed from it: on its own stream, at the link's speed or the pace."""
    for _ in range(passes):
        for series in (shared.series for handle in scheme.handles for shared in handle.shared):
            for layer in series.layers:
                series.reach(layer, stream.cuda_stream)
                series.wait(layer, stream.cuda_stream)
    end = torch.cuda.Event()
    end.record(stream)
    return end


class Beside:
    """All-to-alls back to back, with nothing computed: beside a link at rest, or beside fetches without an end."""

    CALLS = 16
    PASSES = 4

    def __init__(self, ranks: torch_launch.Ranks, alltoalls: wan_alltoall.AllToAlls, width: int, tokens: int):
        self._ranks = ranks
        self._alltoalls = alltoalls
        self._group = torch.distributed.group.WORLD
        self._x = torch.randn(tokens // ranks.size, width, device=ranks.device, dtype=torch.bfloat16)
        self._stream = torch.cuda.Stream(ranks.device)

    @property
    def sent_bytes(self) -> int:
        """By a rank to all others in one call."""
        return self._x.nbytes * (self._ranks.size - 1) // self._ranks.size

    def sample(self, scheme: Scheme | None) -> tuple[list[float], bool]:
        """Times of the calls; whether fetches were still under way when the last one had ended."""
        still = False

        def calls() -> None:
            nonlocal still
            fetches = None if scheme is None else fetch_all(scheme, self._stream, self.PASSES)
            for _ in range(self.CALLS):
                self._alltoalls(self._x, self._group)
            done = torch.cuda.Event()
            done.record()
            done.synchronize()
            still = fetches is not None and not fetches.query()

        self._ranks.barrier()
        times = self._alltoalls.timed(calls)
        if scheme is not None:
            scheme.rest()
        self._ranks.synchronize()
        return times, still

    def run(self, schemes: Sequence[Scheme], rounds: int) -> list[dict[str, Any]]:
        cases: dict[str, Scheme | None] = {"nothing": None} | {
            scheme.name: scheme for scheme in schemes if scheme.moves
        }
        samples: dict[str, list[Any]] = {name: [] for name in cases}
        lasted = dict.fromkeys(cases, True)
        names, draw = list(cases), random.Random(3)
        for number in range(rounds + 1):  # the first one warms up
            self._ranks.note(f"all-to-alls by themselves, round {number} of {rounds}")
            draw.shuffle(names)
            for name in names:
                times, still = self.sample(cases[name])
                if number:
                    samples[name].append(self._ranks.gather(times))
                    lasted[name] &= all(self._ranks.gather(still))
        return [self._row(name, samples[name], lasted[name]) for name in cases]

    def _row(self, name: str, samples: Sequence[Any], lasted: bool) -> dict[str, Any]:
        row = alltoall_row(name, samples)
        row["gigabytes_per_s"] = self.sent_bytes / row["own_ns"]["median"]
        row["fetches_lasted"] = None if name == "nothing" else lasted
        return row

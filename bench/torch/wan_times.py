# SPDX-License-Identifier: Apache-2.0
"""The own time of all-to-alls, with pulls under way beside them and without.

Knows arms, layershard's series and clocks; nothing of how a model is kept.
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
from wan_ways import Way


def of_calls(ranks: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """For each all-to-all: the shortest time of any rank, its own, for the rank that comes last waits for nobody; and
    the longest, which has waiting for the last one in it."""
    return [min(call) for call in zip(*ranks)], [max(call) for call in zip(*ranks)]


def alltoall_row(name: str, samples: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """samples[i][rank][call], seconds."""
    owns, longests = zip(*(of_calls(ranks) for ranks in samples))
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
    meeting: torch_launch.Meeting, alltoalls: wan_alltoall.AllToAlls, arms: Sequence[torch_table.Arm], rounds: int
) -> list[dict[str, Any]]:
    """Each arm's all-to-alls where they stand: in steady passes, in shuffled rounds."""
    samples: dict[str, list[Any]] = {arm.name: [] for arm in arms}
    order, draw = list(arms), random.Random(2)
    for number in range(rounds):
        meeting.note(f"all-to-alls in passes, round {number + 1} of {rounds}")
        draw.shuffle(order)
        for arm in order:
            meeting.meet()
            arm.begin()
            arm.run()
            times = alltoalls.timed(arm.run)
            arm.rest()
            meeting.synchronize()
            samples[arm.name].append(meeting.gather(times))
    return [alltoall_row(name, each) for name, each in samples.items()]


def pull_all(way: Way, stream: torch.cuda.Stream, passes: int) -> torch.cuda.Event:
    """Bring every layer as often, with nothing computed from it: on its own stream, at the link's speed or the pace."""
    for _ in range(passes):
        for series in (shared.series for handle in way.handles for shared in handle.shared):
            for layer in series.layers:
                series.reach(layer, stream.cuda_stream)
                series.wait(layer, stream.cuda_stream)
    end = torch.cuda.Event()
    end.record(stream)
    return end


class Beside:
    """All-to-alls back to back, with nothing computed: beside a link at rest, or beside pulls without an end."""

    CALLS = 16
    PASSES = 4

    def __init__(self, meeting: torch_launch.Meeting, alltoalls: wan_alltoall.AllToAlls, width: int, tokens: int):
        self._meeting = meeting
        self._alltoalls = alltoalls
        self._group = torch.distributed.group.WORLD
        self._x = torch.randn(tokens // meeting.size, width, device=meeting.device, dtype=torch.bfloat16)
        self._stream = torch.cuda.Stream(meeting.device)

    @property
    def sent_bytes(self) -> int:
        """By a rank to all others in one call."""
        return self._x.nbytes * (self._meeting.size - 1) // self._meeting.size

    def sample(self, way: Way | None) -> tuple[list[float], bool]:
        """Times of the calls; whether pulls were still under way when the last one had ended."""
        still = False

        def calls() -> None:
            nonlocal still
            pulls = None if way is None else pull_all(way, self._stream, self.PASSES)
            for _ in range(self.CALLS):
                self._alltoalls(self._x, self._group)
            done = torch.cuda.Event()
            done.record()
            done.synchronize()
            still = pulls is not None and not pulls.query()

        self._meeting.meet()
        times = self._alltoalls.timed(calls)
        if way is not None:
            way.rest()
        self._meeting.synchronize()
        return times, still

    def run(self, ways: Sequence[Way], rounds: int) -> list[dict[str, Any]]:
        cases: dict[str, Way | None] = {"nothing": None} | {way.name: way for way in ways if way.moves}
        samples: dict[str, list[Any]] = {name: [] for name in cases}
        lasted = dict.fromkeys(cases, True)
        names, draw = list(cases), random.Random(3)
        for number in range(rounds + 1):  # the first one warms up
            self._meeting.note(f"all-to-alls by themselves, round {number} of {rounds}")
            draw.shuffle(names)
            for name in names:
                times, still = self.sample(cases[name])
                if number:
                    samples[name].append(self._meeting.gather(times))
                    lasted[name] &= all(self._meeting.gather(still))
        return [self._row(name, samples[name], lasted[name]) for name in cases]

    def _row(self, name: str, samples: Sequence[Any], lasted: bool) -> dict[str, Any]:
        row = alltoall_row(name, samples)
        row["gigabytes_per_s"] = self.sent_bytes / row["own_ns"]["median"]
        row["fetches_lasted"] = None if name == "nothing" else lasted
        return row

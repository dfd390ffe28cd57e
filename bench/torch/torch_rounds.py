# SPDX-License-Identifier: Apache-2.0
"""Ways to run the same passes, compared in shuffled rounds.

An arm is a function that enqueues one pass and returns its output. Every round runs each arm once in a new order, but
for the control arm, which comes first and last: what lies half way between the two is what the round had without
sharding, and how far they are apart over all rounds says whether the run means anything. A sample is several passes in
a row, so that what is fetched ahead for the next pass is neither free nor paid twice, and it follows warm passes of the
same arm: a GPU at its power cap needs a while to find its clock. All ranks walk through the same arms in the same order
and meet before each sample; the slowest rank counts, of those whose times an arm counts. Outputs of the first and the
last round are compared with the baseline's. Apart from the rounds: clocks and power, and how long the host takes to
enqueue a pass.

    meeting = torch_launch.join(devices)                       # ranks of torchrun, or of torch_launch.launch
    rounds = torch_rounds.Rounds(meeting, passes=4, rounds=31, warm_ms=200)
    table = rounds.run([Arm("replicated", model), Arm("layershard", sharded, rest=handle.prepare)])
    torch_save.save(path, meeting, {"tables": [table.as_json()]})

Knows torch and clocks; nothing of models or of layershard.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch_launch import Meeting
from torch_meter import Meter, mean_of
from torch_table import Arm, Table, nothing


class WrongBits(Exception):
    """An arm computed something else than its baseline."""


class Rounds:
    """Runs arms. All ranks make the same one and give it the same arms."""

    METER_S = 1.0
    HOST_PASSES = 5
    MOST_WARM = 1000

    def __init__(
        self,
        meeting: Meeting,
        *,
        passes: int = 4,
        rounds: int = 31,
        warm_ms: float = 200,
        margin_percent: float = 0.5,
        meter: bool = True,
        seed: int = 1,
    ) -> None:
        self._meeting = meeting
        self._passes = passes
        self._rounds = rounds
        self._warm_s = warm_ms / 1e3
        self._margin_percent = margin_percent
        self._meter = Meter(meeting.device) if meter else None
        self._seed = seed
        self._outputs: dict[str, torch.Tensor] = {}
        self._pass_s: dict[str, float] = {}

    # ---- One sample ----

    def _seconds(self, arm: Arm, passes: int) -> tuple[float, torch.Tensor | None]:
        """A pass's, by events on the stream of the compute where there is one; and the last output."""
        output = None
        if not self._meeting.on_gpus:
            begin = time.perf_counter()
            for _ in range(passes):
                output = arm.run()
            return (time.perf_counter() - begin) / passes, output
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        for _ in range(passes):
            output = arm.run()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / 1e3 / passes, output

    def _sample(self, arm: Arm, warm: int, passes: int) -> tuple[float, torch.Tensor | None]:
        self._meeting.meet()
        arm.begin()
        for _ in range(warm):
            arm.run()
        sample = self._seconds(arm, passes)
        arm.rest()
        self._meeting.synchronize()
        return sample

    def _passes_in(self, arm: Arm, seconds: float) -> int:
        return min(self.MOST_WARM, int(seconds / self._pass_s[arm.name]) + 1)

    # ---- Before the rounds ----

    def _try(self, arm: Arm) -> str | None:
        """Two warm passes and two timed: how long they take, what comes out. The reason if they cannot be run."""
        trouble, seconds, output = None, 0.0, None
        try:
            seconds, output = self._sample(arm, 2, 2)
            if output is not None:
                self._outputs[arm.name] = output.clone()
        except Exception as error:  # of whatever library the arm uses
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        trouble = self._meeting.agree(trouble)
        self._pass_s[arm.name] = max(self._meeting.gather(seconds)[arm.counted])
        return trouble

    def _try_all(self, table: Table) -> list[Arm]:
        good = []
        for arm in table.arms:
            self._meeting.note(f"trying {arm.name}")
            trouble = self._try(arm)
            if trouble is None and (arm.baseline or table.control) not in self._outputs:
                trouble = f"{arm.baseline or table.control} has no output to compare with"
            if trouble is None:
                good.append(arm)
                continue
            if arm is table.arms[0]:
                raise RuntimeError(f"{arm.name}, which everything is compared with, cannot be run: {trouble}")
            table.not_run[arm.name] = trouble
        for arm in good:
            self._compare(table, arm, self._outputs.get(arm.name))
            if arm.name not in {arm.baseline or table.control for arm in good}:
                self._outputs.pop(arm.name, None)
        return good

    def _differ(self, table: Table, arm: Arm, output: torch.Tensor) -> str | None:
        reference = self._outputs[arm.baseline or table.control]
        if arm.name == table.control and not _tells_apart(reference):
            return f"what {arm.name} computes is not finite or mostly zero: outputs cannot be compared"
        equal = torch.equal(output, reference)
        table.equal[arm.name] = equal and table.equal.get(arm.name, True)
        if equal:
            return None
        far = float((output.float() - reference.float()).norm() / reference.float().norm())
        if arm.check == "close" and far <= arm.tolerance:
            return None
        allowed = "not a bit" if arm.check == "bits" else f"{arm.tolerance:.2g} of its size"
        return f"{arm.name} is off {arm.baseline or table.control} by {far:.3g} of its size; allowed is {allowed}"

    def _compare(self, table: Table, arm: Arm, output: torch.Tensor | None) -> None:
        trouble = None if arm.check == "none" or output is None else self._differ(table, arm, output)
        if trouble is not None:
            trouble = f"rank {self._meeting.rank}: {trouble}"
        trouble = self._meeting.agree(trouble)
        if trouble is not None:
            raise WrongBits(trouble)
        equal = [each for each in self._meeting.gather(table.equal.get(arm.name)) if each is not None]
        if equal:
            table.equal[arm.name] = all(equal)

    # ---- The rounds ----

    def _timed(self, table: Table, arm: Arm, number: int) -> float:
        seconds, output = self._sample(arm, self._passes_in(arm, self._warm_s), self._passes)
        if number in (0, self._rounds - 1):
            self._compare(table, arm, output)
        return seconds

    def _run_rounds(self, table: Table, control: Arm, others: list[Arm], what: str) -> None:
        draw = random.Random(self._seed)
        for number in range(self._rounds):
            self._meeting.note(f"{what}round {number + 1} of {self._rounds}")
            draw.shuffle(others)
            order = [control, *others, control]
            everyones = list(zip(*self._meeting.gather([self._timed(table, arm, number) for arm in order])))
            table.again.append(max(everyones.pop()))
            for arm, times in zip(order, everyones):
                table.times[arm.name].append(max(times[arm.counted]))
                self._note_others(table, arm, times)

    def _note_others(self, table: Table, arm: Arm, times: Sequence[float]) -> None:
        counted = range(len(times))[arm.counted]
        if len(counted) < len(times):
            slowest = max(seconds for rank, seconds in enumerate(times) if rank not in counted)
            table.others.setdefault(arm.name, []).append(slowest)

    def _read_hosts(self, table: Table, arms: list[Arm]) -> None:
        """How long the host takes for a pass that finds the device idle; of a processor, the pass itself."""
        for arm in arms:
            taken = []
            self._meeting.meet()
            arm.begin()
            for _ in range(self.HOST_PASSES):
                self._meeting.synchronize()
                begin = time.perf_counter()
                arm.run()
                taken.append(time.perf_counter() - begin)
            arm.rest()
            self._meeting.synchronize()
            host_s = max(self._meeting.gather(statistics.median(taken))[arm.counted])
            table.metered[arm.name] = {"host_ns": 1e9 * host_s}

    def _read_meters(self, table: Table, arms: list[Arm]) -> None:
        """Apart from the rounds: what asks a driver every few milliseconds makes the program's launches wait for it."""
        for arm in arms:
            reading: dict[str, Any] = {}
            self._meeting.meet()
            arm.begin()
            for _ in range(self._passes_in(arm, self._warm_s)):
                arm.run()
            self._meeting.synchronize()
            with self._meter.reading(reading):  # type: ignore[union-attr]
                self._seconds(arm, self._passes_in(arm, self.METER_S))
            arm.rest()
            self._meeting.synchronize()
            table.metered[arm.name] |= mean_of(self._meeting.gather(reading)[arm.counted])

    def run(self, arms: Sequence[Arm], what: str = "") -> Table:
        """@arms[0] is the control arm. An arm that raises when tried is left out, with its reason in the table; one
        whose output is wrong ends the run (WrongBits, on all ranks). @what comes before the notes of progress."""
        table = Table(arms, self._margin_percent)
        self._outputs.clear()
        good = self._try_all(table)
        self._run_rounds(table, good[0], good[1:], what)
        self._read_hosts(table, good)
        if self._meter is not None and self._meeting.on_gpus:
            self._read_meters(table, good)
        self._outputs.clear()
        # A table outlives what its arms hold: captured graphs, inputs.
        table.arms = [dataclasses.replace(arm, run=nothing, begin=nothing, rest=nothing) for arm in table.arms]
        return table


def _tells_apart(output: torch.Tensor) -> bool:
    """Of numbers that are all zero or not finite wrong weights would make the same ones."""
    return bool(torch.isfinite(output).all()) and int((output == 0).sum()) < output.numel() / 2

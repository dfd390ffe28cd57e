# SPDX-License-Identifier: Apache-2.0
"""Variants of the same passes, compared in shuffled rounds.

A variant is a function that enqueues one pass and returns its output. Every round runs each variant once in a new
order, but for the control variant, which is first and last: what lies half way between the two is what the round had
without sharding, and how far they are apart over all rounds says whether the run means anything. A sample is several
passes in a row, so that what is fetched ahead for the next pass is neither free nor paid twice, and it follows warm
passes of the same variant: a GPU at its power cap needs a while to find its clock. All ranks go through the same
variants in the same order, with a barrier before each sample; the slowest rank counts, of those whose times a variant
counts. Outputs of the first and the last round are compared with the baseline's. Rounds may end early, so that the
table is there in time. Apart from the rounds: clocks and
power, and how long the host takes to enqueue a pass.

    ranks = torch_launch.join(devices)                       # ranks of torchrun, or of torch_launch.launch
    rounds = torch_rounds.Rounds(ranks, passes=4, rounds=31, warm_ms=200)
    table = rounds.run([Variant("replicated", model), Variant("layershard", sharded, rest=handle.prepare)])
    torch_save.save(path, ranks, {"tables": [table.as_json()]})

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
from torch_launch import Ranks
from torch_meter import Meter, mean_of
from torch_table import Table, Variant, nothing


class WrongBits(Exception):
    """A variant computed something else than its baseline."""


class Rounds:
    """Runs variants. All ranks make the same one and give it the same variants."""

    METER_S = 1.0
    HOST_PASSES = 5
    TRIED_PASSES = 2
    MOST_WARM = 1000
    LEAST_ROUNDS = 3

    def __init__(
        self,
        ranks: Ranks,
        *,
        passes: int = 4,
        rounds: int = 31,
        warm_ms: float = 200,
        margin_percent: float = 0.5,
        meter: bool = True,
        seed: int = 1,
        minutes: float | None = None,
    ) -> None:
        """@minutes from now on: when the next table is to be there."""
        self._ranks = ranks
        self._passes = passes
        self._rounds = rounds
        self._warm_s = warm_ms / 1e3
        self._margin_percent = margin_percent
        self._meter = Meter(ranks.device) if meter else None
        self._seed = seed
        self._end_s = None if minutes is None else time.monotonic() + 60 * minutes
        self._outputs: dict[str, torch.Tensor] = {}
        self._pass_s: dict[str, float] = {}

    # ---- One sample ----

    def _seconds(self, variant: Variant, passes: int) -> tuple[float, torch.Tensor | None]:
        """A pass's, by events on the stream of the compute where there is one; and the last output."""
        output = None
        if not self._ranks.on_gpus:
            begin = time.perf_counter()
            for _ in range(passes):
                output = variant.run()
            return (time.perf_counter() - begin) / passes, output
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        for _ in range(passes):
            output = variant.run()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / 1e3 / passes, output

    def _sample(self, variant: Variant, warm: int, passes: int) -> tuple[float, torch.Tensor | None]:
        self._ranks.barrier()
        variant.begin()
        for _ in range(warm):
            variant.run()
        sample = self._seconds(variant, passes)
        variant.rest()
        self._ranks.synchronize()
        return sample

    def _passes_in(self, variant: Variant, seconds: float) -> int:
        return min(self.MOST_WARM, int(seconds / self._pass_s[variant.name]) + 1)

    # ---- Before the rounds ----

    def _try(self, variant: Variant) -> str | None:
        """Some warm passes, as many timed: how long they take, what comes out. The reason if they cannot be run."""
        trouble, seconds, output = None, 0.0, None
        try:
            seconds, output = self._sample(variant, self.TRIED_PASSES, self.TRIED_PASSES)
            if output is not None:
                self._outputs[variant.name] = output.clone()
        except Exception as error:  # of whatever library the variant uses
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        trouble = self._ranks.agree(trouble)
        self._pass_s[variant.name] = max(self._ranks.gather(seconds)[variant.counted])
        return trouble

    def _try_all(self, table: Table) -> list[Variant]:
        good = []
        for variant in table.variants:
            self._ranks.note(f"trying {variant.name}")
            trouble = self._try(variant)
            if trouble is None and (variant.baseline or table.control) not in self._outputs:
                trouble = f"{variant.baseline or table.control} has no output to compare with"
            if trouble is None:
                good.append(variant)
                continue
            if variant is table.variants[0]:
                raise RuntimeError(f"{variant.name}, which everything is compared with, cannot be run: {trouble}")
            table.not_run[variant.name] = trouble
        for variant in good:
            self._compare(table, variant, self._outputs.get(variant.name))
            if variant.name not in {variant.baseline or table.control for variant in good}:
                self._outputs.pop(variant.name, None)
        return good

    def _differ(self, table: Table, variant: Variant, output: torch.Tensor) -> str | None:
        reference = self._outputs[variant.baseline or table.control]
        if variant.name == table.control and not _tells_apart(reference):
            return f"what {variant.name} computes is not finite or mostly zero: outputs cannot be compared"
        equal = torch.equal(output, reference)
        table.equal[variant.name] = equal and table.equal.get(variant.name, True)
        if equal:
            return None
        far = float((output.float() - reference.float()).norm() / reference.float().norm())
        if variant.check == "close" and far <= variant.tolerance:
            return None
        allowed = "nothing" if variant.check == "bits" else f"{variant.tolerance:.2g}"
        baseline = variant.baseline or table.control
        return f"{variant.name} differs from {baseline} by {far:.3g} of its norm; {allowed} is allowed"

    def _compare(self, table: Table, variant: Variant, output: torch.Tensor | None) -> None:
        trouble = None if variant.check == "none" or output is None else self._differ(table, variant, output)
        if trouble is not None:
            trouble = f"rank {self._ranks.rank}: {trouble}"
        trouble = self._ranks.agree(trouble)
        if trouble is not None:
            raise WrongBits(trouble)
        equal = [each for each in self._ranks.gather(table.equal.get(variant.name)) if each is not None]
        if equal:
            table.equal[variant.name] = all(equal)

    # ---- The rounds ----

    def _is_last(self, number: int, took_s: float, apart_s: float) -> bool:
        """Whether no further round would end in time, by what the one before took. The same on all ranks."""
        if number + 1 >= self._rounds or self._end_s is None:
            return number + 1 >= self._rounds
        is_late = time.monotonic() + 2 * took_s + apart_s > self._end_s
        return number + 1 >= self.LEAST_ROUNDS and bool(self._ranks.first(is_late))

    def _apart_s(self, variants: Sequence[Variant]) -> float:
        """About what is read apart from the rounds takes."""
        metered_s = self._warm_s + self.METER_S if self._meter is not None and self._ranks.on_gpus else 0.0
        passes = self.HOST_PASSES + 2
        return sum(passes * self._pass_s[variant.name] + metered_s for variant in variants)

    def _timed(self, table: Table, variant: Variant, compares: bool) -> float:
        seconds, output = self._sample(variant, self._passes_in(variant, self._warm_s), self._passes)
        if compares:
            self._compare(table, variant, output)
        return seconds

    def _run_rounds(self, table: Table, control: Variant, others: list[Variant], what: str) -> None:
        draw = random.Random(self._seed)
        apart_s, took_s = self._apart_s([control, *others]), 0.0
        for number in range(self._rounds):
            is_last, began_s = self._is_last(number, took_s, apart_s), time.monotonic()
            self._ranks.note(f"{what}round {number + 1} of {self._rounds}")
            draw.shuffle(others)
            order, compares = [control, *others, control], is_last or number == 0
            everyones = list(zip(*self._ranks.gather([self._timed(table, variant, compares) for variant in order])))
            table.again.append(max(everyones.pop()))
            for variant, times in zip(order, everyones):
                table.times[variant.name].append(max(times[variant.counted]))
                self._note_others(table, variant, times)
            took_s = time.monotonic() - began_s
            if is_last:
                break

    def _note_others(self, table: Table, variant: Variant, times: Sequence[float]) -> None:
        counted = range(len(times))[variant.counted]
        if len(counted) < len(times):
            slowest = max(seconds for rank, seconds in enumerate(times) if rank not in counted)
            table.others.setdefault(variant.name, []).append(slowest)

    def _read_hosts(self, table: Table, variants: list[Variant]) -> None:
        """How long the host takes for a pass that finds the device idle; of a processor, the pass itself."""
        for variant in variants:
            taken = []
            self._ranks.barrier()
            variant.begin()
            for _ in range(self.HOST_PASSES):
                self._ranks.synchronize()
                begin = time.perf_counter()
                variant.run()
                taken.append(time.perf_counter() - begin)
            variant.rest()
            self._ranks.synchronize()
            host_s = max(self._ranks.gather(statistics.median(taken))[variant.counted])
            table.metered[variant.name] = {"host_ns": 1e9 * host_s}

    def _read_meters(self, table: Table, variants: list[Variant]) -> None:
        """Apart from the rounds: what asks a driver every few milliseconds makes the program's launches wait for it."""
        for variant in variants:
            reading: dict[str, Any] = {}
            self._ranks.barrier()
            variant.begin()
            for _ in range(self._passes_in(variant, self._warm_s)):
                variant.run()
            self._ranks.synchronize()
            with self._meter.reading(reading):  # type: ignore[union-attr]
                self._seconds(variant, self._passes_in(variant, self.METER_S))
            variant.rest()
            self._ranks.synchronize()
            table.metered[variant.name] |= mean_of(self._ranks.gather(reading)[variant.counted])

    def run(self, variants: Sequence[Variant], what: str = "") -> Table:
        """@variants[0] is the control variant. A variant that raises when tried is left out, with its reason in the
        table; one whose output is wrong ends the run (WrongBits, on all ranks). @what begins the notes of progress."""
        table = Table(variants, self._margin_percent)
        self._outputs.clear()
        good = self._try_all(table)
        self._run_rounds(table, good[0], good[1:], what)
        self._read_hosts(table, good)
        if self._meter is not None and self._ranks.on_gpus:
            self._read_meters(table, good)
        self._outputs.clear()
        # A table outlives what its variants hold: captured graphs, inputs.
        table.variants = [
            dataclasses.replace(variant, run=nothing, begin=nothing, rest=nothing) for variant in table.variants
        ]
        return table


class LongRounds(Rounds):
    """Of passes that take seconds."""

    HOST_PASSES = TRIED_PASSES = 1


def _tells_apart(output: torch.Tensor) -> bool:
    """Of numbers that are all zero or not finite wrong weights would make the same ones."""
    return bool(torch.isfinite(output).all()) and int((output == 0).sum()) < output.numel() / 2

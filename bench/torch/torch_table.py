# SPDX-License-Identifier: Apache-2.0
"""What is compared, and what its rounds gave: a variant, ratios near one with their intervals, tables as text and JSON.

Knows statistics; nothing of how a sample is taken.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch


def nothing() -> None:
    pass


@dataclasses.dataclass
class Variant:
    """One way to run passes.

    run       enqueues one pass on the current stream, returns the output (None: there is nothing to compare)
    begin     before the warm passes of each sample
    rest      after each sample: what is under way for a next pass, which is not made at once, must not run into the
              next variant's sample. The device is waited for after it
    baseline  the variant that ratio and output are compared with; None: the control variant. One that is not comparable
              in kind (graph to eager) names the replicated variant of the same mode
    check     "bits": equal, or the run fails. "close": within `tolerance` of the baseline by the norm of the
              difference; whether they are equal is noted. "none": not looked at
    details   goes into the row as it is: prefetch, windows, residents, ...
    counted   the ranks whose times are the variant's: others do something else, or nothing
    """

    name: str
    run: Callable[[], torch.Tensor | None]
    begin: Callable[[], None] = nothing
    rest: Callable[[], None] = nothing
    baseline: str | None = None
    check: str = "bits"
    tolerance: float = 0.02
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    counted: slice = dataclasses.field(default_factory=lambda: slice(None))


# ---- Statistics ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ratio:
    median: float
    low: float
    high: float


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """Their median with its 95 % interval, by the binomial distribution of how many lie below the median: that needs
    no shape of the rest."""
    values = sorted(ratios)
    reach, middle = 1.96 * math.sqrt(len(values)) / 2, (len(values) - 1) / 2
    low, high = max(0, math.floor(middle - reach)), min(len(values) - 1, math.ceil(middle + reach))
    return Ratio(statistics.median(values), values[low], values[high])


class Table:
    """What the rounds of one setting gave: times[variant][round], seconds a pass, of the slowest rank."""

    def __init__(self, variants: Sequence[Variant], margin_percent: float) -> None:
        self.variants = list(variants)
        self.control = variants[0].name
        self.margin_percent = margin_percent
        self.times: dict[str, list[float]] = {variant.name: [] for variant in variants}
        self.again: list[float] = []
        self.others: dict[str, list[float]] = {}  # of the slowest rank that a variant does not count
        self.metered: dict[str, dict[str, Any]] = {}
        self.equal: dict[str, bool] = {}
        self.not_run: dict[str, str] = {}

    @property
    def drift_percent(self) -> float:
        return 100 * abs(statistics.median(self.again) / statistics.median(self.times[self.control]) - 1)

    @property
    def conclusive(self) -> bool:
        return self.drift_percent <= self.margin_percent

    def rounds_of(self, name: str) -> list[float]:
        """Of the control variant what lies half way between first and last."""
        if name != self.control:
            return self.times[name]
        return [(first + last) / 2 for first, last in zip(self.times[name], self.again)]

    def ratio(self, name: str, other: str) -> Ratio | None:
        """Median of the rounds' own ratios; None where one of the two was not run."""
        if not self.times.get(name) or not self.times.get(other):
            return None
        return ratio_of([mine / its for mine, its in zip(self.times[name], self.rounds_of(other))])

    def _row(self, variant: Variant, times: Sequence[float], again: bool) -> dict[str, Any]:
        baseline = variant.baseline or self.control
        ratio = ratio_of([mine / its for mine, its in zip(times, self.rounds_of(baseline))])
        row: dict[str, Any] = {"variant": variant.name, "again": again, "baseline": baseline}
        row["pass_ns"] = {
            "median": 1e9 * statistics.median(times),
            "min": 1e9 * min(times),
            "max": 1e9 * max(times),
        }
        row["ratio"] = dataclasses.asdict(ratio)
        row["bits_equal"] = self.equal.get(variant.name)
        if variant.name in self.others:
            row["others_ns"] = 1e9 * statistics.median(self.others[variant.name])
        row.update(dict.fromkeys(("host_ns", "sm_mhz", "watts", "throttled")))
        row.update({} if again else self.metered.get(variant.name, {}))
        row.update(variant.details)
        row["rounds_ns"] = [round(1e9 * each) for each in times]
        return row

    def rows(self) -> list[dict[str, Any]]:
        made = [
            self._row(variant, self.times[variant.name], False) for variant in self.variants if self.times[variant.name]
        ]
        return [made[0], self._row(self.variants[0], self.again, True), *made[1:]]

    def as_json(self, **more: Any) -> dict[str, Any]:
        """@more comes first: the setting's tokens and the like."""
        return more | {
            "control": self.control,
            "drift_percent": self.drift_percent,
            "conclusive": self.conclusive,
            "rows": self.rows(),
            "not_run": [{"variant": name, "reason": why} for name, why in self.not_run.items()],
        }

    def as_text(self) -> str:
        """For a person."""
        measured = "".join(f"{title:>8}" for title in ("host us", "SM MHz", "watts"))
        lines = [f"{'variant':<40}{'ms a pass':>11}{'ratio':>8}{'from':>8}{'to':>8} {measured}  bits"]
        for row in self.rows():
            name = row["variant"] + (", again" if row["again"] else "")
            numbers = f"{row['pass_ns']['median'] / 1e6:>11.3f}" + "".join(
                f"{row['ratio'][part]:>8.3f}" for part in ("median", "low", "high")
            )
            measured = (row["host_ns"] and row["host_ns"] / 1e3, row["sm_mhz"], row["watts"])
            meter = "".join(f"{'-' if value is None else f'{value:.0f}':>8}" for value in measured)
            bits = {None: "-", True: "equal", False: "close"}[row["bits_equal"]]
            lines.append(f"{name:<40}{numbers} {meter}  {bits}")
        drift = f"{self.control}: the last samples differ from the first by {self.drift_percent:.2f} %"
        if not self.conclusive:
            drift += f", more than {self.margin_percent} %: INCONCLUSIVE. Something else ran here, or clocks changed"
        lines.append(drift)
        lines += [f"not run: {name}: {why}" for name, why in self.not_run.items()]
        return "\n".join(lines)

# SPDX-License-Identifier: Apache-2.0
"""What e2e.py should show, in one table, and whether it did. Knows names of variants and ratios; nothing of how they
came about."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch_table import Table

AHEAD = ("layershard k=1", "layershard k=2")  # no residents
AT_BEST = (*AHEAD, *(f"{name}, graph" for name in AHEAD))
ONE = AHEAD[:1]


@dataclasses.dataclass(frozen=True)
class Target:
    """The fastest of @variants to the fastest of @others, at numbers of tokens from @least to @most: at most @limit."""

    variants: tuple[str, ...]
    others: tuple[str, ...]
    least: int
    most: float
    limit: float


TARGETS = (
    Target(ONE, ("replicated",), 1024, 2047, 1.065),
    Target(ONE, ("replicated",), 2048, 4095, 1.04),
    Target(ONE, ("replicated",), 4096, 8191, 1.032),
    Target(ONE, ("replicated",), 8192, math.inf, 1.027),
    Target(("layershard k=1, half resident",), ("replicated",), 512, 512, 1.05),
    *(Target((f"{name}, graph",), (name,), 1024, math.inf, 1.005) for name in AHEAD),
    Target(ONE, ("TP? overlapped",), 1024, math.inf, 1),
    *(Target(AT_BEST, (rival,), 1, math.inf, 1) for rival in ("FSDP2*", "broadcast", "peer copy")),
    Target(("layershard k=1, last rank late",), ONE, 16, math.inf, 1.005),
    Target(("two regimes parallel, graph",), ("TP?, graph",), 16, 16, 1.02),
    Target(("two regimes gathered",), ONE, 4096, 4096, 1.01),
)
MEMORY_OFF = 0.02  # of (1/n + windows) of the layers
WHOLE_FREE_BYTES = 70e9  # of each GPU, with 80 layers of 70B on two
WHOLE_SPEED = {"TP2": 1.06, "TP2 overlapped": 1.02}  # tokens a second to theirs, at least, with these layers
WHOLE_BYTES = 136e9  # of those layers
NOT_WHOLE = "not evaluated: it is about 80 layers of 70B"
NO_GPUS = "not evaluated: each rank needs a GPU of its own"
INCONCLUSIVE = "inconclusive: the control variant drifted"


def _fastest(table: Table, patterns: Sequence[str]) -> str | None:
    names = [name for name in table.times if table.times[name] and any(fnmatchcase(name, each) for each in patterns)]
    return min(names, key=lambda name: sorted(table.times[name])[len(table.times[name]) // 2], default=None)


def _row(what: str, limit: str, found: str, result: str, **more: Any) -> dict[str, Any]:
    return {"what": what, "limit": limit, "found": found, "result": result} | more


def _said(good: bool, conclusive: bool, own_gpus: bool) -> str:
    return NO_GPUS if not own_gpus else INCONCLUSIVE if not conclusive else "met" if good else "MISSED"


def evaluate_tables(
    tables: dict[int, Table], own_gpus: bool, targets: Sequence[Target] = TARGETS
) -> list[dict[str, Any]]:
    """@tables by tokens. A target whose tokens or variants were not run says so."""
    rows = []
    for target in targets:
        said = " or ".join(target.others)
        tokens = [count for count in tables if target.least <= count <= target.most]
        span = str(target.least) if target.most == target.least else f"from {target.least}"
        if not tokens:
            rows.append(_row(f"{target.variants[0]} : {said}, {span} tokens", f"{target.limit:.3f}", "-", "not run"))
        for count in tokens:
            variant, other = _fastest(tables[count], target.variants), _fastest(tables[count], target.others)
            what = f"{variant or target.variants[0]} : {other or said}, {count} tokens"
            ratio = tables[count].ratio(variant, other) if variant and other else None
            if ratio is None:
                rows.append(_row(what, f"{target.limit:.3f}", "-", "not run"))
                continue
            found = f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
            result = _said(ratio.median <= target.limit, tables[count].conclusive, own_gpus)
            rows.append(_row(what, f"{target.limit:.3f}", found, result, ratio=dataclasses.asdict(ratio)))
    return rows


def evaluate_memory(memories: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counted by the driver on each rank's device; the rank that is most off counts."""
    rows = []
    for each in memories:
        what = f"{each['variant']}: memory of the device to (1/n + {each['windows']} windows) of the layers"
        if each["driver_bytes"] is None:
            rows.append(_row(what, f"{1 + MEMORY_OFF:.2f}", "-", "not run"))
            continue
        share = each["driver_bytes"] / each["expected_bytes"]
        good = "met" if 0 < share <= 1 + MEMORY_OFF else "MISSED"  # 0: the driver did not see it
        found = f"{share:.3f} ({each['driver_bytes'] / 2**20:.0f} MiB of {each['layers_bytes'] / 2**20:.0f})"
        rows.append(_row(what, f"{1 + MEMORY_OFF:.2f}", found, good))
    return rows


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'target':<74}{'at most':>8}  {'found':<26}"]
    lines += [f"{row['what']:<74}{row['limit']:>8}  {row['found']:<26}  {row['result']}" for row in rows]
    return "\n".join(lines)

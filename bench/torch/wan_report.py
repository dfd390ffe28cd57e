# SPDX-License-Identifier: Apache-2.0
"""What wan.py prints for a person, and what it says of the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch_launch
import torch_table
from wan_schemes import CONTROL, Scheme

TARGET, PACED_TARGET = 1.01, 1.005
MEMORY_TARGET = 0.02


def memory_text(schemes: Sequence[Scheme]) -> str:
    titles = f"{'blocks whole':>13}{'wanted':>9}{'driver':>9}{'off':>8}{'of whole':>10}{'in a pass':>11}{'fetched':>8}"
    lines = [f"{'GB a rank':<28}{titles}"]
    for scheme in schemes:
        memory = scheme.memory
        taken, peak = memory.get("device_bytes"), memory.get("pass_bytes")
        numbers = ["-", "-", "-"]
        if taken is not None:
            blocks = taken - memory["outside_bytes"]
            numbers = [f"{blocks / 1e9:.2f}", f"{memory['off_wanted']:+.1%}", f"{memory['of_blocks']:.1%}"]
        lines.append(
            f"{scheme.name:<28}{memory['blocks_bytes'] / 1e9:>13.2f}{memory['wanted_bytes'] / 1e9:>9.2f}"
            f"{numbers[0]:>9}{numbers[1]:>8}{numbers[2]:>10}{'-' if peak is None else f'{peak / 1e9:.2f}':>11}"
            f"{memory['fetched_bytes'] / 1e9:>8.2f}"
        )
    lines.append("without what is outside the blocks; in a pass: by torch's allocator, above what was there before")
    lines += [
        f"{scheme.name}: NOTHING IS FETCHED, its windows hold all blocks of the other ranks: give more --layers"
        for scheme in schemes
        if scheme.memory["windows"] and not scheme.memory["fetched_bytes"]
    ]
    return "\n".join(lines)


def alltoall_text(rows: Sequence[dict[str, Any]], title: str) -> str:
    lines = [f"{title:<40}{'us a call':>11}{'p90':>9}{'ms a pass':>11}{'with waiting':>14}"]
    for row in rows:
        own = row["own_ns"]
        line = f"{row['variant']:<40}{own['median'] / 1e3:>11.1f}{own['p90'] / 1e3:>9.1f}{own['pass'] / 1e6:>11.3f}"
        line += f"{row['with_waiting_ns']['pass'] / 1e6:>14.3f}"
        if "gigabytes_per_s" in row:
            line += f"  {row['gigabytes_per_s']:.0f} GB/s"
            line += "  (fetches ended before)" if row["fetches_lasted"] is False else ""
        lines.append(line)
    return "\n".join(lines)


def evaluate(ranks: torch_launch.Ranks, table: torch_table.Table, schemes: Sequence[Scheme]) -> list[dict[str, Any]]:
    """The targets. They are about GPUs that each have a rank, and about a table that is conclusive."""
    found = []
    of_a_gpu_each = ranks.on_gpus and not ranks.shares_device
    for scheme in (scheme for scheme in schemes if scheme.kind == "layershard"):
        ratio = table.ratio(scheme.name, CONTROL)
        if ratio is not None:
            target = PACED_TARGET if "pace=" in scheme.details.get("transport", "") else TARGET
            row = _row(scheme, "to replicated", target, ratio.median)
            found.append(row if of_a_gpu_each and table.conclusive else row | {"result": None})
        off = scheme.memory.get("off_wanted")
        if off is not None:
            found.append(_row(scheme, "memory above 1/n and windows", MEMORY_TARGET, off))
    return found


def _row(scheme: Scheme, what: str, target: float, value: float) -> dict[str, Any]:
    result = "met" if value <= target else "MISSED"
    return {"variant": scheme.name, "what": what, "target": target, "value": value, "result": result}


def targets_text(found: Sequence[dict[str, Any]], ranks: torch_launch.Ranks) -> str:
    own_gpus = ranks.on_gpus and not ranks.shares_device
    why = "inconclusive" if own_gpus else "not evaluated: it is about a GPU for each rank"
    return "\n".join(
        f"{each['variant']}: {each['what']} {each['value']:.3f}, target at most {each['target']}: "
        f"{each['result'] or why}"
        for each in found
    )

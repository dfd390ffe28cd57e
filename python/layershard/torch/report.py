# SPDX-License-Identifier: Apache-2.0
"""A sharded model as a table for people. Knows statistics; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ..group import Group
from ..series import Stats
from .dial import Rates
from .shared import Shared

_HEAD = (*"series layers placement MiB stored windows resident saved".split(), "below k", "misses", "waited ms")


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f}"


def _poison_bytes(stats: Stats) -> int:
    """What is counted among the windows and lies beside them."""
    return max(0, stats.window_bytes - stats.layer_bytes * stats.windows)


def _poisoned(series: Sequence[Shared]) -> list[str]:
    """A line on what a run without poison would save in addition."""
    nbytes = sum(_poison_bytes(each.series.stats()) for each in series)
    told = (
        f"{_mib(nbytes)} MiB of the windows is room for poison, which layershard.torch.check or LAYERSHARD_POISON "
        f"took: without them so much more is saved"
    )
    return [told] if nbytes else []


def _copied(series: Sequence[Shared]) -> list[str]:
    """A line on copies for this NUMA node, which are not among the columns."""
    nbytes = sum(each.series.stats().numa_copy_bytes for each in series)
    return [f"{_mib(nbytes)} MiB are copies, kept here for the ranks of this NUMA node"] if nbytes else []


def wasted(group: Group, series: Sequence[Shared]) -> list[str]:
    """A line on the first series that takes as much of this rank's memory as if it were not shared, or more, and how
    many others do: by what has to be there, without the resident layers that were asked for, and poison."""
    lines = []
    for each in series if group.size > 1 else []:
        stats, n_layers = each.series.stats(), len(each.plan.places)
        whole, windows = stats.layer_bytes * n_layers, stats.window_bytes - _poison_bytes(stats)
        if whole <= stats.shard_bytes + windows:
            lines.append(
                f"sharing {each.plan.name} saves nothing on rank {group.rank}: its {n_layers} layers are "
                f"{_mib(whole)} MiB, this rank's shard {_mib(stats.shard_bytes)} MiB and {stats.windows} windows "
                f"{_mib(windows)} MiB. Choose more layers or a smaller prefetch, or leave it out of the patterns"
            )
    others = f"; and so do {len(lines) - 1} series more" if len(lines) > 1 else ""
    return [line + others for line in lines[:1]]


def _row(shared: Shared) -> list[str]:
    stats = shared.series.stats()
    whole = stats.layer_bytes * len(shared.plan.places)
    held = stats.shard_bytes + stats.window_bytes + stats.resident_bytes + stats.numa_copy_bytes
    return [
        shared.plan.name,
        shared.plan.numbers_text,
        shared.placement,
        _mib(whole),
        _mib(stats.shard_bytes),
        f"{stats.windows} ({_mib(stats.window_bytes)})",
        f"{stats.residents} ({_mib(stats.resident_bytes)})",
        _mib(whole - held),
        str(stats.below_k_count),
        str(stats.misses),
        f"{stats.blocked_ns / 1e6:.1f}",
    ]


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _dials(series: Sequence[Shared], rates: Rates) -> list[str]:
    """Of each call that was to choose the residents."""
    dials = {id(each.dial): each.dial for each in series if each.dial is not None}
    return [
        line
        for dial in dials.values()
        for line in dial.lines([each.series for each in series if each.dial is dial], rates)
    ]


def table(series: Sequence[Shared], rates: Rates) -> str:
    """One line per series; sizes in MiB on this rank. A table for each group that series are of."""
    groups = dict.fromkeys(each.group for each in series)
    return "\n".join(_table(group, [each for each in series if each.group is group], rates) for group in groups)


def _table(group: Group, series: Sequence[Shared], rates: Rates) -> str:
    title = f"rank {group.rank} of {group.size}, transport {group.transport}"
    if not any(each.moves for each in series):
        title += "; every layer is read where it lies: nothing moves, no hook is called"
    below = [*_dials(series, rates), *_poisoned(series), *_copied(series), *wasted(group, series)]
    return "\n".join([title, _align([_HEAD, *map(_row, series)]), *below])

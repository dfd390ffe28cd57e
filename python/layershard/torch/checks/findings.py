# SPDX-License-Identifier: Apache-2.0
"""What all ranks' records of one check mean, as sentences.

Knows the records; nothing of how a rank came by its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Records = list[dict[str, Any]]  # of all ranks, in their order


def causes_first(records: Records) -> list[tuple[int, dict[str, Any]]]:
    """In rank order, but for ranks that failed since others did."""
    return sorted(enumerate(records), key=lambda each: bool(each[1].get("follows")))


def poisoned_layers(records: Records) -> list[int]:
    """Of each series, a bit for each layer that is fetched into a window of some rank."""
    found = [0] * len(records[0]["seen"])
    for record in records:
        found = [mask | int(more, 16) for mask, more in zip(found, record["seen"], strict=True)]
    return found


def read_early(records: Records) -> Iterator[str]:
    """Found on any rank, also where the layer is stored: it is wrong where it is fetched into a window."""
    reads = {tuple(each) for record in records for each in record.get("reads", [])}
    masks = poisoned_layers(records) if reads else []
    for series, index, name, where in sorted(reads):
        if masks[series] >> index & 1:
            yield f"{name} is read outside its view, in {where}"


def findings(record: dict[str, Any], again: dict[str, Any]) -> Iterator[str]:
    """One rank's. @again: its record of a second pass with poison."""
    differs = record.get("differs")
    if record.get("elsewhere"):
        yield (
            f"the call runs {record['elsewhere']} in another thread, where torch's operators cannot be seen: give "
            f"check what that thread calls"
        )
    for name in record["written"]:
        yield f"{name} is written by the call: what is stored of it is not what it was before"
    if differs is None:
        return
    raised = f" ({record['raised']})" if record["raised"] else ""
    if again.get("differs") is None:
        yield (
            f"weights are read outside their view: with poison in the windows {differs} is the first to give another "
            f"result{raised}. It reads a module's weights without calling that module, or at another time: choose its "
            f"parent, or scope='block'"
        )
        return
    yield (
        f"the call does not give the same bits twice, so check can find nothing: with poison in the windows {differs} "
        f"is the first to give another result than without{raised}, and {again['differs']} differs between two such "
        f"calls. Random numbers, a kernel that is not deterministic or state outside of arguments, buffers and "
        f"attributes may be why"
    )
    for name in again["wrote"]:
        yield f"{name}, which is not shared, is written by the call and not put back, which may be why"

# SPDX-License-Identifier: Apache-2.0
"""What all ranks' words of one check come to, as sentences.

Knows the words; nothing of how a rank came by its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Words = list[dict[str, Any]]  # of all ranks, in their order


def causes_first(words: Words) -> list[tuple[int, dict[str, Any]]]:
    """In rank order, but for ranks that failed since others did."""
    return sorted(enumerate(words), key=lambda each: bool(each[1].get("follows")))


def poisoned_layers(words: Words) -> list[int]:
    """Of each series, a bit for each layer that comes through a window of some rank."""
    found = [0] * len(words[0]["seen"])
    for word in words:
        found = [mask | int(more, 16) for mask, more in zip(found, word["seen"], strict=True)]
    return found


def read_early(words: Words) -> Iterator[str]:
    """Found on any rank, also where the layer is at home: it is wrong where it comes through a window."""
    reads = {tuple(each) for word in words for each in word.get("reads", [])}
    masks = poisoned_layers(words) if reads else []
    for series, index, name, where in sorted(reads):
        if masks[series] >> index & 1:
            yield f"{name} is read outside its view, in {where}"


def findings(word: dict[str, Any], again: dict[str, Any]) -> Iterator[str]:
    if word.get("elsewhere"):
        yield (
            f"the call runs {word['elsewhere']} in another thread, where torch's operators cannot be seen: check what "
            f"that thread calls"
        )
    for name in word["written"]:
        yield f"{name} is written by the call: what is stored of it is not what it was before"
    if word.get("differs") is None:
        return
    raised = f" ({word['raised']})" if word["raised"] else ""
    if again.get("differs") is None:
        yield (
            f"weights are read outside their view: with poison in the windows {word['differs']} is the first to come "
            f"out otherwise{raised}. It reads a module's weights without calling that module, or at another time: "
            f"choose its parent, or scope='block'"
        )
        return
    yield (
        f"the call does not give the same bits twice, so nothing can be told: with poison in the windows "
        f"{word['differs']} is the first to come out otherwise than as it is{raised}, and {again['differs']} from one "
        f"such call to the next. Its random numbers, a kernel that is not deterministic or state outside of arguments, "
        f"buffers and attributes may be why"
    )
    for name in again["wrote"]:
        yield f"{name}, which is not shared, is written by the call and not put back, which may be why"

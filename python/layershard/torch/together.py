# SPDX-License-Identifier: Apache-2.0
"""A step that all ranks of a sharded model make: it succeeds on all of them, or is an exception with its reason on all.

Knows a group; nothing of what the step does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..errors import Aborted, CallbackFailed, Error, Mismatch, PeerFailed, Timeout
from ..group import Group
from .exchange import exchange

Result = TypeVar("Result")


def _nothing(_result: Any) -> str:
    return ""


def together(
    group: Group, device: torch.device, step: Callable[[], Result], says: Callable[[Result], str] = _nothing
) -> Result:
    """What @step returns: collective. What it @says must be the same on all ranks. Where the ranks have waited for each
    other in vain already they are not asked."""
    failure: BaseException | None = None
    text = ""
    try:
        result = step()
        text = says(result)
    except (Aborted, PeerFailed, Timeout):
        raise
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    try:
        told = exchange(group, device, {"failed": _words(failure), "says": text})
    except Error:
        if failure is not None:
            raise failure from failure.__cause__  # what went wrong first is what the caller must see
        raise
    _raise_any(group.rank, told, failure)
    return result


def _words(failure: BaseException | None) -> str:
    """What failed here. The library's own word for what failed elsewhere is none."""
    if isinstance(failure, CallbackFailed):
        failure = failure.__cause__
    return "" if failure is None else f"{type(failure).__name__}: {failure}"


def _raise_any(rank: int, told: list[dict[str, Any]], failure: BaseException | None) -> None:
    failed = [f"rank {other}: {each['failed']}" for other, each in enumerate(told) if each["failed"]]
    if failure is not None and (told[rank]["failed"] or not failed):
        raise failure from failure.__cause__
    if failed:
        raise CallbackFailed(f"it failed on {len(failed)} of {len(told)} ranks. {failed[0]}", rank=rank) from failure
    for other, each in enumerate(told):
        if each["says"] != told[0]["says"]:
            raise Mismatch(f"rank 0 has {told[0]['says']}, rank {other} {each['says']}", rank=rank)

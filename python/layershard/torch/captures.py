# SPDX-License-Identifier: Apache-2.0
"""Captures of CUDA graphs that would end without join: copies that began in them would lead back to nobody's stream.
CUDA refuses such a graph, and names neither layers nor a cure. They are found where torch ends a capture, whoever began
it.

Knows torch's captures, the counters of series and turns; nothing of modules.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..errors import Error
from ..series import Series
from .one_thread import Turn
from .refusals import Refused

_UNJOINED = (
    "a CUDA graph was captured, and layers of {names} that were fetched in it are not joined: call "
    "layershard.torch.of(model).prepare() before the capture and before each replay, and "
    "layershard.torch.of(model).join() as the last thing in what is captured. torch.compile(mode='reduce-overhead') "
    "makes graphs without either. This graph is not to be replayed"
)

_watched: weakref.WeakKeyDictionary[Series, weakref.WeakSet[Turn]] = weakref.WeakKeyDictionary()
_before: weakref.WeakKeyDictionary[Any, dict[Series, int]] = weakref.WeakKeyDictionary()  # by torch.cuda.graph


def watch(series: Iterable[Series], turn: Turn) -> None:
    """In all captures that begin from now on: what modules of that turn fetch."""
    for each in series:
        _watched.setdefault(each, weakref.WeakSet()).add(turn)
    kind: Any = torch.cuda.graph
    if not getattr(kind, "ends_joined", False):  # once: others may have put theirs round ours since
        kind.__enter__, kind.__exit__ = _entering(kind.__enter__), _exiting(kind.__exit__)
        kind.ends_joined = True


def _fetches() -> dict[Series, int]:
    found = [reference() for reference in _watched.keyrefs()]  # another thread may be sharding a model
    return {each: each.stats().fetches for each in found if each is not None and not each.closed}


def _is_used_here(series: Series) -> bool:
    """And not by a pass in another thread, which is not captured."""
    here = threading.get_ident()
    return any(turn.came_last(here) for turn in _watched[series])


def _unjoined(before: dict[Series, int]) -> list[Series]:
    """Of which something was fetched after the capture had begun, and after the last join."""
    late = [each for each, count in _fetches().items() if count > max(before.get(each, count), each.joined_fetches)]
    return [each for each in late if _is_used_here(each)]


def _entering(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(enter)
    def entering(capture: Any) -> Any:
        _before[capture] = _fetches()
        return enter(capture)

    return entering


def _exiting(leave: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(leave)
    def exiting(capture: Any, kind: Any, *error: Any) -> Any:
        """What is not joined is joined, so that the capture ends as others do, and torch is fit for the next one."""
        unjoined = _unjoined(_before.pop(capture, {}))
        for each in unjoined:
            with contextlib.suppress(Error):
                each.join(torch.cuda.current_stream().cuda_stream)
        found = leave(capture, kind, *error)
        if unjoined and kind is None:
            raise Refused(_UNJOINED.format(names=", ".join(f"'{each.name}'" for each in unjoined)))
        return found

    return exiting

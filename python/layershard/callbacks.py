# SPDX-License-Identifier: Apache-2.0
"""The caller's own collectives as a transport: a Python object's methods behind the C callbacks.

Knows the header's lshard_callbacks; knows no torch.distributed. The methods run in a thread of the library, one at a
time.
"""
from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any, Protocol

from . import _declarations as c
from ._calls import Kept
from .errors import Error


class Collectives(Protocol):
    """What the transport "callback" needs of a communicator that nothing else uses. Memory is given by address.

    A method that fails raises: a layershard.Error passes its status on, anything else is TransportFailed; every call on
    the group then fails, with the exception as its cause.
    """

    def broadcast(self, address: int, count: int, root: int) -> object:
        """Start to bring `count` bytes from rank `root` to the same place on the others. What finish gets."""

    def allgather(self, send: int, receive: int, count: int) -> object:
        """Start to give `count` bytes of every rank to all, in rank order. What finish gets."""

    def finish(self, work: Any, timeout_ms: int) -> bool:
        """Wait for what was started, at most `timeout_ms`. False: not done yet, call again."""

    def stop(self) -> None:
        """This rank takes part no more: what the others wait for should fail."""


class _Translation:
    """One object's methods as C functions: exceptions become statuses, works become numbers."""

    def __init__(self, collectives: Collectives, kept: Kept) -> None:
        self._collectives = collectives
        self._kept = kept
        self._numbers = itertools.count(1)  # 0 would be NULL
        self._works: dict[int, object] = {}

    def _try(self, function: Callable[[], int], error: int | None, error_bytes: int) -> int:
        try:
            return function()
        except BaseException as exception:  # nothing passes through C
            self._kept.keep(exception)
            if error and error_bytes:
                text = f"{type(exception).__name__}: {exception}".encode(errors="replace")[: error_bytes - 1]
                ctypes.memmove(error, text + b"\0", len(text) + 1)
            status = exception.code if isinstance(exception, Error) else 0
            return status if status < 0 else c.STATUS["ERR_TRANSPORT"]

    def _start(self, start: Callable[[], object], work: Any) -> int:
        started = start()
        number = next(self._numbers)
        self._works[number] = started
        work[0] = number
        return 0

    def broadcast(
        self, _user: object, address: int, count: int, root: int, work: Any, error: int | None, error_bytes: int
    ) -> int:
        def start() -> object:
            return self._collectives.broadcast(address, count, root)

        return self._try(lambda: self._start(start, work), error, error_bytes)

    def allgather(
        self, _user: object, send: int, receive: int, count: int, work: Any, error: int | None, error_bytes: int
    ) -> int:
        def start() -> object:
            return self._collectives.allgather(send, receive, count)

        return self._try(lambda: self._start(start, work), error, error_bytes)

    def _finish(self, number: int, timeout_ms: int) -> int:
        done = False
        failed = True
        try:
            done = self._collectives.finish(self._works[number], timeout_ms)
            failed = False
        finally:
            if done or failed:
                del self._works[number]
        return c.STATUS["OK"] if done else c.STATUS["IN_PROGRESS"]

    def finish(self, _user: object, work: int, timeout_ms: int, error: int | None, error_bytes: int) -> int:
        return self._try(lambda: self._finish(work, timeout_ms), error, error_bytes)

    def stop(self, _user: object) -> None:
        def stop() -> int:
            self._collectives.stop()
            return 0

        self._try(stop, None, 0)


def c_callbacks(collectives: Collectives | None, kept: Kept) -> c.Callbacks:
    """The C structure; it holds the functions, so it must live as long as the group."""
    if collectives is None:
        return c.Callbacks()
    translation = _Translation(collectives, kept)
    return c.Callbacks(
        broadcast=c.BROADCAST(translation.broadcast),
        allgather=c.ALLGATHER_START(translation.allgather),
        finish=c.FINISH(translation.finish),
        stop=c.STOP(translation.stop),
    )

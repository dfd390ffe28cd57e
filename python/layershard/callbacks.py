# SPDX-License-Identifier: Apache-2.0
"""The caller's own collectives as a transport: a Python object's methods behind the C callbacks.

Knows the header's lshard_callbacks; knows no torch.distributed. The methods run in a thread of the library, one at a
time; those of a device in any thread.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any, Protocol

from . import _declarations as c
from ._calls import FirstError
from .errors import Error


class Collectives(Protocol):
    """What the transport "callback" needs of a communicator that nothing else uses. Memory is given by address. The
    transport "fabric" exchanges records by it, in host memory, and carries no layer.

    They are also called while the program is in no call, about once a second: ranks tell each other that they are
    there.

    A method that fails raises: a layershard.Error passes its status on, anything else is TransportFailed; every call on
    the group then fails, with the exception as its cause.

    For layers in device memory there is a member `device`, a Device. The addresses of layers are then what it
    allocated, and their collectives go to its stream: finish says that they are enqueued there.
    """

    def broadcast(self, address: int, count: int, root: int) -> object:
        """Start to send `count` bytes from rank `root` to the same place on the others. What finish gets."""

    def allgather(self, send: int, receive: int, count: int) -> object:
        """Start to give `count` bytes of every rank to all, in rank order. What finish gets."""

    def finish(self, work: Any, timeout_ms: int) -> bool:
        """Wait for what was started, at most `timeout_ms`. False: not done yet, call again."""

    def stop(self) -> None:
        """This rank takes part no more: what the others wait for should fail."""


class Device(Protocol):
    """A device for Collectives. Streams are handles, as Series.reach and Series.wait get them; `stream` is the one that
    collectives go to. Called by any thread; only allocate and copies from and to the host may wait for the device.
    """

    stream: int

    def allocate(self, count: int, alignment: int) -> int:
        """The address of as many zeros."""

    def release(self, address: int) -> None:
        """Free what was allocated."""

    def record(self, event: Any, stream: int) -> Any:
        """The event, or a new one where it is None, after what the stream has been given so far."""

    def wait(self, stream: int, event: Any) -> None:
        """What the stream is given from now on comes after the event."""

    def query(self, event: Any) -> bool:
        """Whether what comes before the event is done."""

    def copy(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Enqueue on `stream`: rows of bytes within the device, or to or from host memory."""

    def capturing(self, stream: int) -> bool:
        """Whether the stream is recorded into a graph."""


class _Failures:
    """Exceptions of Python's functions as statuses; nothing passes through C."""

    def __init__(self, kept: FirstError) -> None:
        self._kept = kept

    def status(self, exception: BaseException, error: int | None, error_bytes: int) -> int:
        self._kept.keep(exception)
        if error and error_bytes:
            text = f"{type(exception).__name__}: {exception}".encode(errors="replace")[: error_bytes - 1]
            ctypes.memmove(error, text + b"\0", len(text) + 1)
        status = exception.code if isinstance(exception, Error) else 0
        return status if status < 0 else c.STATUS["ERR_TRANSPORT"]


class _DeviceTranslation:
    """A device's methods as C functions: events become numbers. Short, since the pass calls them."""

    def __init__(self, device: Device, failures: _Failures) -> None:
        self._device = device
        self._failed = failures.status
        self._numbers = itertools.count(1)  # 0 would be NULL
        self._events: dict[int, Any] = {}

    def allocate(self, _user: object, count: int, alignment: int) -> int:
        try:
            return self._device.allocate(count, alignment)
        except BaseException as exception:
            self._failed(exception, None, 0)
            return 0

    def release(self, _user: object, address: int) -> None:
        try:
            self._device.release(address)
        except BaseException as exception:
            self._failed(exception, None, 0)

    def record(self, _user: object, event: Any, stream: int | None, error: int | None, error_bytes: int) -> int:
        try:
            number = event[0]
            if number:
                self._device.record(self._events[number], stream or 0)
            else:
                made = self._device.record(None, stream or 0)
                number = next(self._numbers)
                self._events[number] = made
                event[0] = number
        except BaseException as exception:
            return self._failed(exception, error, error_bytes)
        return 0

    def wait(self, _user: object, stream: int | None, event: int, error: int | None, error_bytes: int) -> int:
        try:
            self._device.wait(stream or 0, self._events[event])
        except BaseException as exception:
            return self._failed(exception, error, error_bytes)
        return 0

    def query(self, _user: object, event: int, error: int | None, error_bytes: int) -> int:
        try:
            return c.STATUS["OK" if self._device.query(self._events[event]) else "IN_PROGRESS"]
        except BaseException as exception:
            return self._failed(exception, error, error_bytes)

    def drop(self, _user: object, event: int) -> None:
        del self._events[event]

    def copy(self, _user: object, *arguments: Any) -> int:
        *rows, error, error_bytes = arguments
        try:
            self._device.copy(*rows)
        except BaseException as exception:
            return self._failed(exception, error, error_bytes)
        return 0

    def capturing(self, _user: object, stream: int | None) -> int:
        try:
            return self._device.capturing(stream or 0)
        except BaseException as exception:
            self._failed(exception, None, 0)
            return True  # the call that asks is refused, with the exception as its cause

    def c_structure(self) -> c.DeviceCallbacks:
        return c.DeviceCallbacks(
            stream=self._device.stream,
            allocate=c.DEVICE_ALLOCATE(self.allocate),
            release=c.RELEASE(self.release),
            record=c.RECORD(self.record),
            wait=c.WAIT_EVENT(self.wait),
            query=c.QUERY(self.query),
            drop=c.RELEASE(self.drop),
            copy=c.COPY(self.copy),
            capturing=c.CAPTURING(self.capturing),
        )


class _Translation:
    """One object's methods as C functions: exceptions become statuses, works become numbers."""

    def __init__(self, collectives: Collectives, failures: _Failures) -> None:
        self._collectives = collectives
        self._failures = failures
        self._numbers = itertools.count(1)  # 0 would be NULL
        self._works: dict[int, object] = {}

    def _try(self, function: Callable[[], int], error: int | None, error_bytes: int) -> int:
        try:
            return function()
        except BaseException as exception:
            return self._failures.status(exception, error, error_bytes)

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


def c_callbacks(collectives: Collectives | None, kept: FirstError) -> c.Callbacks | None:
    """The C structure; it holds the functions, so it must live as long as the group."""
    if collectives is None:
        return None
    failures = _Failures(kept)
    translation = _Translation(collectives, failures)
    device: Device | None = getattr(collectives, "device", None)
    on_device = None if device is None else _DeviceTranslation(device, failures).c_structure()
    return c.Callbacks(
        broadcast=c.BROADCAST(translation.broadcast),
        allgather=c.ALLGATHER_START(translation.allgather),
        finish=c.FINISH(translation.finish),
        stop=c.STOP(translation.stop),
        device=None if on_device is None else ctypes.pointer(on_device),
    )

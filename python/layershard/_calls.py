# SPDX-License-Identifier: Apache-2.0
"""Calls that wait for other ranks, so that Ctrl-C ends them and callbacks run where the caller is.

Python delivers signals to the main thread only, and only while that runs Python. So a call that the main thread makes
runs in a thread of its own, and the main thread waits for it in Python. What the library calls back meanwhile is
handed to the main thread, since much of a program's state (torch's current device, its grad mode) belongs to a thread.
Other threads never see a signal: their calls are made directly. Knows nothing of groups and series.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, NoReturn


class FirstError:
    """The first exception of a callback, kept while it cannot pass through C."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.layer: int | None = None  # what it was called for

    def keep(self, error: BaseException, layer: int | None = None) -> None:
        if self.error is None:
            self.error, self.layer = error, layer

    def run(self, function: Callable[[], Any], failed: Any, layer: int | None = None) -> Any:
        """What the function returns, run in the thread that made the call; `failed` if it raises."""
        desk: _Desk | None = getattr(_here, "desk", None)
        try:
            return function() if desk is None else desk.ask(function)
        except _Abandoned:
            return failed
        except BaseException as error:  # also KeyboardInterrupt: nothing passes through C
            self.keep(error, layer)
            return failed

    def reraise(self, failure: Exception) -> NoReturn:
        """Raise the failure, caused by what was kept; what is no Exception (KeyboardInterrupt) goes on itself."""
        if self.error is not None and not isinstance(self.error, Exception):
            raise self.error
        raise failure from self.error


class _Abandoned(Exception):
    """The thread that made the call has been interrupted and waits no longer."""


class _Request:
    """A function that the calling thread is asked to run."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._answered = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = _Abandoned()

    def serve(self) -> None:
        try:
            self._result = self._function()
            self._error = None
        except BaseException as error:
            self._error = error
        finally:
            self._answered.set()

    def refuse(self) -> None:
        self._answered.set()

    def wait(self) -> Any:
        self._answered.wait()
        if self._error is not None:
            raise self._error
        return self._result


class _Desk:
    """Where the thread that makes the call and the thread that carries it out meet."""

    def __init__(self, call: Callable[[], int], dispose: Callable[[], None] | None) -> None:
        self._call = call
        self._dispose = dispose
        self._inbox: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._abandoned = False
        self.finished = False
        self.status = 0
        self.error: BaseException | None = None

    def ask(self, function: Callable[[], Any]) -> Any:
        request = _Request(function)
        with self._lock:
            if self._abandoned:
                raise _Abandoned
            self._inbox.put(request)
        return request.wait()

    def work(self) -> None:
        _here.desk = self
        try:
            self.status = self._call()
        except BaseException as error:
            self.error = error
        with self._lock:
            self.finished = True
            abandoned = self._abandoned
        self._inbox.put(None)
        if abandoned and self._dispose:
            self._dispose()

    def next_request(self) -> _Request | None:
        return self._inbox.get()

    def abandon(self) -> None:
        """Wait no longer: what is asked from now on is refused, what the call still makes is disposed of."""
        with self._lock:
            self._abandoned = True
            finished = self.finished
        while not self._inbox.empty():
            request = self._inbox.get()
            if request is not None:
                request.refuse()
        if finished and self._dispose:
            self._dispose()


_here = threading.local()


def _serve(desk: _Desk, abort: Callable[[], None] | None) -> None:
    """Run what the call asks for until it is done; end it when a signal's handler raises."""
    interruption: BaseException | None = None
    request: _Request | None = None
    aborted = False
    while not desk.finished:
        try:
            if interruption is not None and abort is not None and not aborted:
                abort()  # in here, since a second Ctrl-C must not leave the call behind
                aborted = True
            request = desk.next_request()
            if request is not None and interruption is None:
                request.serve()
            elif request is not None:
                request.refuse()
        except BaseException as error:
            if request is not None:
                request.refuse()
            if abort is None:
                desk.abandon()
                raise
            interruption = interruption or error
    if interruption is not None:
        raise interruption


def run_interruptible(
    call: Callable[[], int], abort: Callable[[], None] | None = None, dispose: Callable[[], None] | None = None
) -> int:
    """The status of `call`. A signal's exception is raised after `abort` has made the call return; without `abort` at
    once, and `dispose` undoes what the call still makes."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    desk = _Desk(call, dispose)
    threading.Thread(target=desk.work, name="layershard", daemon=True).start()
    _serve(desk, abort)
    if desk.error is not None:
        raise desk.error
    return desk.status

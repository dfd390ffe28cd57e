# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C during a wait for a layer, which is too short a call to run in a thread of its own (see _calls.py).

While the main thread waits, signals' numbers also go to a pipe that a thread reads; on SIGINT that makes the wait
return, and Python then raises KeyboardInterrupt. A program with a SIGINT handler of its own decides itself what is to
end: its handler runs when the wait is over, which the deadline ends at last. Costs two system calls a wait. Knows
nothing of groups and series.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

_MAIN = threading.main_thread().ident


class _Watch:
    """The pipe and the thread; one for the process, made at the first wait that can block."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.abort: Callable[[], None] | None = None
        self.previous = -1  # whose pipe it would have been
        threading.Thread(target=self._run, name="layershard signals", daemon=True).start()

    def _run(self) -> None:
        while True:
            numbers = os.read(self._read_end, 64)
            abort, previous = self.abort, self.previous
            raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            if signal.SIGINT in numbers and abort is not None and raises:
                abort()
            if previous != -1:
                with contextlib.suppress(OSError):  # full, as it may be; or closed meanwhile
                    os.write(previous, numbers)


_watch: _Watch | None = None


def _start_watch() -> _Watch:
    global _watch
    _watch = _Watch()
    return _watch


def _forget_watch() -> None:
    global _watch
    _watch = None


os.register_at_fork(after_in_child=_forget_watch)  # the thread is the parent's


def interruptible(function: Callable[..., int], abort: Callable[[], None]) -> Callable[..., int]:
    """The function, which Ctrl-C ends: `abort` makes it return."""
    get_ident, set_wakeup_fd = threading.get_ident, signal.set_wakeup_fd

    def call(*arguments: object) -> int:
        if get_ident() != _MAIN:
            return function(*arguments)
        watch = _watch or _start_watch()
        previous = set_wakeup_fd(watch.write_end, warn_on_full_buffer=False)
        if previous != watch.write_end:  # a Ctrl-C right here leaves it there
            watch.previous = previous
        try:
            watch.abort = abort
            return function(*arguments)
        finally:
            watch.abort = None
            set_wakeup_fd(watch.previous)

    return call

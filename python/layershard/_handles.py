# SPDX-License-Identifier: Apache-2.0
"""The lives of a C group and a C series: when each may be called, closed and freed, whatever other threads do.

Knows pointers and what may still use them; nothing of layers, tensors or options.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import _declarations as c
from ._calls import FirstError, run_interruptible
from ._library import library
from .errors import WrongState, error_of
from .memory_source import Lender

_numbers = itertools.count()
_open_groups: weakref.WeakSet[GroupHandle] = weakref.WeakSet()


@atexit.register
def leave_open_groups() -> None:
    """A thread of the library must not call back into an interpreter that has ended.

    Where the program ends well, ranks that are still in their last pass may need what this one has only asked for; one
    that ends by an exception lets nobody wait for it.
    """
    groups = sorted(_open_groups, key=lambda group: group.number)  # all ranks in one order, or they wait in a circle
    if not hasattr(sys, "last_value"):
        for group in groups:
            group.settle()
    for group in groups:
        group.abort()


class GroupHandle:
    """The C group. Once closed it lives on as long as one of its series does.

    Its collective calls come one after the other, and a series is never freed inside one: an array may be dropped
    anywhere, also by a callback or by the garbage collector in the middle of such a call.
    """

    def __init__(self, pointer: ctypes.c_void_p, kept: FirstError, callbacks: Sequence[object]) -> None:
        self.library = library()
        self.pointer = pointer
        self.kept = kept
        self.rank: int = self.library.lshard_group_rank(pointer)
        self.size: int = self.library.lshard_group_size(pointer)
        self.transport: str = self.library.lshard_group_transport(pointer).decode(errors="replace")
        self._callbacks = callbacks
        self._one_call = threading.Lock()
        self._one_abort = threading.RLock()  # a signal may come in the middle of one
        self._caller: int | None = None
        self.number = next(_numbers)
        self._live: dict[int | None, None] = {}  # in the order in which all ranks have made them
        self._dead: list[ctypes.c_void_p] = []
        self._closed = False
        self.is_settled = False
        self._process = os.getpid()  # a forked one has a copy, for which the C library answers alone
        _open_groups.add(self)

    def run(self, call: Callable[[], int]) -> int:
        """The status of a collective call."""
        if self._process != os.getpid():
            return call()  # refused; a thread that is not here may hold the lock
        if self._caller == threading.get_ident():
            text = "a callback made a collective call of the group that called it: make the call outside of callbacks"
            raise WrongState(text, rank=self.rank)
        try:
            with self._one_call:
                self._caller = threading.get_ident()
                try:
                    return run_interruptible(call, self.abort)
                finally:
                    self._caller = None
        finally:
            self._tidy()

    def abort(self) -> None:
        if self._process != os.getpid():
            return
        with self._one_abort:
            if self.pointer:
                self.library.lshard_group_abort(self.pointer)

    def settle(self) -> int:
        """Take part in all that was begun, until the deadline; once, unless a call has failed, after which others wait
        for nothing. On other than collective transports nobody needs it, and ranks that are threads of one process
        would wait for themselves."""
        innermost = self.transport.rpartition(",")[2]
        if self._process != os.getpid() or self.is_settled or not innermost.startswith("callback"):
            return 0
        if len({group.rank for group in _open_groups if not group.is_copy}) < 2:
            self.is_settled = True
            for pointer in list(self._live):
                self.library.lshard_series_join(pointer, None)  # a failure is the others', who tell it
        return 0

    def fail(self, code: int, kept: FirstError | None = None) -> NoReturn:
        """Raise what a failed call on the group left: a callback's exception, or the library's text."""
        self.is_settled = True
        text = self.library.lshard_group_error(self.pointer) or self.library.lshard_status_text(code)
        words = text.decode(errors="replace")
        if kept is None or kept.error is None:
            self.kept.reraise(error_of(code, words, rank=self.rank))
        kept.reraise(error_of(code, f"{words}: {type(kept.error).__name__}: {kept.error}", rank=self.rank))

    def add_series(self, pointer: ctypes.c_void_p) -> None:
        self._live[pointer.value] = None

    def destroy_series(self, pointer: ctypes.c_void_p) -> int:
        """Free a series: now, or after the collective call that is under way, which then has nobody to tell of a
        failure. The status; on failure the series is still the caller's."""
        self._dead.append(pointer)
        return self._tidy().get(pointer.value, 0)

    @property
    def is_copy(self) -> bool:
        """Of a forked process: there is nothing of its own to write."""
        return self._process != os.getpid()

    def flush(self) -> None:
        """Write out what the transport writes to files."""
        status = self.library.lshard_group_flush(self.pointer)
        if status < 0:
            self.fail(status)

    def close(self) -> None:
        """Leave the group, when its last series has gone."""
        self._closed = True
        self._tidy()

    def _tidy(self) -> dict[int | None, int]:
        """Free what waits for it, unless a collective call is under way, which does it at its end. The statuses of
        the series that could not be freed."""
        failed: dict[int | None, int] = {}
        while (self._dead or self._may_leave()) and self._one_call.acquire(blocking=False):
            try:
                self._destroy_dead(failed)
                if self._may_leave():
                    self._leave()
            finally:
                self._one_call.release()
        return failed

    def _leave(self) -> None:
        """What an abort in another thread has ended may be here before the abort is over."""
        pointer = ctypes.c_void_p(self.pointer.value)
        with self._one_abort if self._process == os.getpid() else contextlib.nullcontext():
            self.pointer.value = None
        self.library.lshard_group_destroy(pointer)

    def _may_leave(self) -> bool:
        return self._closed and not self._live and bool(self.pointer)

    def _destroy_dead(self, failed: dict[int | None, int]) -> None:
        while self._dead:
            pointer = self._dead.pop()
            status = self.library.lshard_series_destroy(pointer)
            if status < 0:
                failed[pointer.value] = status
            else:
                self._live.pop(pointer.value, None)

    def __del__(self) -> None:
        self.close()


class SeriesHandle:
    """The C series. Once closed it lives on as long as arrays show its memory; forgotten unclosed, it is freed too."""

    def __init__(self, group: GroupHandle, options: c.SeriesOptions, lender: Lender | None = None) -> None:
        self.group = group
        self._lender = lender  # as long as it may be asked
        self.library = group.library
        self._name: str = options.name.decode()
        self.pointer = ctypes.c_void_p()  # for calls: NULL once closed
        self._users: set[int] = set()
        self._owned: list[ctypes.c_void_p] = []  # until freed; taken out by whoever frees it
        try:
            status = group.run(lambda: int(self.library.lshard_series_create(group.pointer, options, self.pointer)))
        except BaseException:  # interrupted, perhaps when the series was there already
            if self.pointer:
                group.destroy_series(ctypes.c_void_p(self.pointer.value))
                self.pointer.value = None
            raise
        if status < 0:
            group.fail(status, None if lender is None else lender.kept)
        self._owned.append(ctypes.c_void_p(self.pointer.value))
        group.add_series(self._owned[0])

    @property
    def closed(self) -> bool:
        return not self.pointer

    def hold(self, user: object) -> None:
        self._users.add(id(user))

    def let_go(self, user: object) -> None:
        """From any thread."""
        self._users.discard(id(user))
        if self.closed and not self._users:
            self._free()

    def close(self) -> None:
        """No more calls; free it unless an array shows its memory. Where work on a stream may still read a window,
        nothing is changed."""
        if self.closed:
            return
        status = 0 if self._users else self._free()
        if status < 0:
            self.fail(status, None)
        self.pointer.value = None

    def _free(self) -> int:
        try:
            pointer = self._owned.pop()
        except IndexError:
            return 0  # somebody else was faster
        status = self.group.destroy_series(pointer)
        if status < 0:
            self._owned.append(pointer)
        return status

    def refuse_closed(self) -> NoReturn:
        raise WrongState(f"series '{self._name}' is closed", rank=self.group.rank)

    def fail(self, code: int, layer: int | None, kept: FirstError | None = None) -> NoReturn:
        """Raise what a failed call left: a callback's exception, or the library's text."""
        self.group.is_settled = True
        text = self.library.lshard_series_error(self.pointer) or self.library.lshard_status_text(code)
        words = text.decode(errors="replace")
        if kept is None or kept.error is None:
            self.group.kept.reraise(error_of(code, words, rank=self.group.rank, layer=layer))
        words += f": {type(kept.error).__name__}: {kept.error}"
        kept.reraise(error_of(code, words, rank=self.group.rank, layer=kept.layer))

    def __del__(self) -> None:
        self._free()

# SPDX-License-Identifier: Apache-2.0
"""A group: n ranks and the transport between them.

Knows what a group is asked for, and its callbacks. The C group's life is _handles.py; what a series is made of is
series.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal

from . import _declarations as c
from ._calls import FirstError, run_interruptible
from ._handles import GroupHandle
from ._library import library, library_path
from .callbacks import Collectives, c_callbacks
from .errors import Error, Invalid, LibraryError, WrongState, error_of
from .memory_source import MemorySource
from .planning import discover
from .series import Series, Tensor, choice, series_options, unsigned

LogFunction = Callable[[str, str], None]
_LOG_WORDS = {number: word for word, number in c.LOG_LEVEL.items()}
_LOGGING = {"error": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
_ERROR_BYTES = 1024


def _logger_function(logger: logging.Logger) -> LogFunction:
    return lambda level, text: logger.log(_LOGGING[level], "%s", text)


def _log_callback(log: LogFunction | logging.Logger | None) -> object:
    """The C callback of a Python function or logger; its exceptions are shown as those of a destructor are."""
    if log is None:
        return c.LOG()
    write = _logger_function(log) if isinstance(log, logging.Logger) else log

    def called(_user: int | None, level: int, text: bytes) -> None:
        write(_LOG_WORDS.get(level, "debug"), text.decode(errors="replace"))

    return c.LOG(called)


def _allgather_callback(allgather: Callable[[bytes], list[bytes]] | None, size: int | None, kept: FirstError) -> object:
    if allgather is None:
        return c.ALLGATHER()
    function = allgather
    found = discover() if size is None else None
    n = size or (found.size if found else 1)

    def called(_user: int | None, send: int, receive: int, n_bytes: int) -> int:
        def exchange() -> int:
            parts = function(ctypes.string_at(send, n_bytes))
            if [len(part) for part in parts] != [n_bytes] * n:
                raise Invalid(
                    f"allgather returned parts of {[len(part) for part in parts]} bytes, not {n} of {n_bytes}"
                )
            joined = b"".join(parts)
            ctypes.memmove(receive, joined, len(joined))
            return 0

        return int(kept.run(exchange, 1))

    return c.ALLGATHER(called)


def _text(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


class Group:
    """Join the ranks of a job. Waits until all of them have joined, at most `timeout_ms`.

    rank, size   both None: found in the environment (LAYERSHARD_*, torchrun, Open MPI, PMIx, PMI, Slurm)
    transport    "auto", a transport's name, or wrappers before one; None: LAYERSHARD_TRANSPORT, else "auto"
    job          the name by which separately started ranks find each other; None: LAYERSHARD_JOB, else the launcher's
    timeout_ms   the longest wait of any call; None: LAYERSHARD_TIMEOUT_MS, else 30000
    memory       where layers live: "host" or "cuda", there on `device`
    allgather    instead of `job`: gives this rank's bytes to the others and returns those of all, in rank order
    callbacks    for the transports "callback" and "fabric": collectives of the caller's own, see Collectives
    large_pages  of 2 MiB, for what is kept in host memory: "auto" (where they are to be had, unless
                 LAYERSHARD_LARGE_PAGES says otherwise), "never", "require"; the same on all ranks
    numa         nodes of shards in host memory by "shm": "auto" (LAYERSHARD_NUMA, else "none"), "none" (where they are
                 first written), "interleave", "source" (of their rank), "copy" (and one copy on each other node that
                 ranks are on); the same on all ranks
    rejoin       may a rank that has ended come back under its number while the others go on: "auto"
                 (LAYERSHARD_REJOIN, else "never"), "never", "allow"; by "shm" and a job's name; the same on all ranks
    log          a logging.Logger, or a function of a level ("error", "warn", "info", "debug") and a line; any thread
    """

    def __init__(
        self,
        rank: int | None = None,
        size: int | None = None,
        *,
        transport: str | None = None,
        job: str | None = None,
        timeout_ms: int | None = None,
        memory: Literal["host", "cuda"] = "host",
        device: int = 0,
        allgather: Callable[[bytes], list[bytes]] | None = None,
        callbacks: Collectives | None = None,
        large_pages: Literal["auto", "never", "require"] = "auto",
        numa: Literal["auto", "none", "interleave", "source", "copy"] = "auto",
        rejoin: Literal["auto", "never", "allow"] = "auto",
        log: LogFunction | logging.Logger | None = None,
        log_level: Literal["error", "warn", "info", "debug"] = "info",
    ) -> None:
        kept = FirstError()
        c_allgather, c_log = _allgather_callback(allgather, size, kept), _log_callback(log)
        c_collectives = c_callbacks(callbacks, kept)
        options = c.GroupOptions(
            rank=-1 if rank is None else rank,
            size=-1 if size is None else size,
            transport=_text(transport),
            job=_text(job),
            timeout_ms=0 if timeout_ms is None else unsigned("timeout_ms", timeout_ms, 32),
            memory=choice("memory", memory, c.MEMORY),
            device=device,
            bootstrap=ctypes.pointer(c.Bootstrap(allgather=c_allgather)) if allgather else None,
            log=c_log,
            log_level=choice("log_level", log_level, c.LOG_LEVEL),
            callbacks=None if c_collectives is None else ctypes.pointer(c_collectives),
            large_pages=choice("large_pages", large_pages, c.LARGE_PAGES),
            numa=choice("numa", numa, c.NUMA),
            rejoin=choice("rejoin", rejoin, c.REJOIN),
        )
        self.memory = memory
        self.device = device
        self.callbacks = callbacks
        self._handle: GroupHandle | None = _create(options, kept, [c_allgather, c_log, c_collectives])
        self._series: list[Series] = []
        self.catching_up = self.returned  # it has made no call together with the others since it came back

    def _open_handle(self) -> GroupHandle:
        if self._handle is None:
            raise WrongState("the group is closed")
        return self._handle

    @property
    def closed(self) -> bool:
        return self._handle is None

    @property
    def rank(self) -> int:
        return self._open_handle().rank

    @property
    def size(self) -> int:
        return self._open_handle().size

    @property
    def transport(self) -> str:
        """The transport in use and why: "shm (auto: all ranks on one host)"."""
        return self._open_handle().transport

    @property
    def returned(self) -> bool:
        """Whether this rank came back to ranks that live."""
        handle = self._open_handle()
        return bool(handle.library.lshard_group_returned(handle.pointer))

    def series(
        self,
        name: str,
        *,
        first_layer: int,
        layer_count: int,
        tensors: Sequence[Tensor],
        prefetch: int = 1,
        placement: Literal["whole", "striped"] = "whole",
        resident_bytes: int = 0,
        poison: Literal["off", "ready", "on"] = "off",
        memory_source: MemorySource | None = None,
    ) -> Series:
        """Create a series: collective; all ranks describe it alike. `prefetch` is k, the layers fetched ahead;
        `resident_bytes` is memory to spend on resident layers, which other ranks store (layershard.ALL: all of them).
        `poison`: windows hold NaN (Tensor.poison) wherever a program should not read them; "ready": Series.poison
        switches it on. LAYERSHARD_POISON does the same for any series. `memory_source`: memory of the caller's.
        """
        options = series_options(name, first_layer, layer_count, tensors, prefetch, placement, resident_bytes, poison)
        device = (c.MEMORY[self.memory], self.device if self.memory == "cuda" else 0)
        series = Series(self._open_handle(), options, device, memory_source)
        self._series = [*self.open_series, series]
        return series

    @property
    def open_series(self) -> tuple[Series, ...]:
        """The series that have not been closed, in the order in which they were made."""
        return tuple(each for each in self._series if not each.closed)

    def abort(self) -> None:
        """Make every call of this rank that waits return Aborted, now and from now on. From any thread."""
        self._open_handle().abort()

    def flush(self) -> None:
        """Write out the trace so far, where the transport has one. Raises what kept it from being written, now or
        earlier."""
        self._open_handle().flush()

    def close(self) -> None:
        """Close the series and leave the group. Memory that arrays still show stays until the last of them goes. A
        trace that could not be written is told then, see flush(); the group is left all the same."""
        for series in self._series:
            series.close()
        self._series = []
        handle, self._handle, self.callbacks = self._handle, None, None
        if handle is None:
            return
        try:
            if not handle.is_copy:
                handle.flush()
                if sys.exc_info()[0] is None:  # one that ends by an exception lets nobody wait
                    run_interruptible(handle.settle, handle.abort)
        finally:
            handle.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Error:
            if error is None:  # what went wrong first is what the caller must see
                raise

    def __repr__(self) -> str:
        if self._handle is None:
            return "<layershard.Group closed>"
        return f"<layershard.Group rank {self.rank} of {self.size}, {self.transport}>"


def _creation_error(status: int, text: str, rank: int) -> Error:
    """With the rank that was found where none was given; an older or newer library is named as what it is."""
    if status == c.STATUS["ERR_INVALID"] and text.startswith("struct_size"):
        return LibraryError(
            f"{library_path()} is not of the same build as this package, although both say they are "
            f"{'.'.join(map(str, c.VERSION))}: build or install them together ({text})"
        )
    if rank < 0:
        with contextlib.suppress(Error):
            found = discover()
            rank = found.rank if found else -1
    return error_of(status, text, rank=rank if rank >= 0 else None)


def _create(options: c.GroupOptions, kept: FirstError, callbacks: Sequence[object]) -> GroupHandle:
    """The new group. Interrupted, it is left to the thread that creates it, which then has the deadline to give up."""
    loaded = library()
    pointer = ctypes.c_void_p()
    text = ctypes.create_string_buffer(_ERROR_BYTES)
    options.error = ctypes.addressof(text)
    options.error_bytes = len(text)

    pinned = [*callbacks, text]  # by dispose, which a thread that goes on after an interruption holds

    def create() -> int:
        return int(loaded.lshard_group_create(options, pointer))

    def dispose() -> None:
        if pointer:
            loaded.lshard_group_abort(pointer)
            loaded.lshard_group_destroy(pointer)
        pinned.clear()

    status = run_interruptible(create, None, dispose)
    if status < 0:
        message = text.value or loaded.lshard_status_text(status)
        kept.reraise(_creation_error(status, message.decode(errors="replace"), options.rank))
    return GroupHandle(pointer, kept, callbacks)

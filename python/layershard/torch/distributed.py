# SPDX-License-Identifier: Apache-2.0
"""torch.distributed as the transport "callback": any backend that has broadcast and all-gather carries the layers.

The collectives run in a thread of the library, in a process group of their own, so that they never come between the
model's. Where layers live on a device, the group has two backends: one for the processor, by which the ranks agree on
every collective, and one for the device's memory. Knows torch.distributed's public calls; nothing of modules or layers.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import socket
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .._handles import leave_open_groups
from ..errors import Aborted, PeerFailed, TransportFailed
from .device import TorchDevice, host_bytes

# The library has the deadlines: what waits for a late rank is waited for again, so torch must not give up before it.
_NEVER = timedelta(days=30)
_GRACE_S = 2.0
_SIGNS_OF_DEATH = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "not connected")


# These block the host until the bytes are there; the others only enqueue.
_HOST_SYNCHRONOUS = ("gloo", "mpi")

# Named all_gather_single from torch 2.13 on.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

_open: weakref.WeakSet[ProcessGroupCollectives] = weakref.WeakSet()


@atexit.register
def _end_open() -> None:
    """The library's thread must be out of torch when the interpreter ends: there is no way back into it."""
    leave_open_groups()
    for collectives in list(_open):
        collectives.end()


def _backend_for(group: Any, kind: str) -> str:
    """The group's own for this memory ("cpu:gloo,cuda:nccl"), else gloo: nccl, hccl and xccl have none for the
    processor's."""
    pairs = str(dist.get_backend_config(group)).split(",")
    by_device = dict(pair.split(":", 1) for pair in pairs if ":" in pair)
    return by_device.get(kind, "gloo")


class ProcessGroupCollectives:
    """The collectives that layershard.Group takes as `callbacks`, and an `allgather` for it. Collective to make.

    With a device, layers live there and not in host memory.
    """

    def __init__(self, group: Any, device: torch.device | None = None) -> None:
        self._ranks = dist.get_process_group_ranks(group)
        self.device = None if device is None else TorchDevice(device)
        kind = "cpu" if device is None else device.type
        backend, for_layers = _backend_for(group, "cpu"), _backend_for(group, kind)
        self._enqueues = for_layers not in _HOST_SYNCHRONOUS
        if for_layers != backend:
            backend = f"cpu:{backend},{kind}:{for_layers}"
        everyone = len(self._ranks) == dist.get_world_size()
        self._group: Any = dist.new_group(
            self._ranks,
            timeout=_NEVER,
            backend=backend,
            use_local_synchronization=not everyone,
        )
        self._process = os.getpid()  # a forked one has the connections, too, and no thread that uses them
        self._in_progress: set[Any] = set()
        self._inside_torch = threading.Lock()
        self._ended = False
        self._was_used = False  # by a thread of the library's, which says in the end that it has stopped
        self._stopped = threading.Event()
        if self.device is not None:
            self._connect()
        _open.add(self)

    def _connect(self) -> None:
        """Backends connect at their first collective, wait for all ranks there and know no deadline: here all are."""
        first = torch.zeros(1, dtype=torch.uint8, device=self.device.device if self.device else None)
        dist.broadcast(first, src=self._ranks[0], group=self._group)
        first.item()

    def exchange(self, mine: bytes) -> list[bytes]:
        """Give these bytes, get those of all ranks, which are as many. For Group's `allgather`."""
        parts = [torch.empty(len(mine), dtype=torch.uint8) for _ in self._ranks]
        dist.all_gather(parts, torch.frombuffer(bytearray(mine), dtype=torch.uint8), group=self._group)
        return [bytes(part.numpy()) for part in parts]

    def _bytes_at(self, address: int, count: int) -> torch.Tensor:
        return host_bytes(address, count) if self.device is None else self.device.bytes_at(address, count)

    def _on_stream(self) -> Any:
        return contextlib.nullcontext() if self.device is None else self.device.current()

    def broadcast(self, address: int, count: int, root: int) -> Any:
        tensor = self._bytes_at(address, count)
        return self._start(
            lambda: dist.broadcast(tensor, src=self._ranks[root], group=self._group, async_op=True), tensor.device
        )

    def allgather(self, send: int, receive: int, count: int) -> Any:
        every = self._bytes_at(receive, count * len(self._ranks))
        mine = self._bytes_at(send, count)
        return self._start(lambda: _all_gather(every, mine, group=self._group, async_op=True), every.device)

    def _start(self, collective: Callable[[], Any], device: torch.device) -> Any:
        """The work, and whether it is only enqueued."""
        with self._inside_torch, self._on_stream():
            if self._ended:
                raise PeerFailed("this process is ending")
            try:
                work = collective()
            except RuntimeError as error:
                raise failure_of(str(error)) from error
            self._in_progress.add(work)
            self._was_used = True
        return work, self._enqueues and device.type != "cpu"

    def finish(self, started: Any, timeout_ms: int) -> bool:
        work, is_enqueued = started
        with self._inside_torch, self._on_stream():
            if self._ended:
                raise Aborted("this process is ending")
            if not is_enqueued:
                return self._wait(work, timeout_ms)
            self._see_result(work)  # orders the stream after it; with a time to wait the host would wait for it
            self._in_progress.discard(work)
            return True

    def _wait(self, work: Any, timeout_ms: int) -> bool:
        """gloo says "timed out" by an exception as well; the work then goes on."""
        try:
            work.wait(timedelta(milliseconds=timeout_ms))
        except RuntimeError:
            if not work.is_completed():
                return False
            self._see_result(work)
        self._in_progress.discard(work)
        return True

    def _see_result(self, work: Any) -> None:
        """Of a work that is over, whatever the exception was about."""
        try:
            work.wait()
        except RuntimeError as error:
            self._in_progress.discard(work)
            raise failure_of(str(error)) from error

    def end(self) -> None:
        """Keep the library's thread out of torch from now on."""
        if self._process != os.getpid():
            return
        self._ended = True
        if self._inside_torch.acquire(timeout=_GRACE_S):
            self._inside_torch.release()
        if self._keep_what_is_stuck() or self._was_used:
            self._stopped.wait(_GRACE_S)

    def _keep_what_is_stuck(self) -> bool:
        """A backend that waits for a rank does not let go of its threads: such a group is never freed."""
        stuck = bool(self._in_progress) and self._group is not None
        if stuck:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
        return stuck

    def stop(self) -> None:
        """Close the connections, which ends what the others wait for."""
        self._stopped.set()
        if self._ended or self._process != os.getpid() or self._keep_what_is_stuck():
            return
        group, self._group = self._group, None
        # What is enqueued for a rank that has gone would keep the device busy for ever, and destroying waits for it.
        abort = getattr(dist.distributed_c10d, "_abort_process_group", None) if self._enqueues else None
        for end in (abort, dist.destroy_process_group):
            if end is None:
                continue
            with contextlib.suppress(AssertionError, RuntimeError, ValueError):  # the program has destroyed all before
                end(group)
                return


def failure_of(text: str) -> PeerFailed | TransportFailed:
    """In one line; the cause has the rest."""
    line = text.splitlines()[0] if text else "no text"
    if any(sign in text.lower() for sign in _SIGNS_OF_DEATH):
        return PeerFailed(line)
    return TransportFailed(line)


def family(transport: str) -> str:
    """The transport that is meant, without wrappers and options: "shm" of "trace=run.json,shm:copy"."""
    if transport == "auto":
        transport = os.environ.get("LAYERSHARD_TRANSPORT") or transport
    return transport.rsplit(",", 1)[-1].split(":")[0]


def collectives_for(
    group: Any, transport: str, memory: str, device: torch.device | None = None
) -> ProcessGroupCollectives | None:
    """What a group of this transport needs of torch.distributed: collective. None where the library needs nothing:
    ranks of one host connect in its own ways, which "auto" prefers. "fabric" carries no layer by it.
    """
    name = family(transport)
    if name not in ("auto", "callback", "fabric"):
        return None
    if name == "auto":
        hosts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        if len(set(hosts)) == 1:
            return None
    return ProcessGroupCollectives(group, None if memory == "host" else device)

# SPDX-License-Identifier: Apache-2.0
"""torch.distributed as the transport "callback": any backend that has broadcast and all-gather carries the layers.

The collectives run in a thread of the library, in a process group of their own, so that they never come between the
model's. Knows torch.distributed's public calls; nothing of modules or layers.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import threading
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..errors import Aborted, PeerFailed, TransportFailed

if TYPE_CHECKING:
    from collections.abc import Callable

# The library has the deadlines: what waits for a late rank is waited for again, so torch must not give up before it.
_NEVER = timedelta(days=30)
_GRACE_S = 2.0
_SIGNS_OF_DEATH = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "not connected")


# Named all_gather_single from torch 2.13 on.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

_open: weakref.WeakSet[ProcessGroupCollectives] = weakref.WeakSet()


@atexit.register
def _end_open() -> None:
    """The library's thread must be out of torch when the interpreter ends: there is no way back into it."""
    for collectives in list(_open):
        collectives.end()


def _backend_for_host_memory(group: Any) -> str:
    """The group's own for the processor's memory ("cpu:gloo,cuda:nccl"), else gloo: nccl, hccl and xccl have none."""
    pairs = str(dist.get_backend_config(group)).split(",")
    by_device = dict(pair.split(":", 1) for pair in pairs if ":" in pair)
    return by_device.get("cpu", "gloo")


def _bytes_at(address: int, count: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=torch.uint8)


class ProcessGroupCollectives:
    """The collectives that layershard.Group takes as `callbacks`, and an `allgather` for it. Collective to make."""

    def __init__(self, group: Any) -> None:
        self._ranks = dist.get_process_group_ranks(group)
        everyone = len(self._ranks) == dist.get_world_size()
        self._group: Any = dist.new_group(
            self._ranks,
            timeout=_NEVER,
            backend=_backend_for_host_memory(group),
            use_local_synchronization=not everyone,
        )
        self._in_progress: set[Any] = set()
        self._inside_torch = threading.Lock()
        self._ended = False
        self._stopped = threading.Event()
        _open.add(self)

    def exchange(self, mine: bytes) -> list[bytes]:
        """Give these bytes, get those of all ranks, which are as many. For Group's `allgather`."""
        parts = [torch.empty(len(mine), dtype=torch.uint8) for _ in self._ranks]
        dist.all_gather(parts, torch.frombuffer(bytearray(mine), dtype=torch.uint8), group=self._group)
        return [bytes(part.numpy()) for part in parts]

    def broadcast(self, address: int, count: int, root: int) -> Any:
        tensor = _bytes_at(address, count)
        return self._start(lambda: dist.broadcast(tensor, src=self._ranks[root], group=self._group, async_op=True))

    def allgather(self, send: int, receive: int, count: int) -> Any:
        every = _bytes_at(receive, count * len(self._ranks))
        mine = _bytes_at(send, count)
        return self._start(lambda: _all_gather(every, mine, group=self._group, async_op=True))

    def _start(self, collective: Callable[[], Any]) -> Any:
        with self._inside_torch:
            if self._ended:
                raise PeerFailed("this process is ending")
            try:
                work = collective()
            except RuntimeError as error:
                raise _failure(str(error)) from error
            self._in_progress.add(work)
        return work

    def finish(self, work: Any, timeout_ms: int) -> bool:
        with self._inside_torch:
            if self._ended:
                raise Aborted("this process is ending")
            return self._wait(work, timeout_ms)

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
            raise _failure(str(error)) from error

    def end(self) -> None:
        """Keep the library's thread out of torch from now on."""
        self._ended = True
        if self._inside_torch.acquire(timeout=_GRACE_S):
            self._inside_torch.release()
        if self._keep_what_is_stuck():
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
        if self._ended or self._keep_what_is_stuck():
            return
        group, self._group = self._group, None
        try:
            dist.destroy_process_group(group)
        except (AssertionError, RuntimeError, ValueError):
            pass  # the program has destroyed all groups before


def _failure(text: str) -> Exception:
    """In one line; the cause has the rest."""
    line = text.splitlines()[0] if text else "no text"
    if any(sign in text.lower() for sign in _SIGNS_OF_DEATH):
        return PeerFailed(line)
    return TransportFailed(line)


def collectives_for(group: Any, transport: str, memory: str) -> ProcessGroupCollectives | None:
    """What a group of this transport needs of torch.distributed: collective. None where the library needs nothing:
    ranks of one host meet in its own ways, which "auto" prefers.
    """
    if transport == "auto":
        transport = os.environ.get("LAYERSHARD_TRANSPORT") or transport
    name = transport.rsplit(",", 1)[-1].split(":")[0]
    if name not in ("auto", "callback") or memory != "host":
        return None
    if name == "auto":
        hosts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        if len(set(hosts)) == 1:
            return None
    return ProcessGroupCollectives(group)

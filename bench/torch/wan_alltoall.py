# SPDX-License-Identifier: Apache-2.0
"""The all-to-alls of a model that diffusers runs context-parallel: what carries them, and how long each takes.

diffusers calls one function for each of them, which is wrapped here. Where two ranks have one GPU, NCCL refuses and
gloo goes through the host; there copies inside the GPU take their place, from memory that the ranks opened for each
other: the same bytes move and the same values come out.

Knows torch, CUDA's events and diffusers' function; nothing of models or of layershard.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

CARRIERS = ("auto", "nccl", "gloo", "ipc")
TEXTS = {"nccl": "NCCL", "gloo": "gloo, through the host", "ipc": "copies inside the one GPU (CUDA IPC)"}
Exchange = Callable[[torch.Tensor, Any], torch.Tensor]


def carrier_of(wanted: str, ranks: Any) -> str:
    """What "auto" means; refused is what cannot be."""
    possible = ("ipc", "gloo") if ranks.shares_device else ("nccl",) if ranks.on_gpus else ("gloo",)
    if wanted == "auto":
        return possible[0]
    if wanted not in possible:
        raise ValueError(f"all-to-alls by {wanted}: on these devices it can be {' or '.join(possible)}")
    return wanted


class _Counters:
    """One number a rank, in a file that all of them map: how many exchanges its host has begun."""

    DEADLINE_S = 60

    def __init__(self, ranks: Any) -> None:
        size = mmap.ALLOCATIONGRANULARITY
        path = None
        if ranks.rank == 0:
            descriptor, path = tempfile.mkstemp(prefix="layershard-wan-")
            os.ftruncate(descriptor, size)
            os.close(descriptor)
        path = ranks.first(path)
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        ranks.barrier()
        if ranks.rank == 0:
            os.unlink(path)
        self._begun = (ctypes.c_int64 * ranks.size).from_buffer(self._map)
        self._rank = ranks.rank

    def begin(self, number: int) -> None:
        """After this rank's part is in the stream; then wait until that of all others is in theirs."""
        self._begun[self._rank] = number
        end = time.monotonic() + self.DEADLINE_S
        while min(self._begun) < number:
            if time.monotonic() > end:
                late = [rank for rank, begun in enumerate(self._begun) if begun < number]
                raise TimeoutError(f"rank {self._rank}: all-to-all {number}: ranks {late} have not begun it")
            time.sleep(0)


class CopiesInside:
    """All-to-all of ranks that have one GPU. The host waits for the others' hosts, the stream for the others' streams.

    There are two places, used in turn: what this rank writes into one, all others have read before, since their streams
    had read it when they wrote the other one, which this rank's stream has waited for.
    """

    PLACES = 2

    def __init__(self, ranks: Any, nbytes: int) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        self._rank, self._size = ranks.rank, ranks.size
        self._mine = [torch.empty(nbytes, dtype=torch.uint8, device=ranks.device) for _ in range(self.PLACES)]
        self._ready = [torch.cuda.Event(interprocess=True) for _ in range(self.PLACES)]
        for event in self._ready:
            event.record()
        torch.cuda.synchronize(ranks.device)
        given = [reduce_tensor(place) for place in self._mine], [event.ipc_handle() for event in self._ready]
        self._theirs: dict[int, list[torch.Tensor]] = {}
        self._events: dict[int, list[Any]] = {}
        for rank, (places, handles) in enumerate(ranks.gather(given)):
            if rank != ranks.rank:
                self._theirs[rank] = [rebuild(*arguments) for rebuild, arguments in places]
                self._events[rank] = [torch.cuda.Event.from_ipc_handle(ranks.device, handle) for handle in handles]
        self._counters = _Counters(ranks)
        self._number = 0

    def __call__(self, x: torch.Tensor, _group: Any) -> torch.Tensor:
        place, self._number = self._number % self.PLACES, self._number + 1
        sent = x.contiguous().view(-1).view(torch.uint8)
        part = sent.numel() // self._size
        self._mine[place][: sent.numel()].copy_(sent)
        self._ready[place].record()
        self._counters.begin(self._number)
        out = torch.empty_like(sent)
        for rank in range(self._size):
            if rank != self._rank:
                self._events[rank][place].wait()
            whole = sent if rank == self._rank else self._theirs[rank][place]
            out[rank * part : (rank + 1) * part].copy_(whole[self._rank * part : (self._rank + 1) * part])
        return out.view(x.dtype).view(x.shape)


class AllToAlls:
    """In place of diffusers' function while it is installed. Times each call when it is told to.

    Without NCCL it gathers the model's output too, once a pass: gloo's gather takes GPU memory for the host's.
    """

    def __init__(self, ranks: Any, carrier: str, largest: int) -> None:
        from diffusers.hooks.context_parallel import EquipartitionSharder
        from diffusers.models import attention_dispatch

        self._module = attention_dispatch
        self._original: Exchange = attention_dispatch._all_to_all_single
        self._sharder: Any = EquipartitionSharder
        self._gathers = carrier != "nccl"
        self._original_gather = vars(EquipartitionSharder)["unshard"]
        self._exchange = CopiesInside(ranks, largest) if carrier == "ipc" else self._original
        self._on_gpus = ranks.on_gpus
        self._marks: list[tuple[Any, Any]] | None = None

    def install(self) -> None:
        self._module._all_to_all_single = self
        if self._gathers:
            self._sharder.unshard = staticmethod(self.gather)

    def remove(self) -> None:
        self._module._all_to_all_single = self._original
        self._sharder.unshard = self._original_gather

    def gather(self, x: torch.Tensor, dim: int, mesh: Any) -> torch.Tensor:
        """Every rank's @x, one behind the other along @dim: each rank sends the same to all."""
        everyones = self._exchange(torch.stack([x] * mesh.size()), mesh.get_group())
        return torch.cat(list(everyones), dim)

    def _mark(self) -> Any:
        if not self._on_gpus:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, x: torch.Tensor, group: Any) -> torch.Tensor:
        if self._marks is None:
            return self._exchange(x, group)
        begin = self._mark()
        out = self._exchange(x, group)
        self._marks.append((begin, self._mark()))
        return out

    def timed(self, work: Callable[[], Any]) -> list[float]:
        """Seconds of each all-to-all in @work on the stream of the compute, in order."""
        self._marks = []
        try:
            work()
            if self._on_gpus:
                torch.cuda.synchronize()
                return [begin.elapsed_time(end) / 1e3 for begin, end in self._marks]
            return [end - begin for begin, end in self._marks]
        finally:
            self._marks = None

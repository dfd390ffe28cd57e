# SPDX-License-Identifier: Apache-2.0
"""The ranks of a bench: how they are started, how they find each other, and what each tells the others. Their own
group, of host memory, never carries what is measured.

Knows torch.distributed and processes; nothing of what the ranks do.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def devices_of(text: str | None) -> list[torch.device]:
    """ "0,1", "0,0", "cpu,cpu", one a rank. By default all GPUs, or the only one twice, or the processor twice.
    ValueError, with what may be given: text is something else."""
    if text is None:
        count = torch.cuda.device_count()
        text = ",".join(map(str, range(count))) if count > 1 else "0,0" if count == 1 else "cpu,cpu"
    parts = text.split(",")
    if not all(part == "cpu" or part.isdecimal() for part in parts) or 0 < parts.count("cpu") < len(parts):
        raise ValueError(f"'{text}' is not one device a rank: GPUs such as 0,1, or cpu,cpu")
    return [torch.device("cpu") if part == "cpu" else torch.device("cuda", int(part)) for part in parts]


def launch(size: int) -> int | None:
    """Start this script again as @size ranks and wait for them: their status. None in a rank, also of torchrun's.

    When one rank fails the others are ended, since they would wait for it.
    """
    if "RANK" in os.environ:
        return None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ, WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [sys.executable, *sys.argv]
    processes = [
        subprocess.Popen(command, env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(size)
    ]
    try:
        while all(rank.poll() in (None, 0) for rank in processes) and any(rank.poll() is None for rank in processes):
            time.sleep(0.05)
        # The rank that failed first has said why; its peers may still have to say that they miss it.
        end = time.monotonic() + (10 if any(rank.poll() for rank in processes) else 0)
        while time.monotonic() < end and any(rank.poll() is None for rank in processes):
            time.sleep(0.05)
    finally:
        for rank in processes:
            if rank.poll() is None:
                rank.kill()
        statuses = [rank.wait() for rank in processes]
    return next((1 if status < 0 else status for status in statuses if status), 0)


@dataclasses.dataclass
class Ranks:
    """The ranks of a run and this one's place among them. Its own group, of host memory, never carries what is
    measured."""

    rank: int
    size: int
    devices: list[torch.device]
    group: Any
    began_s: float = dataclasses.field(default_factory=time.monotonic)
    _noted_s: float = -math.inf
    _NOTE_EVERY_S = 10.0

    @property
    def device(self) -> torch.device:
        return self.devices[self.rank]

    @property
    def on_gpus(self) -> bool:
        return self.device.type == "cuda"

    @property
    def shares_device(self) -> bool:
        """Two ranks on one GPU."""
        return self.on_gpus and len(set(self.devices)) < self.size

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def gather(self, mine: Any) -> list[Any]:
        """What every rank gave, on all ranks."""
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, mine, group=self.group)
        return everyones

    def first(self, mine: Any) -> Any:
        """What rank 0 gave."""
        return self.gather(mine)[0]

    def agree(self, trouble: str | None) -> str | None:
        """The first trouble that any rank has: the same on all."""
        return next((each for each in self.gather(trouble) if each), None)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Progress: for whoever looks on; in a file now and then."""
        if self.rank != 0:
            return
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif text and time.monotonic() - self._noted_s > self._NOTE_EVERY_S:
            self._noted_s = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def minutes_each(self, minutes: float | None, tables: int) -> float | None:
        """What each of so many tables may take of what is left of the @minutes since the ranks met."""
        return None if minutes is None else (minutes - (time.monotonic() - self.began_s) / 60) / tables

    def synchronize(self) -> None:
        if self.on_gpus:
            torch.cuda.synchronize(self.device)


def join(devices: Sequence[torch.device], timeout_s: float = 600) -> Ranks:
    """Find the other ranks. The default group has gloo for the processor and, where each rank has a GPU of its own,
    NCCL for GPUs: NCCL refuses two ranks on one."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if len(devices) != size:
        raise SystemExit(f"{size} ranks were started for {len(devices)} devices: give as many with --devices")
    device = devices[rank]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own_gpus = device.type == "cuda" and len(set(devices)) == size
    limit = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own_gpus else "gloo", timeout=limit, device_id=device if own_gpus else None
    )
    return Ranks(rank, size, list(devices), dist.new_group(backend="gloo", timeout=limit))


def leave(ranks: Ranks) -> None:
    ranks.synchronize()
    ranks.barrier()
    dist.destroy_process_group()


def run(devices: Sequence[torch.device], work: Callable[[Ranks], int]) -> int:
    """Start this script again as a rank for each device, where @work says the exit status; then that of all."""
    status = launch(len(devices))
    if status is not None:
        return status
    ranks = join(devices)
    with torch.no_grad():
        status = work(ranks)
    leave(ranks)
    return status

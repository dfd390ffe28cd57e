# SPDX-License-Identifier: Apache-2.0
"""From what a torch program has (a process group, a mesh, torchrun's environment, nothing) to a layershard group.

Knows torch.distributed's public calls and the environment; nothing of modules or layers.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..group import Group
from .distributed import collectives_for
from .refusals import Refused

_numbers = itertools.count()


def process_group(group: Any) -> Any:
    """The ProcessGroup meant: itself, a one-dimensional DeviceMesh's, the default one, or None without any."""
    if group is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if hasattr(group, "get_group"):
        if getattr(group, "ndim", 1) != 1:
            raise Refused(f"the mesh has {group.ndim} dimensions: pass one of them, mesh['name']")
        return group.get_group()
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        return group
    raise Refused(f"group is a {type(group).__name__}; it must be a ProcessGroup, a DeviceMesh's dimension or None")


def _job() -> str | None:
    """A name that the ranks of one torchrun share, where the user gave none. Each call is a new meeting."""
    job = os.environ.get("LAYERSHARD_JOB")
    if job is None and "TORCHELASTIC_RUN_ID" in os.environ:
        job = f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ.get('MASTER_PORT', '')}"
    return None if job is None else f"{job}.torch{next(_numbers)}"


def _alone() -> bool:
    return not any(name in os.environ for name in ("LAYERSHARD_JOB", "LAYERSHARD_SIZE", "TORCHELASTIC_RUN_ID"))


def memory_of(device: torch.device) -> str:
    if device.type == "cuda":
        return "cuda"
    if device.type == "cpu":
        return "host"
    raise Refused(f"weights are on {device}: the library keeps layers in host memory or on NVIDIA's GPUs")


def open_group(group: Any, transport: str, device: torch.device, timeout_ms: int | None) -> Group:
    """Meet the other ranks: collective."""
    options: dict[str, Any] = {
        "transport": None if transport == "auto" else transport,
        "timeout_ms": timeout_ms,
        "memory": memory_of(device),
        "device": device.index if device.type == "cuda" and device.index is not None else _current(device),
    }
    pg = process_group(group)
    if pg is not None:
        collectives = collectives_for(pg, transport, options["memory"])
        exchange = _allgather(pg) if collectives is None else collectives.exchange
        return Group(dist.get_rank(pg), dist.get_world_size(pg), allgather=exchange, callbacks=collectives, **options)
    if _alone():
        return Group(0, 1, **options)
    return Group(job=_job(), **options)


def _allgather(pg: Any) -> Callable[[bytes], list[bytes]]:
    """How the library's ranks meet through torch.distributed: while the group is created, and never again."""

    def allgather(mine: bytes) -> list[bytes]:
        parts: list[bytes] = [b""] * dist.get_world_size(pg)
        dist.all_gather_object(parts, mine, group=pg)
        return parts

    return allgather


def _current(device: torch.device) -> int:
    return torch.cuda.current_device() if device.type == "cuda" else 0

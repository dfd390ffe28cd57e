# SPDX-License-Identifier: Apache-2.0
"""How much memory is free where layers are to live, and with whom this process shares it.

Knows torch's counters of a GPU, and what Linux says of a host: /proc, cgroups, limits. Changes nothing but torch's
cache, of which it gives back what nobody uses.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ADDRESSES = "address space"
_NO_LIMIT = 2**60  # what version 1 of cgroups says is a little less than 2**63


@dataclass(frozen=True)
class Free:
    """What this process found. A pool that others name, too, is theirs as well; its name begins with words for people,
    up to the colon."""

    pools: dict[str, int] = field(default_factory=dict)
    cached: int = 0  # bytes that are free for this process' tensors alone


def free_memory(device: torch.device, memory: str) -> Free:
    """Of what layers on @device are made from, where @memory ("library", "torch") says whose."""
    return _on_gpu(device, memory) if device.type == "cuda" else Free(dict(host_pools()))


def _on_gpu(device: torch.device, memory: str) -> Free:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    cached = reserved - torch.cuda.memory_allocated(device)
    pools = {f"GPU:{torch.cuda.get_device_properties(device).uuid}": free}
    if memory == "torch":
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        pools[f"part of the GPU that torch may use:{_host()}:{os.getpid()}"] = max(0, allowed - reserved)
    return Free(pools, cached)


# ---- The host's ----


def host_pools(root: Path = Path("/")) -> Iterator[tuple[str, int]]:
    """What limits memory of this process, by name, and what is free of it."""
    available = _field(root / "proc/meminfo", "MemAvailable:")
    if available is not None:
        yield f"host's memory:{_host(root)}", 1024 * available
    yield from _cgroups(root)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _number(root / "proc/self/statm")
    if limit != resource.RLIM_INFINITY and used is not None:
        yield f"{ADDRESSES}:{_host(root)}:{os.getpid()}", max(0, limit - used * resource.getpagesize())


def _host(root: Path = Path("/")) -> str:
    return _text(root / "proc/sys/kernel/random/boot_id").strip()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The first word of a file, if it is a number: not "max", and not of a file that is not there."""
    word = (_text(path).split() or [""])[0]
    return int(word) if word.isdigit() else None


def _field(path: Path, name: str) -> int | None:
    return next((int(line.split()[1]) for line in _text(path).splitlines() if line.split()[:1] == [name]), None)


def _cgroups(root: Path) -> Iterator[tuple[str, int]]:
    """The process' own and those above it, of both versions. In a container the names in /proc may be the host's, of
    which nothing is to be seen: then what is mounted there is the container's."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(top):
                break
            free = _free_of(folder, *files)
            if free is not None:
                found = folder.stat()
                yield f"cgroup's limit:{_host(root)}:{found.st_dev}:{found.st_ino}", free


def _free_of(folder: Path, limit_file: str, used_file: str, reclaimable: str) -> int | None:
    """What was read from files and is not in use counts as free, as it does in MemAvailable."""
    limit, used = _number(folder / limit_file), _number(folder / used_file)
    if limit is None or used is None or limit >= _NO_LIMIT:
        return None
    return max(0, min(limit, limit - used + (_field(folder / "memory.stat", reclaimable) or 0)))

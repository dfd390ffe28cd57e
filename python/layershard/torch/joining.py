# SPDX-License-Identifier: Apache-2.0
"""From what a torch program has (a process group, a mesh, torchrun's environment, nothing) to a layershard group.

Knows torch.distributed's public calls and the environment; nothing of modules or layers.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .._library import library
from ..errors import Error, LibraryError, Mismatch, Timeout
from ..group import Group
from ..planning import discover
from ..series import Tensor
from .distributed import collectives_for, failure_of, family
from .layout import NAME_LIMIT
from .refusals import Refused

_LOOK_S = 0.001  # how often a wait for other ranks looks up, and Ctrl-C ends it
_TEXT_BYTES = 512  # of what a rank gives the others to read when they join


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
    """A name that the ranks of one launch share, the launcher's where the user gave none. The same for every call: all
    have joined one group before the next can begin, and a rank that has failed alone joins the others by it when they
    try again."""
    found = discover()
    job = os.environ.get("LAYERSHARD_JOB") or (found.job if found else None)
    return None if job is None else f"{job}.torch"


def _alone() -> bool:
    return not any(name in os.environ for name in ("LAYERSHARD_JOB", "LAYERSHARD_SIZE", "TORCHELASTIC_RUN_ID"))


def memory_of(device: torch.device) -> str:
    if device.type == "cuda":
        return "cuda"
    if device.type == "cpu":
        return "host"
    raise Refused(f"weights are on {device}: the library keeps layers in host memory or on NVIDIA's GPUs")


def open_group(group: Any, transport: str, device: torch.device, timeout_ms: int | None) -> Group:
    """Join the other ranks: collective."""
    options: dict[str, Any] = {
        "transport": None if transport == "auto" else transport,
        "timeout_ms": timeout_ms,
        "memory": memory_of(device),
        "device": device.index if device.type == "cuda" and device.index is not None else _current(device),
    }
    pg = process_group(group)
    if pg is not None:
        _await_library(pg, timeout_ms)
        _agree_on_transport(pg, transport, options["memory"], timeout_ms)
        collectives = collectives_for(pg, transport, options["memory"], device)
        exchange = _allgather(pg, timeout_ms) if collectives is None else collectives.exchange
        return Group(dist.get_rank(pg), dist.get_world_size(pg), allgather=exchange, callbacks=collectives, **options)
    if _alone():
        return Group(0, 1, **options)
    return Group(job=_job(), **options)


def refuse_to_all(
    refusal: Exception, group: Any, transport: str, device: torch.device, timeout_ms: int | None
) -> NoReturn:
    """Raise what this rank alone may have found. The others wait for it: so it joins them and tells them."""
    with suppress(Error, ValueError):  # what went wrong first is what the caller must see
        pg = process_group(group)
        if pg is not None:
            await_ranks(pg, timeout_ms, f"refused: {refusal}")
        elif not _alone():
            _refuse_by_name(f"refused: {refusal}", transport, device, timeout_ms)
    raise refusal


def _refuse_by_name(text: str, transport: str, device: torch.device, timeout_ms: int | None) -> None:
    """A series that nobody else opens: the library's own comparison tells the others its name."""
    with open_group(None, transport, device, timeout_ms) as ranks:
        if ranks.size > 1:
            name = text.encode()[:NAME_LIMIT].decode(errors="ignore")
            ranks.series(name, first_layer=0, layer_count=1, tensors=[Tensor("refused", 1)])


# ---- Through torch.distributed ----


def _deadline(timeout_ms: int | None) -> float:
    """When a wait is over; without a number of the caller's the process group's own timeout ends it."""
    if timeout_ms is None:
        timeout_ms = int(os.environ.get("LAYERSHARD_TIMEOUT_MS") or 0)
    return time.monotonic() + timeout_ms / 1e3 if timeout_ms else float("inf")


def _never_free(pg: Any) -> None:
    """Of a group in which a collective is stuck: to free it would wait for what is stuck, also when Python ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pg))


def _finish(start: Callable[[], Any], pg: Any, timeout_ms: int | None) -> None:
    """A collective. torch's own wait would not end by Ctrl-C, nor before the process group's timeout."""
    begin, deadline = time.monotonic(), _deadline(timeout_ms)
    try:
        work = start()
        _await(work, pg, begin, deadline)
        work.wait()
    except RuntimeError as error:
        failure = failure_of(f"the ranks of the process group could not exchange what they need to join: {error}")
        failure.rank = dist.get_rank(pg)
        raise failure from error


def _await(work: Any, pg: Any, begin: float, deadline: float) -> None:
    try:
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise Timeout(
                    f"waited {1e3 * (time.monotonic() - begin):.0f} ms for the other ranks of the process group: at "
                    f"least one of its {dist.get_world_size(pg)} has not made this call of layershard.torch",
                    rank=dist.get_rank(pg),
                )
            time.sleep(_LOOK_S)
    except BaseException:
        _never_free(pg)
        raise


def _device_of_collectives(pg: Any) -> torch.device:
    """Where the group's backend wants tensors: host memory if it takes that at all."""
    backends = str(dist.get_backend_config(pg)).split(",")
    kinds = [each.split(":", 1)[0] for each in backends if ":" in each]
    if not kinds or "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


def _allgather(pg: Any, timeout_ms: int | None) -> Callable[[bytes], list[bytes]]:
    """How the library's ranks exchange records by torch.distributed: while the group is created, and never again."""

    def allgather(mine: bytes) -> list[bytes]:
        device = _device_of_collectives(pg)
        parts = [torch.empty(len(mine), dtype=torch.uint8, device=device) for _ in range(dist.get_world_size(pg))]
        given = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
        _finish(lambda: dist.all_gather(parts, given, group=pg, async_op=True), pg, timeout_ms)
        return [bytes(part.cpu().numpy()) for part in parts]

    return allgather


def _texts(pg: Any, timeout_ms: int | None, mine: str) -> list[str]:
    """Every rank's text, in rank order."""
    texts = _allgather(pg, timeout_ms)(mine.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0"))
    return [text.rstrip(b"\0").decode(errors="replace") for text in texts]


def await_ranks(pg: Any, timeout_ms: int | None = None, refusal: str = "") -> None:
    """Until all ranks of the process group are here, so that what torch waits for, and Ctrl-C does not end, is short.
    Where one of them is here to say that it cannot take part, the others raise that."""
    for rank, text in enumerate(_texts(pg, timeout_ms, refusal)):
        if text and not refusal:
            raise Mismatch(f"rank {dist.get_rank(pg)}: rank {rank} {text}", rank=dist.get_rank(pg))


def _agree_on_transport(pg: Any, transport: str, memory: str, timeout_ms: int | None) -> None:
    """What torch's collectives are asked for depends on these; ranks that make different ones end each other."""
    asked = _texts(pg, timeout_ms, f"transport '{family(transport)}' for {memory} memory")
    for rank, text in enumerate(asked):
        if text != asked[0]:
            differs = f"rank 0 asks for {asked[0]}, rank {rank} for {text}: give all ranks the same"
            raise Mismatch(differs, rank=dist.get_rank(pg))


def _await_library(pg: Any, timeout_ms: int | None) -> None:
    """A rank that has no library could not join the others by it."""
    try:
        library()
    except LibraryError as error:
        await_ranks(pg, timeout_ms, f"cannot take part: {error}")
        raise
    await_ranks(pg, timeout_ms)


def _current(device: torch.device) -> int:
    return torch.cuda.current_device() if device.type == "cuda" else 0

# SPDX-License-Identifier: Apache-2.0
"""From the ranks that are meant (see membership) to a layershard group in which they are.

Knows torch.distributed's public calls; nothing of modules or layers.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from .._library import library
from ..errors import Error, LibraryError, Mismatch, NotSupported, Timeout
from ..group import Group
from ..planning import transports
from ..series import Tensor
from .distributed import collectives_for, failure_of, family
from .layout import NAME_LIMIT
from .membership import Meant, Named, warn_of_contradiction
from .refusals import Refused

_LOOK_S = 0.001  # how often a wait for other ranks looks up, and Ctrl-C ends it
_TEXT_BYTES = 512  # of what a rank gives the others to read when they join


def memory_of(device: torch.device) -> str:
    if device.type == "cuda":
        return "cuda"
    if device.type == "cpu":
        return "host"
    raise Refused(f"weights are on {device}: the library keeps layers in host memory or on NVIDIA's GPUs")


def refuse_unfit(meant: Meant, transport: str, device: torch.device, timeout_ms: int | None) -> None:
    """A group of the caller's is as it was made: what is asked for beside it must not differ."""
    if not isinstance(meant, Group):
        return
    if transport != "auto" or timeout_ms is not None:
        name = "transport" if transport != "auto" else "timeout_ms"
        raise Refused(f"{name} is given beside a layershard.Group, which has its own: give it to Group, and not here")
    memory, index = memory_of(device), device.index if device.type == "cuda" else 0
    if (memory, index) != (meant.memory, meant.device if memory == "cuda" else 0):
        there = f"on cuda:{meant.device}" if meant.memory == "cuda" else "in host memory"
        raise Refused(
            f"weights are on {device}, and the layershard.Group keeps layers {there}: make it with memory='{memory}'"
            + (f", device={index}" if memory == "cuda" else "")
        )


def open_group(meant: Meant, transport: str, device: torch.device, timeout_ms: int | None) -> Group:
    """Join the other ranks: collective. A group that is given is returned."""
    ranks = meant if isinstance(meant, Group) else _join(meant, transport, device, timeout_ms)
    warn_of_contradiction(ranks.rank, ranks.size)
    return ranks


def _join(meant: Any, transport: str, device: torch.device, timeout_ms: int | None) -> Group:
    options: dict[str, Any] = {
        "transport": None if transport == "auto" else transport,
        "timeout_ms": timeout_ms,
        "memory": memory_of(device),
        "device": device.index if device.type == "cuda" and device.index is not None else _current(device),
    }
    if isinstance(meant, Named):
        with _other_memory_explained(transport, device):
            return Group(meant.rank, meant.size, job=meant.job, **options)
    _await_library(meant, timeout_ms)
    _agree_on_transport(meant, transport, options["memory"], timeout_ms)
    collectives = collectives_for(meant, transport, options["memory"], device)
    exchange = _allgather(meant, timeout_ms) if collectives is None else collectives.exchange
    rank, size = dist.get_rank(meant), dist.get_world_size(meant)
    with _other_memory_explained(transport, device):
        return Group(rank, size, allgather=exchange, callbacks=collectives, **options)


@contextmanager
def _other_memory_explained(transport: str, device: torch.device) -> Iterator[None]:
    """The library says which memory a transport carries; what to do about it depends on the model."""
    try:
        yield
    except NotSupported as error:
        carried = {each.name: each.memory for each in transports()}.get(family(transport))
        if carried is None or carried == memory_of(device):
            raise
        there, other = ("cuda", "shm") if device.type == "cpu" else ("cpu", "cuda")
        advice = f"the weights are on {device}: move the model to {there} first, or take transport='{other}'"
        raise NotSupported(f"{error.text}; {advice}", rank=error.rank) from error


@contextmanager
def left_on_failure(ranks: Group, is_lent: bool) -> Iterator[None]:
    """If the body fails, what it has opened is closed: of a group of the caller's the series, else all of it."""
    before = ranks.open_series
    try:
        yield
    except BaseException:
        if is_lent:
            for series in set(ranks.open_series) - set(before):
                with suppress(Error):  # what went wrong first is what the caller must see
                    series.close()
        else:
            ranks.close()
        raise


def refuse_to_all(
    refusal: Exception, meant: Meant, transport: str, device: torch.device, timeout_ms: int | None
) -> NoReturn:
    """Raise what this rank alone may have found. The others wait for it: so it joins them and tells them."""
    text = f"refused: {refusal}"
    with suppress(Error, ValueError):  # what went wrong first is what the caller must see
        if isinstance(meant, Group):
            _refuse_by_name(text, meant)
        elif not isinstance(meant, Named):
            await_ranks(meant, timeout_ms, text)
        elif meant.size != 1:
            with _join(meant, transport, device, timeout_ms) as ranks:
                _refuse_by_name(text, ranks)
    raise refusal


def _refuse_by_name(text: str, ranks: Group) -> None:
    """A series that nobody else opens: the library's own comparison tells the others its name."""
    if ranks.size > 1:
        name = text.encode()[:NAME_LIMIT].decode(errors="ignore")
        ranks.series(name, first_layer=0, layer_count=1, tensors=[Tensor("refused", 1)]).close()


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

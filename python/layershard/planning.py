# SPDX-License-Identifier: Apache-2.0
"""What can be asked without a group: what a series would cost, which transports there are, where ranks are found."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import _declarations as c
from ._library import library
from .errors import OutOfRange, error_of
from .series import Tensor, series_options, unsigned

_MEMORY_WORDS = {number: word for word, number in c.MEMORY.items()}


@dataclass(frozen=True)
class Plan:
    """What a series would cost and gain on one rank. Bytes, nanoseconds, counts."""

    layer_bytes: int
    replicated_bytes: int
    shard_bytes: int
    window_bytes: int
    resident_bytes: int
    windows: int
    residents: int
    fetched_layers: int
    shortest_distance: int
    below_k: tuple[int, ...]
    below_k_count: int
    pass_ns: int
    exposed_ns: int
    transfer_ns: int
    captured_pass_ns: int


@dataclass(frozen=True)
class Transport:
    """A transport of this build; `reason` says why it is not available here."""

    name: str
    summary: str
    available: bool
    reason: str
    collective: bool
    caller_memory: bool
    memory: str


@dataclass(frozen=True)
class Variable:
    """An environment variable that the library reads."""

    name: str
    value: str
    default: str
    help: str


@dataclass(frozen=True)
class Node:
    """A NUMA node of this machine. `usable`: it has processors, and memory that this process may use; `here`: this
    thread runs on it just now."""

    number: int
    usable: bool
    here: bool
    memory_bytes: int
    free_bytes: int
    processors: str


@dataclass(frozen=True)
class Discovered:
    """Rank and size as a Group without them finds them, where ("torchrun"), and the name the launcher gives its job."""

    rank: int
    size: int
    local_rank: int | None
    source: str
    job: str | None = None


def _check(status: int, text: bytes | None = None) -> None:
    if status < 0:
        raise error_of(status, (text or library().lshard_status_text(status)).decode(errors="replace"))


def plan(
    *,
    layer_count: int,
    tensors: Sequence[Tensor],
    size: int,
    rank: int = 0,
    prefetch: int = 1,
    placement: Literal["whole", "striped"] = "whole",
    resident_bytes: int = 0,
    poison: Literal["off", "ready", "on"] = "off",
    collective: bool = False,
    direct: int = 0,
    granule_bytes: int = 0,
    compute_ns: int = 0,
    link_bytes_per_s: int = 0,
    large_page_bytes: int = 0,
) -> Plan:
    """What a series would cost and gain on a rank, by the rules of run time. Times need compute_ns, of one layer, and
    link_bytes_per_s, into one rank. large_page_bytes (of ranks that share memory, direct=1; on most machines 2**21):
    stripes of many are cut at them."""
    options = series_options("plan", 0, layer_count, tensors, prefetch, placement, resident_bytes, poison)
    given = c.PlanInput(
        rank=rank,
        size=size,
        collective=collective,
        direct=direct,
        granule_bytes=unsigned("granule_bytes", granule_bytes, 64),
        compute_ns=unsigned("compute_ns", compute_ns, 64),
        link_bytes_per_s=unsigned("link_bytes_per_s", link_bytes_per_s, 64),
        large_page_bytes=unsigned("large_page_bytes", large_page_bytes, 64),
    )
    found = c.PlanResult()
    _check(library().lshard_plan(options, given, found))
    values = {name: getattr(found, name) for name in Plan.__dataclass_fields__ if name != "below_k"}
    return Plan(below_k=tuple(found.below_k[: min(found.below_k_count, c.BELOW_K_NAMED)]), **values)


def _listed(function: Any, kind: type[ctypes.Structure]) -> Iterator[Any]:
    """What one of the library's lists holds; it says RANGE past the last."""
    index = 0
    while True:
        found = kind()
        status = function(index, found)
        if status == OutOfRange.code:
            return
        _check(status)
        yield found
        index += 1


def transports() -> list[Transport]:
    """The transports of this build, in the order in which "auto" prefers them."""
    return [
        Transport(
            name=each.name.decode(),
            summary=each.summary.decode(),
            available=bool(each.available),
            reason=each.reason.decode(errors="replace"),
            collective=bool(each.collective),
            caller_memory=bool(each.caller_memory),
            memory=_MEMORY_WORDS.get(each.memory, str(each.memory)),
        )
        for each in _listed(library().lshard_transport_info, c.TransportDescription)
    ]


def variables() -> list[Variable]:
    """The environment variables that the library reads."""
    return [
        Variable(*(text.decode(errors="replace") for text in (each.name, each.value, each.default_value, each.help)))
        for each in _listed(library().lshard_variable_info, c.VariableDescription)
    ]


def nodes() -> list[Node]:
    """The NUMA nodes of this machine."""
    return [
        Node(
            number=each.number,
            usable=bool(each.usable),
            here=bool(each.here),
            memory_bytes=each.memory_bytes,
            free_bytes=each.free_bytes,
            processors=each.processors.decode(errors="replace"),
        )
        for each in _listed(library().lshard_node_info, c.NodeDescription)
    ]


def discover() -> Discovered | None:
    """Rank and size from the environment; None where nothing is set."""
    found = c.DiscoveredDescription()
    text = ctypes.create_string_buffer(1024)
    status = library().lshard_discover(found, ctypes.addressof(text), len(text))
    if status == c.STATUS["ERR_STATE"]:
        return None
    _check(status, text.value)
    local_rank = found.local_rank if found.local_rank >= 0 else None
    job = found.job.decode(errors="surrogateescape") or None
    return Discovered(found.rank, found.size, local_rank, found.source.decode(), job)

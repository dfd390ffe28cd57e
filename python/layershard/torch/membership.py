# SPDX-License-Identifier: Apache-2.0
"""Which ranks are meant: by what was given, else by torch.distributed, else by the environment.

Knows torch.distributed's groups and the launchers' variables; joins nobody.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch.distributed as dist

from ..errors import Error
from ..group import Group
from ..planning import Discovered, discover
from ..series import unsigned
from .refusals import Refused

_log = logging.getLogger("layershard")
_OURS = ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB")
_KEYS = ("rank", "size", "job")


@dataclass(frozen=True)
class Named:
    """Ranks of one host that find each other by a job's name; of size 1, this process alone. What is None the library
    finds in the environment."""

    rank: int | None = None
    size: int | None = None
    job: str | None = None


Meant: TypeAlias = Any  # a layershard.Group, which stays the caller's; Named; or a ProcessGroup


def meant_by(group: Any) -> Meant:
    """The ranks that an argument `group` means."""
    if isinstance(group, Group):
        if group.closed:
            raise Refused("group is a layershard.Group that has been closed: make another")
        return group
    if isinstance(group, Mapping):
        return _explicit(dict(group))
    if group is not None:
        return process_group(group)
    default = process_group(None)
    if default is not None and dist.get_world_size(default) > 1:
        return default
    if _is_asked() and (default is None or _size_of(discover()) > 1):
        return Named(job=_job(os.environ.get("LAYERSHARD_JOB"), discover()))
    return Named(0, 1) if default is None else default


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
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise Refused("this rank is not in the process group that it gives: only the ranks of the group call this")
    raise Refused(
        f"group is of type {type(group).__name__}; it must be a ProcessGroup, a DeviceMesh's dimension, a "
        f"layershard.Group, {{'rank': ..., 'size': ..., 'job': ...}} or None"
    )


# ---- By name ----


def _size_of(found: Discovered | None) -> int:
    return found.size if found else 1


def _is_asked() -> bool:
    """Whether the environment is meant for us, or torchrun's, which started these ranks to find each other."""
    return any(name in os.environ for name in (*_OURS, "TORCHELASTIC_RUN_ID"))


def _job(given: str | None, found: Discovered | None) -> str | None:
    """A name that the ranks of one launch share, the launcher's where the user gave none. The same for every call: all
    have joined one group before the next can begin, and a rank that has failed alone joins the others by it when they
    try again."""
    job = given or (found.job if found else None)
    return None if job is None else f"{job}.torch"


def _explicit(given: dict[str, Any]) -> Named:
    unknown = given.keys() - set(_KEYS)
    if unknown:
        raise Refused(f"group has {', '.join(map(repr, sorted(unknown, key=str)))}: a dict says rank, size and job")
    rank, size, job = (given.get(key) for key in _KEYS)
    if (rank is None) != (size is None):
        raise Refused(f"group gives rank {rank} of size {size}: give both, or neither to have them found")
    if job is not None and not (isinstance(job, str) and job):
        raise Refused(f"group's job is {job!r}: give the name by which the ranks find each other")
    found = discover() if rank is None or not job else None
    if rank is None:
        if found is None:
            raise Refused("group gives no rank, and no launcher says which this is: give rank and size, too")
        rank, size = found.rank, found.size
    rank, size = unsigned("rank", rank, 31), unsigned("size", size or 0, 31)
    if not rank < size:
        raise Refused(f"group gives rank {rank} of size {size}: the rank must be below the size")
    return _named(rank, size, job, found)


def _named(rank: int, size: int, job: str | None, found: Discovered | None) -> Named:
    """The launcher's name is of all that it has started: only ranks of just that may find each other by it."""
    variable = os.environ.get("LAYERSHARD_JOB")
    if job and variable and job != variable:
        _log.warning("job '%s' is given, which counts, and LAYERSHARD_JOB=%s is set, which does not", job, variable)
    is_launched = found is not None and (found.rank, found.size) == (rank, size)
    name = _job(job or variable, found if is_launched else None)
    if name is None and size > 1:
        raise Refused(
            f"rank {rank} of {size} has no name by which to find the others: give group a job, the same on all ranks, "
            f"or set LAYERSHARD_JOB"
        )
    return Named(rank, size, name)


# ---- What the environment says otherwise ----


def warn_of_contradiction(rank: int, size: int) -> None:
    """One line, where this is not the rank of those that the environment speaks of. Part of a launch is a group of its
    own, unless it is this rank alone."""
    try:
        found = discover()
    except Error as error:
        _log.warning("the environment was not asked which rank this is (it is %d of %d): %s", rank, size, error.text)
        return
    if found is None:
        if "LAYERSHARD_JOB" in os.environ and size == 1:
            job = os.environ["LAYERSHARD_JOB"]
            _log.warning("LAYERSHARD_JOB=%s is set, and nothing says which rank this is: it shares with nobody", job)
        return
    ours, is_part = found.source == "LAYERSHARD_*", 1 < size < found.size
    if (rank, size) != (found.rank, found.size) and (ours or not is_part):
        alone = ", and shares with nobody" if size == 1 else ""
        _log.warning(
            "this is rank %d of %d%s, as group= and torch.distributed have it; %s in the environment says rank %d of "
            "%d: if those ranks are meant, give group={} on all of them",
            rank,
            size,
            alone,
            found.source,
            found.rank,
            found.size,
        )

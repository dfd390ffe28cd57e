# SPDX-License-Identifier: Apache-2.0
"""What a torch.distributed operator gives other ranks, and what it receives from them.

Knows the operators' schemas; nothing of weights or of this library's ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..containers import tensors_in

_SPACES = ("c10d", "_c10d_functional", "c10d_functional", "symm_mem")
_RECEIVE = ("recv", "irecv")
_ONLY_WAIT = ("wait", "barrier", "monitored_barrier", "check_for_nan")


class Sent(NamedTuple):
    given: list[torch.Tensor]
    received: list[torch.Tensor]
    lasts: bool  # it may still read when the call is over


def is_collective(func: Any) -> bool:
    return getattr(func, "namespace", None) in _SPACES


def sent_by(func: Any, args: Any, kwargs: Any) -> Sent:
    """Operands that are not told apart are taken to be given."""
    names = [each.name for each in func._schema.arguments]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    received = [value for name, value in named.items() if name.startswith("out")]
    given = [value for name, value in named.items() if not name.startswith("out")]
    name = func._schema.name.partition("::")[2]
    if name.startswith(_ONLY_WAIT):
        given, received = [], []
    elif name.startswith(_RECEIVE) or not _is_root(func, named):
        given, received = [], [*given, *received]
    lasts = bool(named.get("async_op", named.get("asyncOp", True)))
    return Sent(list(tensors_in(given)), list(tensors_in(received)), lasts)


def _is_root(func: Any, named: dict[str, Any]) -> bool:
    """Whether this rank is the one that gives; only of broadcasts is there one."""
    if "broadcast" not in func._schema.name:
        return True
    if "process_group" in named:
        group, root = torch.distributed.ProcessGroup.unbox(named["process_group"]), named["root_rank"]
    else:
        group, root = torch._C._distributed_c10d._resolve_process_group(named["group_name"]), named["src"]
    return bool(group.rank() == root)

# SPDX-License-Identifier: Apache-2.0
"""Modules outside of the model that hold its weights too: programs that were traced, scripted or exported before, a
second model with the same layers. They run without hooks. torch keeps no list of them, so this process's objects are
gone through, once.

Knows modules and tensors; nothing of ranks, series or the library.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .refusals import Named

_TOLD = (
    "{name} is also held by a {kind} outside of the model, such as a program that was traced or exported before: it "
    "runs without hooks, and computes from whatever passes through a window. Make it from a copy of the model, or see "
    "what layershard.torch.check(model, inputs, call=PROGRAM) says"
)


def _modules_outside(model: nn.Module) -> Iterator[nn.Module]:
    inside = {id(each) for each in model.modules()}
    for each in gc.get_objects():
        if issubclass(type(each), nn.Module) and id(each) not in inside:  # isinstance would ask proxies what they are
            yield each


def _parameters(module: nn.Module) -> Iterator[torch.Tensor]:
    if isinstance(module, torch.jit.ScriptModule):
        yield from module.parameters(recurse=False)
    elif isinstance(module, torch.fx.GraphModule):  # of parts of the model, whose blocks it does not call
        yield from module.parameters()
    else:
        yield from (each for each in vars(module).get("_parameters", {}).values() if each is not None)


def _held(module: nn.Module) -> list[torch.Tensor]:
    try:
        return list(_parameters(module))
    except Exception:  # a stranger's, half made, or with an attribute's meaning of its own: no reason not to shard
        return []


def held_elsewhere(model: nn.Module, shared: Iterable[Named]) -> str | None:
    """One line on the first one; None where there is none."""
    names = {id(tensor): name for name, tensor in shared}
    for module in _modules_outside(model):
        for tensor in _held(module):
            if id(tensor) in names:
                return _TOLD.format(name=names[id(tensor)], kind=type(module).__name__)
    return None

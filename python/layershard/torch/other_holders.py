# SPDX-License-Identifier: Apache-2.0
"""What else holds the model's weights: programs that were traced, scripted or exported before, which may also be packed
or saved later, and a second model with the same layers. They run without hooks. torch keeps no list of them, so this
process's objects are gone through, once.

Knows modules and tensors; nothing of ranks, series or the library.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.export import ExportedProgram

from .refusals import Named

_TOLD = (
    "{name} is also held outside of the model, in a {kind}, which may be a program that was traced or exported before: "
    "it runs without hooks, and computes, is packed or is saved from whatever passes through a window. Make it from a "
    "copy of the model, or see what layershard.torch.check(model, inputs, call=PROGRAM) says"
)


def _holders(model: nn.Module) -> Iterator[nn.Module | ExportedProgram]:
    inside = {id(each) for each in model.modules()}
    for each in gc.get_objects():
        kind = type(each)  # isinstance would ask proxies what they are
        if issubclass(kind, (nn.Module, ExportedProgram)) and id(each) not in inside:
            yield each


def _parameters(module: nn.Module | ExportedProgram) -> Iterator[torch.Tensor]:
    if isinstance(module, ExportedProgram):
        yield from module.state_dict.values()
    elif isinstance(module, torch.jit.ScriptModule):
        yield from module.parameters(recurse=False)
    elif isinstance(module, torch.fx.GraphModule):  # of parts of the model, whose blocks it does not call
        yield from module.parameters()
    else:
        yield from (each for each in vars(module).get("_parameters", {}).values() if each is not None)


def _held(module: nn.Module | ExportedProgram) -> list[torch.Tensor]:
    try:
        return list(_parameters(module))
    except Exception:  # a stranger's, half made, or with an attribute's meaning of its own: no reason not to shard
        return []


def held_outside(model: nn.Module, shared: Iterable[Named]) -> str | None:
    """One line on the first one; None where there is none."""
    names = {id(tensor): name for name, tensor in shared}
    for module in _holders(model):
        for tensor in _held(module):
            if id(tensor) in names:
                return _TOLD.format(name=names[id(tensor)], kind=type(module).__name__)
    return None

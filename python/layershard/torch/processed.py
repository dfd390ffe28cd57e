# SPDX-License-Identifier: Apache-2.0
"""What processing loaded weights leaves on a layer, put so that ranks that do not store the layer can have it, too.

Parameters and persistent buffers are shared, and so are plain attributes that are tensors. Names that are gone and
plain values (numbers, texts, dtypes and containers of them) are sent, too. All else, a function or an object that was
put there, cannot be sent to another process: it is refused by name.

Knows modules; nothing of ranks or series.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .layout import Layout
from .refusals import Refused

_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.Size)
_OF_MODULES = frozenset(nn.Module().__dict__)


@dataclass
class Processed:
    """A layer after its processing. It is sent to other ranks: it holds no tensor."""

    parameters: dict[str, Layout] = field(default_factory=dict)
    buffers: dict[str, Layout] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)  # tensors that were there before
    unset: list[str] = field(default_factory=list)  # of these, what is None now

    @property
    def layouts(self) -> dict[str, Layout]:
        return {**self.parameters, **self.buffers}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(each) for each in value)
    return isinstance(value, _PLAIN)


def _attributes(layer: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if name not in _OF_MODULES}


def _named(layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters, and the buffers that are not computed anew by each rank."""
    parameters: dict[str, torch.Tensor] = {
        name: tensor for name, tensor in layer._parameters.items() if tensor is not None
    }
    buffers = {
        name: tensor
        for name, tensor in layer._buffers.items()
        if tensor is not None and name not in layer._non_persistent_buffers_set
    }
    return parameters, buffers


def tensors_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """What is to be stored of a processed layer."""
    parameters, buffers = _named(layer)
    return {name: tensor.data for name, tensor in {**parameters, **buffers}.items() if tensor.numel()}


def _register_tensors(layer: nn.Module) -> None:
    """Plain attributes that are tensors become buffers, which are looked up by the same name."""
    for name, value in _attributes(layer).items():
        if isinstance(value, torch.Tensor):
            delattr(layer, name)
            layer.register_buffer(name, value)


def _changed_values(layer: nn.Module, before: dict[str, Any]) -> dict[str, Any]:
    values = {}
    for name, value in _attributes(layer).items():
        if _is_plain(value):
            if name not in before or not _is_plain(before[name]) or before[name] != value:
                values[name] = value
        elif name not in before or before[name] is not value:
            raise Refused(
                f"processing the weights of {layer.prefix} left '{name}', a {type(value).__name__}, which cannot be "
                f"sent to the ranks that do not store the layer: keep it outside of the layer"
            )
    return values


def process(layer: nn.Module, method: Callable[[nn.Module], None]) -> Processed:
    """Run @method on @layer and see what it leaves. Refused where others could not have it."""
    before = {name: copy.deepcopy(value) if _is_plain(value) else value for name, value in _attributes(layer).items()}
    old, modules = tensors_of(layer).keys(), dict(layer._modules)
    with torch.no_grad():
        method(layer)
    if dict(layer._modules) != modules:
        raise Refused(f"processing the weights of {layer.prefix} changed its child modules; tensors alone are shared")
    _register_tensors(layer)
    values = _changed_values(layer, before)
    parameters, buffers = _named(layer)
    now = tensors_of(layer)
    return Processed(
        {name: Layout.of(now[name]) for name in parameters if name in now},
        {name: Layout.of(now[name]) for name in buffers if name in now},
        values,
        gone=[name for name in old if name not in now],
        unset=[name for name in old if name not in now and getattr(layer, name, layer) is None],
    )


def _clear(layer: nn.Module, name: str) -> None:
    for home in (layer._parameters, layer._buffers, layer.__dict__):
        home.pop(name, None)


def adopt(layer: nn.Module, processed: Processed, device: torch.device) -> None:
    """Make a layer that was not processed here look like one that was; its tensors are attached later."""
    for name in processed.gone:
        _clear(layer, name)
    for name in processed.unset:
        layer.register_parameter(name, None)
    for name in processed.parameters:
        if layer._parameters.get(name) is None:
            _clear(layer, name)
            layer.register_parameter(name, nn.Parameter(torch.empty(0, device=device), requires_grad=False))
    for name in processed.buffers:
        if layer._buffers.get(name) is None:
            _clear(layer, name)
            layer.register_buffer(name, torch.empty(0, device=device))
    for name, value in processed.values.items():
        setattr(layer, name, value)

# SPDX-License-Identifier: Apache-2.0
"""A model that is not shared, with operators that do nothing where a sharded one has those of layershard.

An operator that changes weights is a border to a compiler: inductor fuses nothing across it, and may find more or fewer
of the patterns that it has other kernels for (attention). What it computes may be rounded otherwise. This copy has
the same borders, and has all its weights: bits that are equal to its bits were computed from right ones.

Knows torch; of layershard which modules wait for which weights, and what a hook finds in a module's results.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

import layershard.torch
from layershard.torch.hooks import settled

_library = torch.library.Library("layershard_bench", "DEF")  # type: ignore[no-untyped-call]


def _nothing(*_args: object) -> None:
    pass


for _schema in (
    "arrive(Tensor(a!) token, Tensor(b!)[] weights) -> ()",
    "settle(Tensor(a!) token, Tensor(b!)[] outputs, Tensor(c!)[] weights) -> ()",
    "leave(Tensor(a!) token, Tensor(b!)[] weights) -> ()",
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)  # type: ignore[no-untyped-call]
    _library.impl(_name, _nothing, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"layershard_bench::{_name}", _nothing, lib=_library)

_arrive = torch.ops.layershard_bench.arrive.default
_settle = torch.ops.layershard_bench.settle.default
_leave = torch.ops.layershard_bench.leave.default


def _cut_round(module: torch.nn.Module, weights: list[torch.Tensor], token: torch.Tensor) -> None:
    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _arrive(token, weights)

    def after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _settle(token, settled(args, kwargs, output), weights)
        _leave(token, weights)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)


def _look(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """Where a graph breaks, dynamo compiles a module with hooks by other frames than one without."""


def borders(sharded: torch.nn.Module) -> tuple[list[str], dict[str, list[str]]]:
    """What cut needs to know of a sharded model."""
    handle = layershard.torch.of(sharded)
    shared = {id(place.tensor) for place in handle.all_places()}
    waiting = {
        name: [f"{name}.{each}" for each, weight in module.named_parameters() if id(weight) in shared]
        for name, module in sharded.named_modules()
        if handle.steps_of(module)[1]
    }
    return [name for name, module in sharded.named_modules() if module._forward_pre_hooks], waiting


def cut(model: torch.nn.Module, hooked: Collection[str], waiting: Mapping[str, Sequence[str]]) -> torch.nn.Module:
    """@hooked: names of the modules that have hooks in the sharded model. @waiting: of those that wait for weights, and
    the names of these weights. The model itself, with hooks."""
    token = torch.zeros(1, device=next(model.parameters()).device)
    torch._dynamo.mark_static_address(token)
    for name, weights in waiting.items():
        _cut_round(model.get_submodule(name), [model.get_parameter(each) for each in weights], token)
    for name in hooked:
        model.get_submodule(name).register_forward_pre_hook(_look)
    return model

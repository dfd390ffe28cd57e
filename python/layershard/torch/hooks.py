# SPDX-License-Identifier: Apache-2.0
"""Hooks before forward: reach where a block begins, wait before the first use of a layer's weights.

Knows modules and the calls of a series; nothing of how bytes come. A module's address of its weights never changes, so
a hook only says when, never where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from . import ops
from .noticing import Watch
from .ops import Step
from .refusals import Refused

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def activations(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a module computes from."""
    return [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor) and each.is_floating_point()]


def _refuse_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A backward pass would read the weights again, when their windows hold other layers."""
    if any(each.requires_grad for each in activations(args, kwargs)):
        raise Refused(
            f"a gradient is wanted through a {type(module).__name__} whose weights are shared by layershard: "
            f"run it in torch.inference_mode() or torch.no_grad()"
        )


class Switch:
    """Turns hooks off for a while, without taking them out."""

    off = False


def arrival_hook(
    reaches: Sequence[Step],
    waits: Sequence[Step],
    device: torch.device,
    switch: Switch,
    watch: Watch | None = None,
) -> Hook:
    """The hook of one module. Under torch.compile it is one operator; else the library is called directly."""
    steps = ops.Steps(reaches, waits, device, watch=watch)
    calls, number, waits_too = tuple(steps.eager), steps.number, bool(waits)
    is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
    arrive, on_host, stream_of = ops.arrive, device.type == "cpu", ops.stream_of

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if switch.off:
            return
        if is_compiling():
            arrive(activations(args, kwargs), number)
            return
        if waits_too and is_grad_enabled():
            _refuse_gradients(module, args, kwargs)
        stream = 0 if on_host else stream_of(device)
        for call, layer in calls:
            call(layer, stream)

    hook.steps = steps  # type: ignore[attr-defined]  # the operator knows them as long as the hook lives
    return hook


def runs_forward(module: nn.Module) -> bool:
    """Whether it is called at all: a ModuleList or ModuleDict only holds others."""
    return type(module).forward is not nn.Module.forward


def install(module: nn.Module, hook: Hook) -> torch.utils.hooks.RemovableHandle:
    """Before every other hook there is: those may read the weights."""
    return module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)

# SPDX-License-Identifier: Apache-2.0
"""Hooks round forward: reach where a block begins, wait before the first use of a layer's weights.

Knows modules and the calls of a series; nothing of how bytes come. A module's address of its weights never changes, so
a hook only says when, never where. Only torch.compile needs a hook after forward: see ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import compiler, nn

from . import ops
from .compiled import is_recording, refuse_tracing
from .noticing import Watch
from .ops import Step
from .refusals import Refused

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
HookAfter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


class Hooks(NamedTuple):
    """Of one module. after is None where nothing is waited for."""

    before: Hook
    after: HookAfter | None


def activations(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a module computes from."""
    return [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor) and each.is_floating_point()]


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers. Dynamo traces it: an older one knows no dataclasses.is_dataclass."""
    if isinstance(value, torch.Tensor):
        yield value
    elif value is None or isinstance(value, (bool, int, float, str)):
        return
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _tensors_in(each)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors_in(getattr(value, name))


def _results(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[torch.Tensor]:
    """What the module has made: its output, and what it has put into containers it was given. Tensors that it was
    given itself are none of it."""
    given = (*args, *kwargs.values())
    found: list[torch.Tensor] = []
    for each in _tensors_in([output, [each for each in given if not isinstance(each, torch.Tensor)]]):
        if not any(each is other for other in (*given, *found)):
            found.append(each)
    return found


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


def arrival_hooks(
    reaches: Sequence[Step],
    waits: Sequence[Step],
    device: torch.device,
    switch: Switch,
    token: torch.Tensor,
    weights: Sequence[torch.Tensor],
    watch: Watch | None = None,
) -> Hooks:
    """The hooks of one module, which computes from @weights. Under torch.compile they are operators; else the library
    is called directly. What they ask first is asked at every call of every module: is_recording, without a call."""
    is_compiled, modes, is_recorded = compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack, is_recording
    is_traced, nn_module, plain_call = torch._C._is_tracing, nn.Module, nn.Module.__call__  # torch.fx puts in its own
    steps = ops.Steps(reaches, waits, device, token, weights, watch=watch)
    calls, number, waits_too, changed = tuple(steps.eager), steps.number, bool(waits), steps.weights
    on_host, stream_of, is_grad_enabled = device.type == "cpu", ops.stream_of, torch.is_grad_enabled
    arrive, settle, leave = ops.arrive, ops.settle, ops.leave

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if switch.off:
            return
        if is_compiled() or (modes() and is_recorded()):
            arrive(token, changed, number)
            return
        if is_traced() or nn_module.__call__ is not plain_call:
            refuse_tracing()
        if waits_too and is_grad_enabled():
            _refuse_gradients(module, args, kwargs)
        stream = 0 if on_host else stream_of(device)
        for call, layer in calls:
            call(layer, stream)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if (is_compiled() or (modes() and is_recorded())) and not switch.off:
            settle(token, _results(args, kwargs, output), changed, number)
            leave(token, changed, number)

    before.steps = steps  # type: ignore[attr-defined]  # the operators know them as long as the hook lives
    return Hooks(before, after if waits else None)


def runs_forward(module: nn.Module) -> bool:
    """Whether it is called at all: a ModuleList or ModuleDict only holds others."""
    return type(module).forward is not nn.Module.forward


def install(module: nn.Module, hooks: Hooks) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Round every other hook there is: those may read the weights."""
    yield module.register_forward_pre_hook(hooks.before, prepend=True, with_kwargs=True)
    if hooks.after is not None:
        yield module.register_forward_hook(hooks.after, with_kwargs=True)

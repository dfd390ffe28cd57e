# SPDX-License-Identifier: Apache-2.0
"""Hooks round forward: reach where a block begins, wait before the first use of a layer's weights.

Knows modules and the calls of a series; nothing of how bytes are fetched. A module's address of its weights never
changes, so a hook only says when, never where. The hook after forward is for torch.compile, see ops, and grad mode, see
gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import compiler, nn

from ..errors import Busy
from . import gradients, ops
from .compiled import is_recording, refuse_tracing, register_first
from .containers import tensors_in
from .gradients import HookAfter, Saving, refuse_inputs, refuse_results
from .noticing import Watch
from .one_thread import Turn, window_taken
from .ops import Step

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class Hooks(NamedTuple):
    """Of one module. after is None where nothing is waited for."""

    before: Hook
    after: HookAfter | None
    steps: ops.Steps  # which compiled programs find until remove


def _results(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[torch.Tensor]:
    """What the module has made: its output, and what it has put into containers it was given. Tensors that it was
    given itself are none of it."""
    given = (*args, *kwargs.values())
    found: list[torch.Tensor] = []
    for each in tensors_in([output, [each for each in given if not isinstance(each, torch.Tensor)]]):
        if not any(each is other for other in (*given, *found)):
            found.append(each)
    return found


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Inductor takes no operator that changes complex numbers. It leaves these to kernels of their own, which compute
    them whole: where a copy comes before an operator, so do they."""
    return torch.view_as_real(tensor.resolve_conj()).clone() if tensor.is_complex() else tensor


def settled(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[torch.Tensor]:
    """What the operator after a module is given of it."""
    return [_as_real(each) for each in _results(args, kwargs, output)]


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
    saving: Saving,
    turn: Turn,
    watch: Watch | None = None,
    name: str = "",
) -> Hooks:
    """The hooks of one module, which computes from @weights. Under torch.compile they are operators; else the library
    is called directly. What they ask first is asked at every call of every module: is_recording, without a call."""
    is_compiled, modes, is_recorded = compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack, is_recording
    is_traced, nn_module, plain_call = torch._C._is_tracing, nn.Module, nn.Module.__call__  # torch.fx puts in its own
    steps = ops.Steps(reaches, waits, device, token, weights, turn=turn, watch=watch, name=name)
    calls, number, waits_too, changed = tuple(steps.eager), steps.number, bool(waits), steps.weights
    on_host, stream_of, is_grad_enabled = device.type == "cpu", ops.stream_of, torch.is_grad_enabled
    arrive = ops.arrive_parts if saving.has_parts else ops.arrive
    settle, leave, inside = ops.settle, ops.leave, saving.inside
    begin, end, last_node = saving.begin, saving.end, gradients.last_node
    here = threading.get_ident

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if switch.off:
            return
        if is_compiled() or (modes() and is_recorded()):
            arrive(token, changed, number)
            return
        if is_traced() or nn_module.__call__ is not plain_call:
            refuse_tracing()
        if turn.thread != here():
            turn.take()
        wants_gradients = waits_too and is_grad_enabled()
        if wants_gradients:
            refuse_inputs(module, args, kwargs)
        stream = 0 if on_host else stream_of(device)
        try:
            for call, layer in calls:
                call(layer, stream)
        except Busy as error:
            raise window_taken(name) from error
        if wants_gradients:
            begin()
        else:
            saving.number = last_node()

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if is_compiled() or (modes() and is_recorded()):
            if not switch.off:
                results = settled(args, kwargs, output)
                refuse_results(module, results)
                settle(token, results, changed, number)
                leave(token, changed, number)
        elif inside:
            end((args, kwargs), output)
        elif is_grad_enabled() and not switch.off:  # what was before it has been compiled by itself
            refuse_results(module, tensors_in(output))
        elif saving.number != last_node() and not switch.off:  # it has turned gradients on by itself
            saving.look((args, kwargs), output)

    turn.hook = before.__code__
    return Hooks(before, after if waits else None, steps)


def runs_forward(module: nn.Module) -> bool:
    """Whether it is called at all: a ModuleList or ModuleDict only holds others."""
    return type(module).forward is not nn.Module.forward


def install(module: nn.Module, hooks: Hooks, saving: Saving) -> list[Any]:
    """Round every other hook there is: those may read the weights. What is to be removed again."""
    before = register_first(module, hooks.before, with_kwargs=True)
    if hooks.after is not None:
        saving.attach(hooks.after)
    return [before, saving, hooks.steps]

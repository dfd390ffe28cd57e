# SPDX-License-Identifier: Apache-2.0
"""Which module gets which hook: reach at a block's entry, wait at the first module that needs the layer.

Knows plans, series and hooks; nothing of bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from . import ops
from .alone import Alone
from .compiled import register_first, whole
from .gradients import Saving
from .grouping import Place
from .guards import above
from .hooks import Switch, arrival_hooks, install, runs_forward
from .noticing import Watch
from .one_thread import Turn, Uses, entering, turns_of
from .ops import Step
from .outside import outside
from .patterns import Unit
from .refusals import Refused
from .replaced import Waiting
from .shared import Shared

_UNCALLED = nn.modules.linear.NonDynamicallyQuantizableLinear  # of MultiheadAttention and its copies


def refuse_uncalled(model: nn.Module, units: Iterable[Unit], scope: str) -> None:
    """A module that is never called cannot say when its weights are needed. The block round it can, with scope block.
    Told by torch's own marks: frameworks leave none on modules such as Mamba's dt_proj, which check finds."""
    modules = dict(model.named_modules())
    for unit in units:
        kind = type(unit.module).__name__
        if whole(unit.module) is not unit.module and not runs_forward(unit.module):
            raise Refused(f"{unit.name} is a {kind}, torch.compile's: choose what is in it, {unit.name}._orig_mod")
        if scope == "block" and runs_forward(modules[unit.block]):
            continue
        parent = modules[unit.name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention) or isinstance(unit.module, _UNCALLED):
            raise Refused(
                f"{unit.name} is read by the {type(parent).__name__} round it without being called, and could not wait "
                f"for its weights: choose that one, or scope='block'"
            )
        if not runs_forward(unit.module):
            raise Refused(f"{unit.name} is a {kind}, which is never called: choose what is in it, or scope='block'")


def _parents(name: str) -> list[str]:
    """Of a.b.c: the model itself, a, a.b."""
    return [""] + [name[:end] for end, sign in enumerate(name) if sign == "."]


def _entries(model: nn.Module, hooked: set[nn.Module]) -> list[nn.Module]:
    """The modules above those that have hooks: passes begin there."""
    names = {name for name, module in model.named_modules() if module in hooked}
    above = {parent for name in names for parent in _parents(name)} - names
    return [
        module
        for name, module in model.named_modules()
        if name in above and names.isdisjoint(_parents(name)) and runs_forward(module)
    ]


class Wiring:
    """The steps of every module, and the hooks while they are installed."""

    def __init__(self, model: nn.Module, shared: Iterable[Shared], device: torch.device) -> None:
        self._device = device
        self.switch = Switch()
        self.token = ops.new_token(device)
        self._reaches: dict[nn.Module, list[Step]] = {}
        self._waits: dict[nn.Module, list[Step]] = {}
        self._places: dict[nn.Module, list[Place]] = {}
        self._handles: list[Any] = []
        shared, modules = list(shared), dict(model.named_modules())
        self._names = {module: name for name, module in modules.items()}
        for each in (each for each in shared if each.moves):
            for (layer, places), units in zip(each.plan.layers(), each.plan.units, strict=True):
                self._wire((each.series, layer), modules[units[0].block], units, places, each.plan.scope)
        self._watches = {module: Watch(module, places) for module, places in self._places.items()}
        self._entries = {each: Turn([each]) for each in _entries(model, {*self._reaches, *self._waits})}
        users = dict.fromkeys([*self._reaches, *self._waits])
        self._turns = turns_of({module: self._uses_of(module) for module in users}, self.token)
        self.alone = self._alone(model, shared)
        for each in shared:
            each.on_attached = self._record

    def _alone(self, model: nn.Module, shared: list[Shared]) -> Alone:
        owners = {place.owner for each in shared for places in each.plan.places for place in places}
        names = {module: self._names[module] for module in above(model, owners)}
        turns = [*dict.fromkeys(self._turns.values()), *self._entries.values()]
        waiting = {module: self._names[module] for module in self._waits}
        return Alone(names, waiting, turns, moves=any(each.moves for each in shared))

    def _wire(self, step: Step, block: nn.Module, units: list[Unit], places: list[Place], scope: str) -> None:
        is_called = runs_forward(block)
        users = [block] if scope == "block" and is_called else [unit.module for unit in units]
        for module in [block] if is_called else users:
            self._reaches.setdefault(module, []).append(step)
        for module in users:
            self._waits.setdefault(module, []).append(step)
            self._places.setdefault(module, []).extend(places)

    def _uses_of(self, module: nn.Module) -> Uses:
        reaches, waits = self.steps_of(module)
        return Uses(frozenset(series for series, _ in waits), frozenset(series for series, _ in reaches))

    def install(self) -> None:
        """Put the hooks in, also in place of those that are there: they hold the calls as they are now."""
        self.remove()
        for each, turn in self._entries.items():
            self._handles.append(register_first(each, entering(turn)))
        owners = {module: dict.fromkeys(place.owner for place in places) for module, places in self._places.items()}
        inside = {owner for module, found in owners.items() for owner in found if owner is not module}
        self._handles.append(Waiting(*({each: self._names[each] for each in found} for found in (self._waits, inside))))
        self._handles += outside(owners, self._names)
        for module in self._turns:
            places = self._places.get(module, [])
            watch, steps, name = self._watches.get(module), self.steps_of(module), self._names[module]
            weights, saving = [place.tensor for place in places], Saving(module, places, watch)
            hooks = arrival_hooks(
                *steps, self._device, self.switch, self.token, weights, saving, self._turns[module], watch, name
            )
            self._handles += install(module, hooks, saving)

    def _record(self) -> None:
        for watch in self._watches.values():
            watch.record()

    def steps_of(self, module: nn.Module) -> tuple[list[Step], list[Step]]:
        """What it reaches and what it waits for."""
        return self._reaches.get(module, []), self._waits.get(module, [])

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

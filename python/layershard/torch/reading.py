# SPDX-License-Identifier: Apache-2.0
"""Which shared weights a call reads when it is not their turn, and in which module.

Two layers that take turns in one window have one address: who reads the one in the other's turn gets the other's
bytes, with poison as without. So this looks at what torch's operators are given, in eager mode: tensors of the model
and views of them. Knows modules, operators and steps; nothing of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .observing import shown, tensors_in
from .ops import Step
from .shared import Shared

StepsOf = Callable[[nn.Module], tuple[list[Step], list[Step]]]  # what a module reaches and what it waits for


class Weight(NamedTuple):
    """series: its number among the shared ones; place: the layer's in it, from 0 on."""

    series: int
    place: int
    name: str


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """with Reads(...) as seen: seen.found: weights that were read outside of their turn, and the modules that did."""

    def __init__(self, model: nn.Module, shared: Iterable[Shared], steps_of: StepsOf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[Weight, str] = {}
        self._model = model
        self._steps_of = steps_of
        self._weights: dict[int, Weight] = {}
        self._views: list[torch.Tensor] = []  # kept, as an address in Python may be another object's later
        self._numbers: dict[int, tuple[int, int]] = {}  # of a series: its number and its first layer
        self._turns: dict[int, int] = {}  # which layer of a series may be read
        self._open: list[str] = []
        self._handles: list[Any] = []
        for number, each in enumerate(shared):
            if not each.moves:
                continue  # no module waits for its layers here
            self._numbers[id(each.series)] = number, each.plan.first_layer
            for index, places in enumerate(each.plan.places):
                self._weights.update((id(place.tensor), Weight(number, index, place.name)) for place in places)

    # ---- Turns ----

    def __enter__(self) -> Any:
        for name, module in self._model.named_modules():
            self._watch(name, module)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _watch(self, name: str, module: nn.Module) -> None:
        reaches, waits = self._steps_of(module)

        def begins(module: nn.Module, args: Any) -> None:
            self._open.append(name)
            for series, layer in reaches:
                number, first = self._numbers[id(series)]
                if self._turns.get(number) != layer - first:
                    self._turns.pop(number, None)
            for series, layer in waits:
                number, first = self._numbers[id(series)]
                self._turns[number] = layer - first

        def ends(module: nn.Module, args: Any, output: Any) -> None:
            while self._open and self._open.pop() != name:
                pass

        self._handles.append(module.register_forward_pre_hook(begins, prepend=True))  # before hooks that read weights
        self._handles.append(module.register_forward_hook(ends))

    # ---- Operators ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in((*args, *(kwargs or {}).values())):
            weight = self._weights.get(id(tensor))
            if weight is None:
                continue
            if _is_view(func):
                self._follow(result, weight)
            elif self._turns.get(weight.series) != weight.place:
                self.found.setdefault(weight, shown(self._open[-1]) if self._open else "the call itself")
        return result

    def _follow(self, views: Any, weight: Weight) -> None:
        for view in tensors_in(views):
            self._views.append(view)
            self._weights.setdefault(id(view), weight)


def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)

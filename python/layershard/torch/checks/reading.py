# SPDX-License-Identifier: Apache-2.0
"""Which shared weights a call reads when it is not their turn, and in which module.

Two layers that take turns in one window have one address: who reads the one in the other's turn gets the other's
bytes, with poison as without. So this looks at what torch's operators are given, in eager mode: tensors of the model
and views of them; and at what goes past them, to numpy, lists and other libraries. Knows modules, operators and steps;
nothing of windows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..containers import tensors_in
from ..ops import Step
from ..shared import Shared
from .observing import shown

StepsOf = Callable[[nn.Module], tuple[list[Step], list[Step]]]  # what a module reaches and what it waits for

_TAKES_ELEMENTS = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.__dlpack__)
_ALIASES = ("_make_subclass", "as_subclass")  # what nn.Parameter makes is no operator's result, nor shown to a mode


class Weight(NamedTuple):
    """series: its number among the shared ones; place: the layer's in it, from 0 on."""

    series: int
    place: int
    name: str


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """with Reads(...) as seen: seen.found: weights that were read outside of their turn, and the modules that did.

    elsewhere: a module that another thread has run, whose operators are not seen here; None if there is none."""

    def __init__(self, model: nn.Module, shared: Iterable[Shared], steps_of: StepsOf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[Weight, str] = {}
        self.elsewhere: str | None = None
        self._thread = threading.get_ident()
        self._model = model
        self._steps_of = steps_of
        self._weights: dict[int, Weight] = {}
        self._views: list[torch.Tensor] = []  # kept, as an address in Python may be another object's later
        self._numbers: dict[int, tuple[int, int]] = {}  # of a series: its number and its first layer
        self._turns: dict[int, int] = {}  # which layer of a series may be read
        self._open: list[str] = []
        self._around = ExitStack()
        for number, each in enumerate(shared):
            if not each.moves:
                continue  # no module waits for its layers here
            self._numbers[id(each.series)] = number, each.plan.first_layer
            for index, places in enumerate(each.plan.places):
                for place in places:
                    weight = Weight(number, index, place.name)
                    self._weights.update({id(place.tensor): weight, id(place.whole): weight})

    # ---- Turns ----

    def __enter__(self) -> Any:
        for name, module in self._model.named_modules():
            self._watch(name, module)
        self._around.enter_context(_Past(self))
        for name in _ALIASES:
            self._around.callback(_follow_aliases(name, self))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._around.close()

    def _watch(self, name: str, module: nn.Module) -> None:
        reaches, waits = self._steps_of(module)

        def begins(module: nn.Module, args: Any) -> None:
            self._open.append(name)
            if threading.get_ident() != self._thread:
                self.elsewhere = self.elsewhere or shown(name)
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

        before = module.register_forward_pre_hook(begins, prepend=True)  # before hooks that read weights
        self._around.callback(before.remove)
        self._around.callback(module.register_forward_hook(ends).remove)

    # ---- Operators ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = args[1:] if _looks_only(func) else args
        for tensor in tensors_in((*read, *(kwargs or {}).values())):
            if _is_view(func):
                self.follow(result, tensor)
            else:
                self.read(tensor)
        return result

    def read(self, tensor: Any) -> None:
        weight = self._weights.get(id(tensor))
        if weight is not None and self._turns.get(weight.series) != weight.place:
            self.found.setdefault(weight, shown(self._open[-1]) if self._open else "the call itself")

    def follow(self, views: Any, tensor: Any) -> None:
        weight = self._weights.get(id(tensor))
        if weight is None:
            return
        for view in tensors_in(views):
            self._views.append(view)
            self._weights.setdefault(id(view), weight)


def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def _looks_only(func: Any) -> bool:
    """At its first argument's shape, dtype and place, and at no element."""
    name = func._schema.name.partition("::")[2]
    return name.startswith("new_") or name.endswith("_like") or name in ("is_pinned", "is_same_size")


class _Past(TorchFunctionMode):
    """What hands a weight's elements to others than torch. It may well be read there at once."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TAKES_ELEMENTS:
            self._reads.read(args[0])
        return func(*args, **(kwargs or {}))


def _follow_aliases(name: str, reads: Reads) -> Callable[[], None]:
    """Let torch.Tensor's method tell which tensor it has made of which. What is returned ends that."""
    plain, own = getattr(torch.Tensor, name), vars(torch.Tensor).get(name)
    is_static = name == "_make_subclass"  # (class, tensor, ...); the other is (tensor, class)

    def followed(*args: Any, **kwargs: Any) -> Any:
        made = plain(*args, **kwargs)
        reads.follow(made, args[1 if is_static else 0])
        return made

    setattr(torch.Tensor, name, staticmethod(followed) if is_static else followed)
    return lambda: delattr(torch.Tensor, name) if own is None else setattr(torch.Tensor, name, own)

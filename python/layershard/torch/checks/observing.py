# SPDX-License-Identifier: Apache-2.0
"""What a call computes, as digests in the order in which its modules begin and end: two calls can be compared.

Knows modules and the order of their calls; nothing of series or ranks. Only digests are kept, so that any call fits
into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..containers import tensors_in
from .digests import Unseen, digest


class Event(NamedTuple):
    """kind: "begins" (of its arguments), "ends" (of its results), "settles" (of its results, where it is compiled and
    layers are waited for), "raises" or "returns"."""

    kind: str
    name: str
    digest: bytes


def shown(name: str) -> str:
    return name or "the model itself"


class Observation:
    """with Observation(model) as seen: the events of what runs inside. What is compiled runs no hooks of Python: of it
    the modules around it are seen, those that settle, and the results."""

    def __init__(self, model: nn.Module) -> None:
        self.events: list[Event] = []
        self.unseen: Unseen = set()  # kinds of what was returned that cannot be compared
        self._model = model
        self._open: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Observation:
        for name, module in self._model.named_modules():
            self._watch(name, module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, name: str, module: nn.Module) -> None:
        def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling():
                self._open.append(name)
                self._add("begins", name, list(tensors_in((*args, *kwargs.values()))))

        def ends(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch.compiler.is_compiling():
                while self._open and self._open.pop() != name:  # of one that was left by an exception
                    pass
                self._add("ends", name, list(tensors_in(output)))

        self._handles.append(module.register_forward_pre_hook(begins, with_kwargs=True))
        self._handles.append(module.register_forward_hook(ends, with_kwargs=True))

    def _add(self, kind: str, name: str, value: Any) -> None:
        self.events.append(Event(kind, name, digest(value, self.unseen)))

    def settled(self, name: str, outputs: Sequence[torch.Tensor]) -> None:
        self._add("settles", name, list(outputs))

    def returned(self, value: Any) -> None:
        self._add("returns", "", value)

    def raised(self, error: Exception) -> None:
        self._add("raises", self._open[-1] if self._open else "", type(error).__name__)


def _settling(events: Sequence[Event]) -> list[str]:
    return [each.name for each in events if each.kind == "settles"]


def first_difference(one: Sequence[Event], other: Sequence[Event]) -> str | None:
    """The innermost module in which the two calls come apart; None where they are equal. A module that ends otherwise
    than before has read something else; where one begins otherwise, it is what is round it that has."""
    within: list[str] = []
    if _settling(one) != _settling(other):  # a CUDA graph was captured, a program made anew: no difference in itself
        one, other = ([each for each in events if each.kind != "settles"] for events in (one, other))
    for a, b in zip_longest(one, other):
        if a == b:
            if a.kind == "begins":
                within.append(a.name)
            elif a.kind == "ends":
                while within and within.pop() != a.name:
                    pass
            continue
        if b is not None and b.kind == "raises":
            return shown(b.name)
        if a is not None and b is not None and a[:2] == b[:2] and a.kind in ("ends", "settles"):
            return shown(a.name)
        return shown(within[-1]) if within else "the call, outside of the model's modules"
    return None

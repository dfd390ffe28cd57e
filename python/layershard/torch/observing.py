# SPDX-License-Identifier: Apache-2.0
"""What a call computes, as digests in the order in which its modules begin and end: two calls can be compared.

Knows modules and tensors; nothing of series or ranks. Only digests are kept, so that any call fits into memory.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from types import FunctionType, MethodType, ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

_LEAVES = (type(None), bool, int, float, complex, str, bytes)
_CLOSED = (nn.Module, type, FunctionType, MethodType, ModuleType, torch.Generator)  # what is not looked into


def bits_of(tensor: torch.Tensor) -> bytes:
    """A digest of the elements in their order, bit for bit."""
    found = hashlib.blake2b(digest_size=16)
    _add(found, tensor)
    return found.digest()


def digest(value: Any) -> bytes:
    """Of all tensors and plain values in containers and in objects' attributes."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in leaves(value):
        if isinstance(leaf, torch.Tensor):
            _add(found, leaf)
        else:
            found.update(repr(leaf).encode())
    return found.digest()


def _add(found: Any, tensor: torch.Tensor) -> None:
    found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if tensor.device.type == "meta" or not tensor.numel():
        return
    plain = tensor.detach()
    plain = plain.int_repr() if plain.is_quantized else plain
    plain = plain if plain.layout is torch.strided else plain.to_dense()
    flat = plain.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    found.update((ctypes.c_uint8 * flat.numel()).from_address(flat.data_ptr()))


def leaves(value: Any, seen: dict[int, Any] | None = None) -> Iterator[Any]:
    """Tensors and plain values. Of what cannot be looked into, the name of its type."""
    seen = {} if seen is None else seen
    if isinstance(value, (torch.Tensor, *_LEAVES)):
        yield value
        return
    if id(value) in seen or isinstance(value, _CLOSED):
        return
    seen[id(value)] = value
    if isinstance(value, dict):
        for key, each in value.items():
            yield repr(key)
            yield from leaves(each, seen)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each, seen)
    elif hasattr(value, "tobytes"):  # numpy's arrays, pictures
        yield value.tobytes()
    elif hasattr(value, "__dict__"):
        yield type(value).__name__
        yield from leaves(vars(value), seen)
    else:
        yield type(value).__name__


# ---- Events ----


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
                self.events.append(Event("begins", name, digest(tensors_in((*args, *kwargs.values())))))

        def ends(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch.compiler.is_compiling():
                while self._open and self._open.pop() != name:  # of one that was left by an exception
                    pass
                self.events.append(Event("ends", name, digest(tensors_in(output))))

        self._handles.append(module.register_forward_pre_hook(begins, with_kwargs=True))
        self._handles.append(module.register_forward_hook(ends, with_kwargs=True))

    def settled(self, name: str, outputs: Sequence[torch.Tensor]) -> None:
        self.events.append(Event("settles", name, digest(list(outputs))))

    def returned(self, value: Any) -> None:
        self.events.append(Event("returns", "", digest(value)))

    def raised(self, error: Exception) -> None:
        self.events.append(Event("raises", self._open[-1] if self._open else "", digest(type(error).__name__)))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """In containers. A cache that is handed from layer to layer is not among a module's own results."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for each in value for found in tensors_in(each)] if isinstance(value, (list, tuple)) else []


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

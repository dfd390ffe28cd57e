# SPDX-License-Identifier: Apache-2.0
"""One object as it is now, put back later: tensors, arrays, containers, modules, what makes random numbers.

Knows torch and Python; nothing of series. Objects stay the same objects, and what was not changed is not written. Each
is put back by itself, so it keeps no more than which others it holds, and may be part of anything.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .digests import bits_of, slots_of

Restorer = Callable[[], Any]

# Of the standard library, what holds what a program puts there and is nothing beyond.
_PLAIN = "abc argparse builtins collections contextlib dataclasses enum numbers types typing".split()
_OUTSIDE = (sys.stdlib_module_names - set(_PLAIN)) | {"layershard"}
_OF_MODULES = frozenset(nn.Module().__dict__) - {"training", "_buffers", "_modules", "_parameters"}


def where_it_lies(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Where and how; None where torch does not say so."""
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.untyped_storage().nbytes()
    except RuntimeError:
        return None


def _tensor_restorer(tensor: torch.Tensor) -> Restorer:
    before, same, lay = tensor.detach().clone(), tensor.detach(), where_it_lies(tensor)

    def restore() -> None:
        if lay is not None and where_it_lies(tensor) != lay:  # it has grown, or been given other memory, or none
            if same.untyped_storage().nbytes() < lay[-1]:
                same.untyped_storage().resize_(lay[-1])
            tensor.data = same
        bits = bits_of(tensor)
        if tensor.device.type != "meta" and (bits is None or bits != bits_of(before)):
            with torch.inference_mode():
                tensor.copy_(before)

    return restore


def is_array(value: Any) -> bool:
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _array_restorer(array: Any) -> Restorer:
    before = array.copy()

    def restore() -> None:
        if array.shape != before.shape:
            array.resize(before.shape, refcheck=False)
        if array.tobytes() != before.tobytes():
            array[...] = before

    return restore


# ---- Objects ----


def _dict_restorer(found: dict[Any, Any], is_restored: Callable[[Any], bool] = lambda key: True) -> Restorer:
    before = {key: value for key, value in found.items() if is_restored(key)}
    kind: Any = OrderedDict if isinstance(found, OrderedDict) else dict  # past what a subclass makes of it

    def now() -> list[Any]:
        return [part for key, value in found.items() if is_restored(key) for part in (key, value)]

    def restore() -> None:
        if _are_same(now(), [part for item in before.items() for part in item]):
            return
        for key in [key for key in found if is_restored(key) and key not in before]:
            kind.__delitem__(found, key)
        for key, value in before.items():
            kind.__setitem__(found, key, value)
        if list(map(id, filter(is_restored, found))) != list(map(id, before)):
            for key, value in before.items():
                kind.__delitem__(found, key)
                kind.__setitem__(found, key, value)

    return restore


def _filled_restorer(found: Any, fill: Callable[[Any, list[Any]], Any]) -> Restorer:
    before = list(found)
    return lambda: None if _are_same(list(found), before) else fill(found, before)


def _fill_list(found: list[Any], before: list[Any]) -> None:
    found[:] = before


def _fill_anew(found: Any, before: list[Any]) -> None:
    found.clear()
    (found.update if isinstance(found, set) else found.extend)(before)


def _slots_restorer(value: Any) -> Restorer:
    before = slots_of(value)

    def restore() -> None:
        for name in slots_of(value).keys() - before.keys():
            object.__delattr__(value, name)
        for name, each in before.items():
            if getattr(value, name, None) is not each:
                object.__setattr__(value, name, each)

    return restore


def _are_same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _of_module(key: str) -> bool:
    return key not in _OF_MODULES and not key.startswith(("_layershard", "_compiled", "__"))


def _state_restorer(value: Any) -> Restorer | None:
    """Of what makes random numbers."""
    if isinstance(value, torch.Generator):
        drawn = value.get_state()
        return lambda: value.set_state(drawn)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        python = value.getstate()
        return lambda: value.setstate(python)
    numbers = getattr(sys.modules.get("numpy"), "random", None)
    if numbers is not None and isinstance(value, numbers.RandomState):
        old = value.get_state()
        return lambda: value.set_state(old)
    if numbers is not None and isinstance(value, numbers.Generator):
        state = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", state)
    return None


def restorers_of(value: Any) -> tuple[list[Restorer], list[Any]]:
    """What restores one object as it is now, and what it holds. What has no plain state of its own is left as it
    is."""
    state = _state_restorer(value)
    if state is not None:
        return [state], []
    if isinstance(value, torch.Tensor):
        return [_tensor_restorer(value)], []
    if isinstance(value, dict):
        return [_dict_restorer(value)], list(value.values())
    if isinstance(value, (tuple, frozenset)):
        return [], list(value)
    if isinstance(value, list):
        return [_filled_restorer(value, _fill_list)], list(value)
    if isinstance(value, (deque, set)):
        return [_filled_restorer(value, _fill_anew)], list(value)
    if is_array(value):
        return [_array_restorer(value)], list(value.flat) if value.dtype.hasobject else []
    if isinstance(value, nn.Module):
        own = [each for key, each in vars(value).items() if _of_module(key)]
        return [_dict_restorer(vars(value), _of_module)], own
    if _is_the_program_s(value):  # a cache
        slots = slots_of(value)
        return [_slots_restorer(value)] if slots else [], [*slots.values(), getattr(value, "__dict__", None)]
    return [], []


def _is_the_program_s(value: Any) -> bool:
    """Nor is what is made of threads, queues, locks, loggers, files, process groups: others wait there, and would never
    be woken once it is put back."""
    kinds = type(value).__mro__
    return _root(kinds[0]) not in ("torch", "builtins") and not any(map(_is_outside, kinds))


def _is_outside(kind: type) -> bool:
    is_group = kind.__module__.startswith(("torch.distributed", "torch._C._distributed"))
    return is_group or _root(kind) in _OUTSIDE and kind is not threading.local  # which no other thread sees


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]

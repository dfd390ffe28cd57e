# SPDX-License-Identifier: Apache-2.0
"""What a call changes and the next one starts from, put back: random states, buffers, what modules keep in attributes.

Knows what belongs to a model and to a call's arguments; how one object is put back is in restoring.py.
"""

from __future__ import annotations

import copy
import random
import sys
from bisect import bisect
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from ..grouping import Place
from ..refusals import Refused, all_tensors
from .restoring import Restorer, is_array, restorers_of, where_it_lies

_CLOSED = (nn.Parameter, type, FunctionType, MethodType, ModuleType)


def _random_states(device: torch.device) -> Iterator[Restorer]:
    python, processor = random.getstate(), torch.get_rng_state()
    yield lambda: random.setstate(python)
    yield lambda: torch.set_rng_state(processor)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        every = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(every)
    elif device.type not in ("cpu", "cuda"):
        backend = torch.get_device_module(device)
        state = backend.get_rng_state()
        yield lambda: backend.set_rng_state(state)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        array = numpy.random.get_state()
        yield lambda: numpy.random.set_state(array)


class _Memory:
    """Of shared weights. What lies there is the library's, whatever shows it."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._ranges = sorted({(each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors})

    def holds(self, value: Any) -> bool:
        address = 0
        if isinstance(value, torch.Tensor):
            address = (where_it_lies(value) or [0])[0]
        elif is_array(value):
            address = value.__array_interface__["data"][0]
        place = bisect(self._ranges, (address, sys.maxsize)) - 1
        return place >= 0 and address < self._ranges[place][1]


class SavedState:
    """Of a model and other modules, and of this process's random numbers."""

    def __init__(self, modules: Iterable[nn.Module], shared: Iterable[Place], device: torch.device) -> None:
        self._restorers = [("random state", restore) for restore in _random_states(device)]
        weights = [place.tensor for place in shared]
        memory = _Memory(weights)
        seen: dict[int, Any] = {id(tensor): tensor for tensor in weights}
        waiting: list[Any] = list(modules)
        while waiting:
            value = waiting.pop()
            if id(value) in seen or isinstance(value, _CLOSED) or memory.holds(value):
                continue
            seen[id(value)] = value
            restorers, held = restorers_of(value)
            self._restorers += [(type(value).__name__, restore) for restore in restorers]
            waiting += held

    def put_back(self) -> None:
        """All that can be; then it is told what cannot."""
        failures = []
        for name, restore in self._restorers:
            try:
                restore()
            except Exception as error:
                failures.append((name, error))
        if failures:
            name, cause = failures[0]
            raise RuntimeError(f"a {name} that the call has changed cannot be put back: {cause}") from cause


def fresh(model: nn.Module, arguments: Any) -> Any:
    """A copy of a call's arguments, caches and generators included. What belongs to the model stays itself."""
    memo: dict[int, Any] = {id(module): module for module in model.modules()}
    memo.update((id(tensor), tensor) for _, tensor in all_tensors(model))
    _stay(arguments, memo)
    try:
        with torch.no_grad():
            return copy.deepcopy(arguments, memo)
    except Exception as error:
        raise Refused(
            f"an argument of the call cannot be copied, so it could not be put back between the passes: "
            f"{type(error).__name__}: {error}"
        ) from error


def modules_in(arguments: Any) -> list[nn.Module]:
    """Other models among a call's arguments."""
    if isinstance(arguments, nn.Module):
        return [arguments]
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    is_list = isinstance(arguments, (list, tuple))
    return [found for each in arguments for found in modules_in(each)] if is_list else []


def _stay(value: Any, memo: dict[int, Any]) -> None:
    """Other models among the arguments stay themselves too; a generator has no copy of Python's."""
    if isinstance(value, nn.Module):
        memo.update((id(module), module) for module in value.modules())
    elif isinstance(value, torch.Generator):
        other = torch.Generator(value.device)
        other.set_state(value.get_state())
        memo[id(value)] = other
    elif isinstance(value, dict):
        _stay(list(value.values()), memo)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _stay(each, memo)

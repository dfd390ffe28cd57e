# SPDX-License-Identifier: Apache-2.0
"""What a call changes and the next one starts from, put back: random states, buffers, what modules keep in attributes.

Knows torch and Python; nothing of series. Objects stay the same objects, and what was not changed is not written.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from .digests import bits_of
from .grouping import Place
from .refusals import Refused, all_tensors

Back = Callable[[], Any]

_OF_TORCH = frozenset(nn.Module().__dict__)
_CLOSED = (nn.Module, nn.Parameter, type, FunctionType, MethodType, ModuleType)


def _keep_tensor(tensor: torch.Tensor) -> Back:
    before = tensor.detach().clone()

    def back() -> torch.Tensor:
        bits = bits_of(tensor)
        if tensor.device.type != "meta" and (bits is None or bits != bits_of(before)):
            with torch.inference_mode():
                tensor.copy_(before)
        return tensor

    return back


def _keep_dict(found: dict[Any, Any], seen: dict[int, Any]) -> Back:
    before = {key: _keep(value, seen) for key, value in found.items()}

    def back() -> dict[Any, Any]:
        for key in [key for key in found if key not in before]:
            del found[key]
        found.update({key: each() for key, each in before.items()})
        return found

    return back


def _keep_list(found: list[Any], seen: dict[int, Any]) -> Back:
    before = [_keep(each, seen) for each in found]

    def back() -> list[Any]:
        found[:] = [each() for each in before]
        return found

    return back


def _keep(value: Any, seen: dict[int, Any]) -> Back:
    """What brings back the same object as it is now. What has no plain state of its own is left as it is."""
    if id(value) in seen or isinstance(value, _CLOSED):
        return lambda: value
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        return _keep_tensor(value)
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if type(value) is dict:
        return _keep_dict(value, seen)
    if type(value) is list:
        return _keep_list(value, seen)
    if isinstance(value, tuple):
        inner = [_keep(each, seen) for each in value]
        return lambda: (value, [each() for each in inner])[0]
    if type(getattr(value, "__dict__", None)) is dict and _is_the_program_s(value):  # a cache
        attributes = _keep_dict(vars(value), seen)
        return lambda: (value, attributes())[0]
    return lambda: value


def _is_the_program_s(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] not in ("torch", "layershard")


def _keep_module(module: nn.Module, shared: set[tuple[int, str]], seen: dict[int, Any]) -> Iterator[Back]:
    for key, buffer in module._buffers.items():
        if (id(module), key) not in shared:
            yield _rebind(module._buffers, key, _keep(buffer, seen))
    attributes = module.__dict__
    own = [key for key in attributes if key not in _OF_TORCH and not key.startswith(("_layershard", "_compiled", "__"))]
    for key in own:
        yield _rebind(attributes, key, _keep(attributes[key], seen))
    known = set(attributes)

    def drop_new() -> None:
        for key in [key for key in attributes if key not in known]:
            del attributes[key]

    yield drop_new


def _rebind(found: dict[str, Any], key: str, back: Back) -> Back:
    return lambda: found.__setitem__(key, back())


def _random_states(device: torch.device) -> Iterator[Back]:
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


class Kept:
    """Of a model, and of this process's random numbers."""

    def __init__(self, model: nn.Module, shared: Iterable[Place], device: torch.device) -> None:
        places = {(id(place.owner), place.key) for place in shared}
        weights: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()}
        self._backs = list(_random_states(device))
        for module in model.modules():
            self._backs += _keep_module(module, places, weights)

    def put_back(self) -> None:
        for back in self._backs:
            back()


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

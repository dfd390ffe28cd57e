# SPDX-License-Identifier: Apache-2.0
"""Tensors and whatever else a call returns, as digests: equal where every bit is.

Knows kinds of tensors and of Python's objects; nothing of modules, series or ranks. What cannot be looked into is left
out and named, so that nobody takes it for equal.
"""

from __future__ import annotations

import copyreg
import ctypes
import hashlib
from collections import deque
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_CLOSED = (nn.Module, type, FunctionType, MethodType, ModuleType, torch.Generator)  # what is not looked into

Unseen = set[str]  # kinds that have been left out


def bits_of(tensor: torch.Tensor) -> bytes | None:
    """A digest of the elements in their order, bit for bit; None where they cannot be looked at."""
    unseen: Unseen = set()
    found = digest(tensor, unseen)
    return None if unseen else found


def digest(value: Any, unseen: Unseen) -> bytes:
    """Of all tensors and plain values in containers and in objects' attributes."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in _leaves(value, unseen):
        found.update(repr(leaf).encode())
    return found.digest()


def slots_of(value: Any) -> dict[str, Any]:
    """Attributes that are in slots; those that are not set are left out."""
    names = copyreg._slotnames(type(value))  # type: ignore[attr-defined]  # as copy and pickle find them
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _leaves(value: Any, unseen: Unseen) -> Iterator[Any]:
    """Plain values, in order. What is not looked into yet waits in a list, as it may be nested deep."""
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, _PLAIN):
            yield each
        elif isinstance(each, torch.Tensor) or (id(each) not in seen and not isinstance(each, _CLOSED)):
            seen[id(each)] = each
            yield type(each).__name__
            try:
                waiting += reversed(_parts(each, unseen))
            except Exception:  # a generator, a lock, a tensor without memory: whatever it says
                unseen.add(type(each).__name__)


def _parts(value: Any, unseen: Unseen) -> list[Any]:
    """Plain values, and what has parts of its own."""
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, (list, tuple, deque)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return list(sorted(digest(each, unseen) for each in value))
    if hasattr(value, "tobytes"):  # numpy's arrays, pictures
        return _of_array(value)
    attributes = {**getattr(value, "__dict__", {}), **slots_of(value)}
    return [part for item in attributes.items() for part in item] if attributes else _reduced(value)


def _of_array(value: Any) -> list[Any]:
    shape = [str(getattr(value, name, "")) for name in ("dtype", "shape", "size")]
    if getattr(getattr(value, "dtype", None), "hasobject", False):
        return [*shape, value.tolist()]  # its bytes are addresses
    return [*shape, value.tobytes()]


def _reduced(value: Any) -> list[Any]:
    """What it can be made of anew, in Python's own words: dates, decimals, dtypes."""
    found = value.__reduce_ex__(4)
    return [found] if isinstance(found, str) else [*found[:3], *(list(each or ()) for each in found[3:5])]


# ---- Tensors ----


def _of_tensor(tensor: torch.Tensor) -> list[Any]:
    """A digest of what is plain memory; of others, what they are made of."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside of torch.vmap
        return [torch._C._functorch.get_unwrapped(tensor)]
    if tensor.is_nested:
        return [str(tensor.dtype), *tensor.unbind()]
    if hasattr(tensor, "trigger_wait"):  # of a collective that is still under way
        return [tensor.trigger_wait()]
    if is_traceable_wrapper_subclass(tensor):
        return [str(list(tensor.shape)), *(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])]
    return [f"{tensor.dtype} {list(tensor.shape)}", _bits(tensor)]


def _bits(tensor: torch.Tensor) -> bytes:
    if tensor.device.type == "meta" or not tensor.numel():
        return b""
    plain = tensor.detach()
    plain = plain.int_repr() if plain.is_quantized else plain
    plain = plain if plain.layout is torch.strided else plain.to_dense()
    flat = plain.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    if not flat.data_ptr():
        raise ValueError("it has no memory")
    return hashlib.blake2b((ctypes.c_uint8 * flat.numel()).from_address(flat.data_ptr()), digest_size=16).digest()

# SPDX-License-Identifier: Apache-2.0
"""What a tensor that wraps others is made of, by torch's own protocol (__tensor_flatten__): quantised weights.

Knows tensors; nothing of modules or memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Path = tuple[str, ...]  # attributes, from the outermost tensor on; () is the tensor itself
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def parts_of(tensor: torch.Tensor) -> Iterator[tuple[Path, torch.Tensor]]:
    """The tensors that hold what is in it: itself, where it wraps none."""
    if not is_traceable_wrapper_subclass(tensor):
        yield (), tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        for path, each in parts_of(inner) if isinstance(inner, torch.Tensor) else ():  # a mesh may be among them
            yield (name, *path), each


def part(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    for name in path:
        tensor = getattr(tensor, name)
    return tensor


def kind_of(tensor: Any) -> str:
    """Of what wraps others: its type, and all that it holds beside tensors. The same in every process."""
    if not is_traceable_wrapper_subclass(tensor):
        return "" if isinstance(tensor, torch.Tensor) else repr(tensor)
    names, rest = tensor.__tensor_flatten__()
    tensor = cast(Any, tensor)
    inner = [kind_of(getattr(tensor, name)) for name in names]
    return _ADDRESS.sub("", f"{type(tensor).__name__} {tensor.dtype} {rest!r} {''.join(inner)}".rstrip())


def rebuilt(tensor: Any, parts: Mapping[Path, torch.Tensor], path: Path = ()) -> Any:
    """One of the same kind that has @parts in the place of its own."""
    if not is_traceable_wrapper_subclass(tensor):
        return parts.get(path, tensor)
    names, rest = tensor.__tensor_flatten__()
    inner = {name: rebuilt(getattr(tensor, name), parts, (*path, name)) for name in names}
    kind: Any = type(tensor)  # torch 2.11's types take numbers only
    return kind.__tensor_unflatten__(inner, rest, tensor.shape, tensor.stride())

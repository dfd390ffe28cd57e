# SPDX-License-Identifier: Apache-2.0
"""What a pattern leaves out of the modules that it chose: told where it is more than what is shared.

Parameters are shared. Buffers are shared only by name, since forwards write to them (caches, statistics); but some
quantised layers have their weight in one, or in an object of their own, of which torch's tensors say nothing.

Knows modules and tensors; nothing of ranks, series or the library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .packed import packed_bytes
from .patterns import Unit


def _buffers(unit: Unit) -> Iterator[tuple[str, int]]:
    for path, module in unit.module.named_modules(prefix=unit.name):
        for key, tensor in module._buffers.items():
            if tensor is not None and key not in module._non_persistent_buffers_set and not tensor.is_mkldnn:
                yield f"{path}.{key}", tensor.nbytes


def _no_parameters(unit: Unit) -> Iterator[tuple[str, int]]:
    """Plain attributes that are tensors, and what is packed."""
    for path, module in unit.module.named_modules(prefix=unit.name):
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{key}", value.nbytes
        yield from packed_bytes(path, module)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def left_out(units: Sequence[Unit], shared: dict[str, int]) -> str | None:
    """One line where less than half of the chosen modules' bytes is in @shared, names and sizes; else None."""
    buffers = [each for unit in units for each in _buffers(unit) if each[0] not in shared]
    others = [each for unit in units for each in _no_parameters(unit)]
    nbytes, left = sum(shared.values()), sum(size for _, size in buffers + others)
    if left <= nbytes:
        return None
    name, _ = max(buffers + others, key=lambda each: each[1])
    line = f"only {_mib(nbytes)} of the chosen modules' {_mib(nbytes + left)} are shared"
    if name in dict(buffers):
        return f"{line}: buffers such as {name} are shared if they are named: buffers='*.{name.rsplit('.', 1)[-1]}'"
    return f"{line}: {name} and the like are not parameters, and stay whole on every rank"


def persistent_buffers(units: Sequence[Unit]) -> list[str]:
    """Qualified names of what a state_dict holds besides parameters."""
    return [name for unit in units for name, _ in _buffers(unit)]

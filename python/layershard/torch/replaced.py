# SPDX-License-Identifier: Apache-2.0
"""A module that waits for its weights is replaced by one that took them over, and would read them without waiting.

convert_sync_batchnorm, fusing and packing do so. What holds the old module and calls it (adapters) is welcome. Knows
modules; nothing of series or passes. Not seen: a module that is put straight into `_modules`, or that made weights of
its own from those that a window showed.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from .packed import is_packed
from .refusals import Guarded
from .registrations import on_registration

_waiting: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # and their names


@on_registration
def _registered(parent: nn.Module, name: str, new: Any) -> None:
    if not _waiting or not isinstance(new, nn.Module) or name not in parent._modules:
        return
    old = parent._modules[name]
    if old is None:
        return
    lost = [each for each in old.modules() if each in _waiting]
    if lost:
        kept, taken = set(new.modules()), {id(tensor) for tensor in new.parameters()}
        for each in lost:
            if each not in kept and (is_packed(new) or any(id(tensor) in taken for tensor in each.parameters())):
                _refuse(each, new)


def _refuse(old: nn.Module, new: nn.Module) -> None:
    raise Guarded(
        f"{_waiting[old]} would be replaced by a {type(new).__name__} that takes its weights over: they are fetched "
        f"into a window, and it is the {type(old).__name__} that waits for them. Replace it before sharding, or "
        f"detach() first; with scope='block' it is the block that waits, and modules in it may be replaced"
    )


class Waiting:
    """These modules wait for their weights, until remove."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self._names = names
        _waiting.update(names)

    def remove(self) -> None:
        for module in self._names:
            _waiting.pop(module, None)

# SPDX-License-Identifier: Apache-2.0
"""A module that waits for its weights is replaced by one that took them over, and would read them without waiting.

convert_sync_batchnorm, fusing and packing do so. What holds the old module and calls it (adapters) is welcome. With
scope block a module in a block may be replaced, but not by one that packs weights of its own: it makes them from those
that a window showed. One that is put straight into `_modules`, as torch's quantisation does, is found by the links
between modules. Not seen: a module that made other weights of its own. Knows modules; nothing of series or passes.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Mapping
from typing import Any

from torch import nn

from .packed import is_packed
from .refusals import Guarded
from .registrations import on_registration

_waiting: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # and their names
_inside: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # those whose weights others wait for

Link = tuple[Mapping[str, nn.Module | None], str, nn.Module]  # the modules of one, and which of them is there by name


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
    refuse_packed(old, new)


def links(top: nn.Module, below: Container[nn.Module]) -> list[Link]:
    """On the ways from @top down to the modules @below."""
    return [
        (above._modules, name, module)
        for above in top.modules()
        for name, module in above._modules.items()
        if module is not None and any(each in below for each in module.modules())
    ]


def refuse_packed(old: nn.Module, new: nn.Module | None) -> None:
    """@new is, or is to be, where @old was."""
    lost = next((each for each in old.modules() if each in _inside), None)
    if lost is not None and new is not None and is_packed(new):
        raise Guarded(
            f"{_inside[lost]} is replaced by a {type(new).__name__}, which packs weights of its own: it makes them "
            f"from whatever a window showed. Put the {type(lost).__name__} back, and quantise before sharding, or "
            f"after detach()"
        )


def _refuse(old: nn.Module, new: nn.Module) -> None:
    raise Guarded(
        f"{_waiting[old]} would be replaced by a {type(new).__name__} that takes its weights over: they are fetched "
        f"into a window, and it is the {type(old).__name__} that waits for them. Replace it before sharding, or "
        f"detach() first; with scope='block' it is the block that waits, and modules in it may be replaced"
    )


class Waiting:
    """These modules wait for their weights, or are @inside of one that does, until remove."""

    def __init__(self, names: Mapping[nn.Module, str], inside: Mapping[nn.Module, str]) -> None:
        self._names = names
        self._inside = inside
        _waiting.update(names)
        _inside.update(inside)

    def remove(self) -> None:
        for known, modules in ((_waiting, self._names), (_inside, self._inside)):
            for module in modules:
                known.pop(module, None)

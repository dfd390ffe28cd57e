# SPDX-License-Identifier: Apache-2.0
"""peft's merge() and unmerge() of an adapter write to the weight through `.data`, where torch counts no writes: outside
an update they are refused when they are called. With safe_merge another tensor is put there, which passes notice.

Knows what peft's layers are called; nothing of series.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .refusals import Guarded
from .registrations import on_registration

_ATTRIBUTES = ("merge", "unmerge")


def _has_adapters(module: Any) -> bool:
    return all(hasattr(type(module), name) for name in ("merged_adapters", *_ATTRIBUTES))


def _to_merge(module: Any, names: list[str] | None) -> list[str]:
    """Those of the adapters @names, or of the active ones, that this module has and has not merged."""
    homes = [getattr(module, home, ()) for home in module.adapter_layer_names]
    wanted = [name for name in names or module.active_adapters if name not in module.merged_adapters]
    return [name for name in wanted if any(name in home for home in homes)]


class Merging:
    """Of adapters round modules that hold shared weights, made before or after, until remove."""

    def __init__(
        self, modules: Iterable[nn.Module], names: Mapping[nn.Module, str], is_updating: Callable[[], bool]
    ) -> None:
        """@names: a shared weight's, of each module that holds one; @modules: these and all that are above them."""
        self._names = names
        self._is_updating = is_updating
        self._guarded: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        _merging.update(dict.fromkeys(names, weakref.ref(self)))
        for module in filter(_has_adapters, modules):
            self.guard(module)

    def guard(self, module: nn.Module) -> None:
        if module not in self._guarded:
            self._guarded.add(module)
            module.__dict__["merge"] = self._merge_of(module)
            module.__dict__["unmerge"] = self._unmerge_of(module)

    def _merge_of(self, module: Any) -> Callable[..., Any]:
        def merge(safe_merge: bool = False, adapter_names: list[str] | None = None) -> Any:
            if not safe_merge and _to_merge(module, adapter_names):
                self._refuse(module, "merge")
            return type(module).merge(module, safe_merge=safe_merge, adapter_names=adapter_names)

        return merge

    def _unmerge_of(self, module: Any) -> Callable[[], Any]:
        def unmerge() -> Any:
            if module.merged_adapters:
                self._refuse(module, "unmerge")
            return type(module).unmerge(module)

        return unmerge

    def _refuse(self, module: nn.Module, what: str) -> None:
        name = next((self._names[each] for each in module.modules() if each in self._names), None)
        if name is not None and not self._is_updating():
            raise Guarded(
                f"{what}() of an adapter would write to {name}, which is shared by layershard: call it (merge_adapter, "
                f"merge_and_unload, fuse_lora ...) on all ranks inside layershard.torch.of(model).update()"
            )

    def remove(self) -> None:
        for owner in self._names:
            if _merging_of(owner) is self:
                del _merging[owner]
        for module in self._guarded:
            for name in _ATTRIBUTES:
                module.__dict__.pop(name, None)
        self._guarded.clear()


# It refers to the modules, which would never be freed if it were held here.
_merging: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Merging]] = weakref.WeakKeyDictionary()


def _merging_of(module: nn.Module) -> Merging | None:
    found = _merging.get(module) if type(module).__hash__ is not None else None
    return found() if found else None


@on_registration
def _registered(parent: nn.Module, _name: str, new: Any) -> None:
    """An adapter is made round a module."""
    if _merging and isinstance(new, nn.Module) and _has_adapters(parent):
        for each in new.modules():
            merging = _merging_of(each)
            if merging:
                merging.guard(parent)

# SPDX-License-Identifier: Apache-2.0
"""What would write to shared weights, or quietly take them out of sharing, raises instead.

Guarded: load_state_dict of shared weights outside update(), .to / .half / .cuda and all else that goes through
Module._apply, deepcopy, pickling, state_dict where it would save windows, and train() where shared statistics would be
written. Not to be guarded in Python: writing to a parameter's elements (weight.add_, weight.data += ...). That memory
is read-only on ranks that are not its source, and the process dies by SIGSEGV.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
from torch import nn

from .compiled import refuse_made_by_trace, refuse_scripting, refuse_tracing
from .grouping import Place
from .merging import Merging
from .noticing import look_again
from .refusals import Guarded, all_tensors, keeps_statistics
from .withheld import Withheld, is_for_an_adapter
from .wrapped import Marks, names_in

_log = logging.getLogger("layershard")
_ASKED_BY_TRACE = "_layershard_asked_by_trace"
_ATTRIBUTES = (
    "train",
    "_apply",
    "__deepcopy__",
    "__reduce_ex__",
    "__prepare_scriptable__",
    "_get_name",
    _ASKED_BY_TRACE,
)


def _refuse(what: str, instead: str) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise Guarded(f"{what} on weights shared by layershard: {instead}")

    return refuse


def _refuse_state(*_args: Any) -> None:
    if not is_for_an_adapter():
        _refuse(
            "state_dict",
            "this rank does not hold all layers; use layershard.torch.of(model).state_dict('gathered'), on all ranks "
            "where layers are fetched in step. transformers' models take it: save_pretrained(directory, "
            "state_dict=layershard.torch.of(model).state_dict('gathered'))",
        )()


def _withholding(keys: list[str]) -> Callable[..., None]:
    """For a state_dict that has not been refused."""

    def withhold(_module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for key in keys:
            for name in [each for each in state_dict if f"{each}.".startswith(f"{prefix}{key}.")]:  # or its parts
                state_dict[name] = Withheld.named(name)

    return withhold


def refuse_loading(model: nn.Module, why: str) -> None:
    """For good. Nothing here refers to the model, which must go when its last user does."""
    for module in model.modules():
        module.register_load_state_dict_pre_hook(_refuse("load_state_dict", why))  # type: ignore[no-untyped-call]


def refuse_keeping(modules: Iterable[nn.Module], why: str) -> None:
    """For good, as above."""
    for module in modules:
        module.register_state_dict_pre_hook(_refuse("state_dict", why))  # type: ignore[no-untyped-call]
        module.__dict__["__deepcopy__"] = _refuse("copy.deepcopy", why)
        module.__dict__["__reduce_ex__"] = _refuse("copying or pickling", why)


def above(model: nn.Module, owners: Set[nn.Module]) -> list[nn.Module]:
    """The owners, and the modules that hold one, itself or further down."""
    return [module for module in model.modules() if not owners.isdisjoint(module.modules())]


def _guard_name(module: nn.Module) -> Callable[[], Any]:
    """Module._get_name of this one. torch.fx asks the module that it is to trace for it, whose hooks it leaves out."""

    def name() -> Any:
        refuse_tracing()
        return type(module)._get_name(module)  # type: ignore[no-untyped-call]

    return name


class _AskedByTrace:
    """torch.jit.trace asks all that can be called, of each module, whether it is to be scripted as well."""

    def __call__(self) -> None:
        pass

    @property
    def _torchscript_modifier(self) -> None:
        refuse_made_by_trace()


class Guards:
    """The guards of one model: on what owns shared tensors and all that is above it. They are taken off by remove."""

    def __init__(
        self,
        model: nn.Module,
        places: Iterable[Place],
        kinds: set[tuple[torch.dtype, torch.device]],
        is_updating: Callable[[], bool],
        *,
        is_alone: bool,
    ) -> None:
        self._kinds = kinds
        self._is_updating = is_updating
        self._owners: dict[nn.Module, list[str]] = {}
        self._statistics: dict[nn.Module, str] = {}  # that a forward in train mode would write
        self._is_told = False
        names: dict[nn.Module, str] = {}
        for place in places:
            names.setdefault(place.owner, place.name)
            keys = self._owners.setdefault(place.owner, [])
            keys += [place.key] if place.key not in keys else []  # of several parts it is one
            if not place.is_parameter and keeps_statistics(place.owner):
                self._statistics[place.owner] = place.name
        self._modules = above(model, self._owners.keys())
        self._handles: list[Any] = [Marks(self._modules, self._owners)]
        if not is_alone:  # one rank alone may write to what it reads in place
            self._handles.append(Merging(self._modules, names, is_updating))
        for module in self._modules:
            self._put(module)

    def _put(self, module: nn.Module) -> None:
        module.__dict__["train"] = self._guard_train(module)
        module.__dict__["_apply"] = self._guard_apply(module)
        module.__dict__["__deepcopy__"] = _refuse(
            "copy.deepcopy", "the copy would not be shared; build the second model and shard it too, or detach() first"
        )
        module.__dict__["__reduce_ex__"] = _refuse(
            "copying or pickling", "save layershard.torch.of(model).state_dict() instead, or detach() first"
        )
        self._handles.append(
            module.register_load_state_dict_pre_hook(self._guard_loading)  # type: ignore[no-untyped-call]
        )

    def _guard_loading(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_args: Any) -> None:
        """What is not shared may be loaded by itself, by the names that it has now: an adapter, a head."""
        if self._is_updating():
            return
        named = {prefix + name for name, _ in all_tensors(module)} - {prefix + name for name in names_in(module)}
        others = [name for name in state_dict if name.startswith(prefix) and name not in named]
        if others:
            _refuse(
                f"load_state_dict ({others[0]})",
                "do it inside layershard.torch.of(model).update(), or use layershard.torch.load; what is not shared "
                "may be loaded by itself",
            )()

    def refuse_keeping(self) -> None:
        """Where layers are fetched into windows, a parameter shows whatever is passing through."""
        for module in self._modules:
            self._handles.append(module.register_state_dict_pre_hook(_refuse_state))  # type: ignore[no-untyped-call]
            module.__dict__["__prepare_scriptable__"] = refuse_scripting  # what torch.jit.script asks first
            module.__dict__["_get_name"] = _guard_name(module)
            module.__dict__[_ASKED_BY_TRACE] = _AskedByTrace()
        for owner, keys in self._owners.items():
            withhold = _withholding(keys)
            self._handles.append(owner.register_state_dict_post_hook(withhold))  # type: ignore[no-untyped-call]

    def _guard_train(self, module: nn.Module) -> Callable[..., nn.Module]:
        """Module.train for this one, looked at as a whole before any part of it has changed."""

        def train(mode: bool = True) -> nn.Module:
            if mode:
                self._refuse_statistics(module)
                self._tell_training(type(module).__name__)
            look_again(module)  # torch's quantisation in place calls eval() and replaces what is in it
            changed: nn.Module = type(module).train(module, mode)
            return changed

        return train

    def _refuse_statistics(self, module: nn.Module) -> None:
        for each in module.modules():
            if each in self._statistics:
                raise Guarded(
                    f"train() of a {type(each).__name__} would let it write to {self._statistics[each]}, which is "
                    f"shared by layershard: leave it in eval mode, or shard again without it in buffers"
                )

    def _tell_training(self, kind: str) -> None:
        """Dropout may be wanted, so it is no error. Once."""
        if not self._is_told:
            _log.warning(
                "%s.train(): weights shared by layershard have no gradients and do not learn; detach() to train them",
                kind,
            )
        self._is_told = True

    def _guard_apply(self, module: nn.Module) -> Callable[..., nn.Module]:
        """Module._apply for this one: nothing to do is allowed, so that .to() of the same device and dtype works."""

        def apply(function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
            for dtype, device in self._kinds:
                probe = function(torch.empty(0, dtype=dtype, device=device))
                if probe.dtype != dtype or probe.device != device:
                    raise Guarded(
                        f"moving or converting weights shared by layershard ({dtype} on {device} to {probe.dtype} on "
                        f"{probe.device}): do so before sharding, or detach() first. What converts round each forward "
                        f"(layerwise casting) must leave shared modules out"
                    )
            return self._apply_to_others(module, function, recurse)

        return apply

    def _apply_to_others(self, module: nn.Module, function: Callable[..., Any], recurse: bool) -> nn.Module:
        """Module._apply without the shared tensors: they stay as they are."""
        if module not in self._owners:
            applied: nn.Module = type(module)._apply(module, function, recurse)  # type: ignore[no-untyped-call]
            return applied
        homes: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        shared = [(home, key, home[key]) for key in self._owners[module] for home in homes if key in home]
        for home, key, _ in shared:
            home[key] = None
        try:  # not by the type's own: a recurrent module would gather its weights anew
            return nn.Module._apply(module, function, recurse)  # type: ignore[no-untyped-call, no-any-return]
        finally:
            for home, key, tensor in shared:
                home[key] = tensor

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._modules:
            for name in _ATTRIBUTES:
                module.__dict__.pop(name, None)

# SPDX-License-Identifier: Apache-2.0
"""What torch's wrappers would do to shared weights: they leave them alone, or are refused.

DistributedDataParallel broadcasts rank 0's tensors over everybody's, when it is made and, of buffers, in every pass.
fully_shard, FullyShardedDataParallel and replicate put tensors of their own in the place of a module's. All of these
can be told what is not theirs, and then do the rest of the model rightly. distribute_module and DataParallel cannot.

Knows torch's wrappers and the marks they look for; nothing of series or passes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed import is_available
from torch.nn.parallel import DistributedDataParallel

from .refusals import Guarded
from .registrations import on_registration

_KEYS = "_layershard_shared"  # of a module that holds shared tensors: their names in it
_ASKED_BY_TENSOR_PARALLEL = "_distribute_module_applied"
_ASKED_BY_DATA_PARALLEL = "_replicate_for_data_parallel"
_REPLACING = ("fully_shard", "replicate")
_parallel: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()  # all that were made since this was imported


def names_in(module: nn.Module) -> Iterator[str]:
    """Of all shared tensors, as @module names them."""
    for path, owner in module.named_modules():
        for key in owner.__dict__.get(_KEYS, ()):
            yield f"{path}.{key}" if path else key


def _leave_to_us(parallel: DistributedDataParallel, module: nn.Module) -> None:
    parallel.parameters_to_ignore.update(names_in(module))


@on_registration
def _registered(parent: nn.Module, _name: str, child: Any) -> None:
    """DistributedDataParallel registers what it is given before it sends anything."""
    if isinstance(parent, DistributedDataParallel) and isinstance(child, nn.Module):
        _parallel.add(parent)
        _leave_to_us(parent, child)


class _Applied(dict[Any, Any]):
    """What torch.distributed keeps of the functions that were applied to a module; asked first by each of them."""

    def __contains__(self, function: object) -> bool:
        name = getattr(function, "__name__", "")
        if name in _REPLACING:
            raise Guarded(
                f"{name} of a module whose weights are shared by layershard: the ranks store them once between them "
                f"already. Leave it out (over the whole model or a block, {name} leaves it out by itself), or detach() "
                f"first"
            )
        return super().__contains__(function)


class _Registry(dict[str, Any]):
    """The names of these functions. One that says it was replicated already is left alone, and so is all below it: not
    where that would leave out what is to be trained."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(dict.fromkeys(_REPLACING))
        self._owner = owner

    def __contains__(self, name: object) -> bool:
        if name in _REPLACING:
            return not any(each.requires_grad for each in self._owner.parameters())
        return super().__contains__(name)


class _AskedFirst:
    """In the place of a flag."""

    def __bool__(self) -> bool:
        raise Guarded(
            "distribute_module or parallelize_module on weights shared by layershard, which it would write to: use "
            "layershard.torch.dual for tensor-parallel products, or detach() first"
        )


def _refuse_replicas(*_args: Any) -> nn.Module:
    raise Guarded(
        "torch.nn.DataParallel copies weights shared by layershard to other devices, whatever they show by then: run "
        "one process for each device, or detach() first"
    )


def _marks_of_distributed(owner: nn.Module) -> dict[str, Any]:
    """For a module that fully_shard and the like, over what is above it, shall leave alone."""
    if not is_available():
        return {}
    with contextlib.suppress(ImportError):  # names of torch's own that may go; then these wrappers have changed, too
        from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

        return {STATE_KEY: _Applied(), REGISTRY_KEY: _Registry(owner)}
    return {}


def shared_keys(owner: nn.Module) -> Sequence[str]:
    """Names of the tensors that a module holds itself and that are shared."""
    return owner.__dict__.get(_KEYS) or ()


class Marks:
    """On the modules of one model, until remove."""

    def __init__(self, modules: list[nn.Module], keys: Mapping[nn.Module, list[str]]) -> None:
        """@keys: the modules that hold shared tensors, and which; @modules: these and all that are above them."""
        self._put: list[tuple[nn.Module, str]] = []
        for owner, names in keys.items():
            self._mark(owner, {_KEYS: names, **_marks_of_distributed(owner)})
        for module in modules:
            self._mark(module, {_ASKED_BY_TENSOR_PARALLEL: _AskedFirst(), _ASKED_BY_DATA_PARALLEL: _refuse_replicas})

        for parallel in {*_parallel, *(each for each in modules if isinstance(each, DistributedDataParallel))}:
            if hasattr(parallel, "module"):  # else it was refused itself
                _leave_to_us(parallel, parallel.module)

    def _mark(self, module: nn.Module, marks: dict[str, Any]) -> None:
        for name, value in marks.items():
            before = module.__dict__.get(name)
            if isinstance(before, dict):  # another function of torch.distributed was applied
                value.update(before)
            elif before is not None:
                continue
            module.__dict__[name] = value
            self._put.append((module, name))

    def remove(self) -> None:
        for module, name in self._put:
            value = module.__dict__.pop(name, None)
            if isinstance(value, dict) and value.keys() - set(_REPLACING):
                module.__dict__[name] = {key: each for key, each in value.items() if key not in _REPLACING}

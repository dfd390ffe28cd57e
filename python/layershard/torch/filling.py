# SPDX-License-Identifier: Apache-2.0
"""Weights put into a sharded model tensor by tensor: on each rank its own layers, and what is not shared.

Knows the model's tensors and where each is; where values come from is the caller's: a checkpoint, a generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .grouping import Place
from .handle import Handle, of
from .layout import Layout
from .memory import release_freed_memory
from .refusals import Refused, all_tensors, refuse_no_module
from .together import together

Give = Callable[[str, torch.Tensor], torch.Tensor]


class _Progress:
    """A bar of bytes where a person looks on and tqdm is installed."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._bar: Any = None

    def open(self, total: int) -> None:
        rank = self._rank
        try:
            from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
        except ImportError:
            return
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"rank {rank}", position=rank, disable=None)

    def add(self, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.update(nbytes)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def saved(model: nn.Module) -> dict[int, tuple[torch.Tensor, list[Place]]]:
    """What a state_dict would hold: each tensor with every place where it is. Tied ones are in several."""
    found: dict[int, tuple[torch.Tensor, list[Place]]] = {}
    for path, owner in model.named_modules(remove_duplicate=False):
        named = [*owner._parameters.items()]
        named += [each for each in owner._buffers.items() if each[0] not in owner._non_persistent_buffers_set]
        for key, tensor in named:
            if tensor is not None:
                place = Place(f"{path}.{key}" if path else key, owner, key)
                found.setdefault(id(tensor), (tensor, []))[1].append(place)
    return found


def unshared(model: nn.Module, handle: Handle) -> list[tuple[torch.Tensor, list[Place]]]:
    shared = {id(place.whole) for place in handle.all_places()}
    return [each for key, each in saved(model).items() if key not in shared]


def refuse_lost(model: nn.Module) -> None:
    """What no checkpoint holds must be there already."""
    held = saved(model)
    lost = [name for name, tensor in all_tensors(model) if tensor.device.type == "meta" and id(tensor) not in held]
    if lost:
        raise Refused(
            f"{', '.join(lost[:4])} are on the meta device, and no checkpoint holds them: build the model inside "
            f"layershard.torch.empty_weights(), which leaves such buffers real"
        )


class Prepared(NamedTuple):
    """@give is called with a name and the tensor that is there, and returns values of the same shape. @says what they
    are taken from, alike on all ranks."""

    give: Give
    says: str = ""


class Filling:
    """One filling of a model. An exception on one rank, also of @prepare, is one on all of them, with its reason."""

    def __init__(self, model: nn.Module, handle: Handle, prepare: Callable[[], Prepared], *, everything: bool) -> None:
        self._model = model
        self._handle = handle
        self._prepare = prepare
        self._everything = everything
        self._give: Give
        self._progress = _Progress(handle.group.rank)

    def run(self) -> None:
        group, device = self._handle.group, self._handle.device
        why = "the weights are being loaded: pass again when that has ended"
        with torch.no_grad():
            if self._handle.committed:
                self._handle.caught_up()
            self._give = together(group, device, self._prepare, lambda prepared: prepared.says).give
            self._handle.shut("load()" if self._everything else "fill()", why)
            try:
                self._shut(why)
                self._begin()
                together(group, device, self._fill_others)
                together(group, device, self._fill_shared)
            except BaseException as failure:
                words = f"{type(failure).__name__}: {failure}".removesuffix(": ")
                self._shut(
                    f"loading the weights has failed, and they may be half written ({words}): load them again, on all "
                    f"ranks, or close() and build the model again"
                )
                raise
            finally:
                self._progress.close()
        self._shut(None)

    def _shut(self, why: str | None) -> None:
        """No pass, and no update, from the first byte that is written until the last. Until then all is as before."""
        self._handle.gate(why)
        for each in self._handle.shared:
            each.loading = why is not None

    def _begin(self) -> None:
        """From here on weights that were there are half written, until all of it has succeeded."""
        for each in self._handle.shared:
            if each.committed and not each.updating:  # else the last load or update has failed
                each.series.update_begin()
                each.updating = True

    def _fill_others(self) -> None:
        """What is not shared: waits for no other rank."""
        others = [each for each in unshared(self._model, self._handle) if self._everything or each[0].is_meta]
        total = sum(place.tensor.nbytes for place in self._handle.own_places())
        self._progress.open(total + sum(tensor.nbytes for tensor, _ in others))
        for tensor, places in others:
            self._set(tensor, places, self._value(places[0].name, tensor))

    def _fill_shared(self) -> None:
        for each in self._handle.shared:
            if each.committed:
                each.series.update_end(each.writer(self._read_shared))
                each.updating = False
            else:
                each.commit(self._read_shared)

    def _value(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        value = self._give(name, tensor)
        if value.shape != tensor.shape:
            raise Refused(f"{name} is {list(tensor.shape)}; the values given for it are {list(value.shape)}")
        self._progress.add(tensor.nbytes)
        return value

    def _set(self, tensor: torch.Tensor, places: list[Place], value: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            tensor.copy_(value)
            return
        new = Layout.of(tensor).empty(self._handle.device).copy_(value)  # empty_like of meta imports half of torch
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            new.__dict__.update(tensor.__dict__)
        for place in places:
            (place.owner._parameters if place.is_parameter else place.owner._buffers)[place.key] = new  # type: ignore

    def _read_shared(self, place: Place) -> torch.Tensor:
        return self._value(place.name, place.tensor)


def fill(model: nn.Module, give: Give) -> nn.Module:
    """Fill a sharded model that is on the meta device by a function of one's own. Collective.

    @give is called with a name and a tensor of the right shape, for each tensor of the layers that this rank is source
    of and for what is not shared and still empty; it returns the values. Nothing else is ever made on this rank.
    """

    refuse_no_module(model, "fill(model, give)")
    handle = of(model)

    def prepare() -> Prepared:
        refuse_lost(handle.model)
        return Prepared(give)

    Filling(handle.model, handle, prepare, everything=False).run()
    release_freed_memory()
    return model

# SPDX-License-Identifier: Apache-2.0
"""What a program left under the names of shared tensors while an update lasted, however it wrote them.

Code writes weights in place, by p.data = new, by another Parameter, by swapping objects. What lies under the name at
the end is what was meant. It is copied to where the library wants it, or refused by name; then the model's own objects
are put back, since optimizers, adapters and compiled code may hold them.

Knows places and tensors; nothing of ranks, series or the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ..containers import tensors_in
from ..grouping import Place
from ..layout import Layout
from ..memory import address_of
from ..parts import parts_of
from ..refusals import Refused

_FROM_SCRATCH = (
    "{name} was computed from {source}, which another rank stores: inside an update there is only scratch under that "
    "name here. Take what is needed from layershard.torch.of(model).state_dict() before the update begins"
)
_NOT_SHARED = (
    "{names}: not shared, and computed from {source}, which another rank stores, so that it is wrong on this rank. "
    "Share it in the same pattern (a buffer: buffers=), or take what is needed from "
    "layershard.torch.of(model).state_dict() before the update begins. It stays as the update left it: set it again"
)
_SENT = (
    "{operator} gave other ranks what was computed from {source}, which another rank stores: inside an update there is "
    "only scratch under that name here. Give what this rank stores (update.parameters()), a tensor apart from the "
    "model, or what layershard.torch.of(model).state_dict() gave before the update begins"
)

SourceOf = Callable[[torch.Tensor], str | None]


class StandIn:
    """One of the model's tensors for as long as @target, memory that may be written, stands in its place."""

    def __init__(self, place: Place, target: torch.Tensor, *, own: bool) -> None:
        place.put(target)
        self.place = place
        self.target = target
        self.own = own  # what is written counts; elsewhere it is dropped
        self.holder = place.tensor
        self._home = place.owner._parameters if place.is_parameter else place.owner._buffers

    def found(self) -> torch.Tensor:
        """What lies under the name now. Refused where it is not a tensor like the one that was there."""
        name, owner, key = self.place.name, self.place.owner, self.place.key
        homes = [home for home in (owner._parameters, owner._buffers, owner.__dict__) if home.get(key) is not None]
        now = homes[0][key] if homes else None
        if not isinstance(now, torch.Tensor):
            raise Refused(f"{name} is gone: an update takes new values under the old names, as tensors")
        if type(now.data) is not torch.Tensor or now.is_meta or now.layout is not torch.strided:
            raise Refused(f"{name} is now a {type(now.data).__name__} on {now.device}: new values are plain tensors")
        if (now.shape, now.dtype) != (self.target.shape, self.target.dtype):
            raise Refused(f"{name} is now {Layout.of(now.data)}; the shared weight is {Layout.of(self.target)}")
        return now.data

    def restore(self) -> None:
        """The model's own object, over the memory that stood in."""
        for home in (self.place.owner._parameters, self.place.owner._buffers, self.place.owner.__dict__):
            if home is not self._home:
                home.pop(self.place.key, None)
        self._home[self.place.key] = self.holder  # type: ignore[assignment]  # a parameter, if its home is theirs
        self.holder.data = self.target


def collect(stand_ins: Sequence[StandIn], source_of: SourceOf) -> None:
    """Copy into each own target what lies under its name. Nothing is copied if anything is refused: @source_of tells
    of values which weight of another rank they were computed from."""
    memory = {address_of(each.target): each.place.name for each in stand_ins}
    storages = {each.target.untyped_storage()._cdata: each.place.name for each in stand_ins}
    moved = []
    for each in stand_ins:
        now = each.found()
        source = source_of(now) if each.own else None
        if source is not None:
            raise Refused(_FROM_SCRATCH.format(name=each.place.name, source=source))
        if now.data_ptr() == each.target.data_ptr() and now.stride() == each.target.stride():
            continue  # written in place, or not at all
        other = storages.get(now.untyped_storage()._cdata, memory.get(address_of(now)))
        if other is not None and address_of(now) != address_of(each.target):
            raise Refused(f"{each.place.name} is now memory of {other}, which is not the same on all ranks: clone it")
        moved.append((each, now))
    with torch.no_grad():
        for each, now in moved:
            if each.own:
                each.target.copy_(now.clone() if address_of(now) == address_of(each.target) else now)


def refuse_sent(sent: tuple[str, str] | None) -> None:
    if sent is not None:
        operator, source = sent
        raise Refused(_SENT.format(operator=operator, source=source))


def refuse_unshared(model: nn.Module, stand_ins: Sequence[StandIn], source_of: SourceOf) -> None:
    """What each rank has of its own must be computed from weights, not from the scratch that stands for them."""
    shared = {(each.place.owner, each.place.key) for each in stand_ins}
    themselves = {id(each.holder) for each in stand_ins}  # recurrent modules keep a list of their weights
    found = [
        (name, source_of(tensor))
        for where, name, tensor in _tensors(model)
        if where not in shared and id(tensor) not in themselves
    ]
    wrong = [(name, source) for name, source in found if source is not None]
    if wrong:
        names = ", ".join(name for name, _ in wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise Refused(_NOT_SHARED.format(names=names, source=wrong[0][1]))


def _tensors(model: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], str, torch.Tensor]]:
    """Parameters, buffers, their gradients and what lies in plain attributes, with where they are. In lists and dicts
    that are private to a module lies what it computes for itself, layer by layer, and writes to none: peft's caches."""
    for path, owner in model.named_modules():
        plain = {key: value for key, value in owner.__dict__.items() if key not in ("_parameters", "_buffers")}
        for key, value in {**plain, **owner._parameters, **owner._buffers}.items():
            for each in tensors_in(value):
                if each is not value and key.startswith("_"):
                    continue
                for name, tensor in [(key, each), (f"{key}.grad", each.grad if each.is_leaf else None)]:
                    for _, part in parts_of(tensor) if tensor is not None else ():
                        yield (owner, key), f"{path}.{name}".removeprefix("."), part

# SPDX-License-Identifier: Apache-2.0
"""Chosen modules made into series: which layers, which tensors in each, where in the model each of them is.

Knows modules and layouts; nothing of ranks, memory or the library.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from .coverage import persistent_buffers
from .layout import Layout
from .numbering import layer_number
from .parts import Path, kind_of, part, parts_of
from .patterns import Unit
from .refusals import Refused
from .wrapped import shared_keys

SCOPES = ("linear", "block")


@dataclass(frozen=True)
class Place:
    """Where a tensor is: owner._parameters[key] or owner._buffers[key], or a part of what is there and wraps others."""

    name: str  # qualified
    owner: nn.Module
    key: str
    wants_gradients: bool = False  # before it was shared
    path: Path = ()  # of the part

    @property
    def is_parameter(self) -> bool:
        return self.key in self.owner._parameters

    @property
    def whole_name(self) -> str:
        return self.name.removesuffix("".join(f".{each}" for each in self.path))

    @property
    def whole(self) -> torch.Tensor:
        """What the module has there, of which the tensor may be a part."""
        tensor = (self.owner._parameters if self.is_parameter else self.owner._buffers)[self.key]
        assert tensor is not None
        return tensor

    @property
    def tensor(self) -> torch.Tensor:
        return part(self.whole, self.path)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.tensor, kind_of(self.whole))

    def put(self, tensor: torch.Tensor) -> None:
        """Put @tensor there. What is there stays the same object where torch allows it: others may hold it. What
        was made in inference mode cannot show what was not."""
        old = self.tensor
        if old.device.type != tensor.device.type or old.is_inference() != tensor.is_inference():
            self._replace(old, tensor)
            return
        self.whole.requires_grad_(False)
        old.data = tensor

    def give(self, tensor: torch.Tensor) -> None:
        """Put @tensor there for good: shared no more, it is as trainable as it was before."""
        self.put(tensor)
        self.whole.requires_grad_(self.wants_gradients)

    def _replace(self, old: torch.Tensor, tensor: torch.Tensor) -> None:
        if self.path:
            self.whole.requires_grad_(False)
            setattr(part(self.whole, self.path[:-1]), self.path[-1], tensor)
            return
        if not self.is_parameter:
            self.owner._buffers[self.key] = tensor
            return
        new = nn.Parameter(tensor, requires_grad=False)
        new.__dict__.update(old.__dict__)
        self.owner._parameters[self.key] = new

    def undo(self) -> Callable[[], None]:
        """What puts back what is there now, whatever has been put there since."""
        whole, tensors = self.whole, self.owner._parameters if self.is_parameter else self.owner._buffers
        before, wants_gradients = self.tensor, whole.requires_grad
        data = before.data

        def restore() -> None:
            tensors[self.key] = whole  # type: ignore[assignment]
            if self.path:
                setattr(part(whole, self.path[:-1]), self.path[-1], before)
            before.data = data
            whole.requires_grad_(wants_gradients)

        return restore


@dataclass
class SeriesPlan:
    """Layers of one structure. tensors[t] describes places[layer][t] of every layer."""

    name: str
    block: str  # "model.layers.*": what the tensors' names are relative to
    numbers: list[int]  # the layers' numbers in the model's names, ascending
    tensors: dict[str, Layout] = field(default_factory=dict)
    places: list[list[Place]] = field(default_factory=list)
    units: list[list[Unit]] = field(default_factory=list)
    start: int | None = None  # the library's number of the first layer, where it is not to follow from @numbers
    is_part: bool = False  # one of several for what a pattern chose, which may begin on any rank
    scope: str = "linear"

    @property
    def is_consecutive(self) -> bool:
        return self.numbers[-1] - self.numbers[0] == len(self.numbers) - 1

    @property
    def first_layer(self) -> int:
        """The library wants consecutive numbers: the model's own where they are, else positions."""
        if self.start is not None:
            return self.start
        return self.numbers[0] if self.is_consecutive else 0

    @property
    def numbers_text(self) -> str:
        """Which layers, for people: 0-2, or 3-47 (12)."""
        text = f"{self.numbers[0]}-{self.numbers[-1]}"
        return text if self.is_consecutive else f"{text} ({len(self.numbers)})"

    @property
    def layer_bytes(self) -> int:
        return sum(layout.nbytes for layout in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return self.layer_bytes * len(self.places)

    def layers(self) -> Iterator[tuple[int, list[Place]]]:
        """The library's layer numbers and what is there."""
        return enumerate(self.places, self.first_layer)


def places_of(name: str, module: nn.Module, buffers: Sequence[str]) -> Iterator[Place]:
    """Parameters, and the persistent ones of the buffers that @buffers' patterns name."""
    for path, owner in module.named_modules(prefix=name):
        keys = [key for key, tensor in owner._parameters.items() if tensor is not None]
        keys += [
            key
            for key, tensor in owner._buffers.items()
            if tensor is not None
            and key not in owner._non_persistent_buffers_set
            and any(fnmatchcase(f"{path}.{key}", pattern) for pattern in buffers)
        ]
        for key in keys:
            tensor = (owner._parameters if key in owner._parameters else owner._buffers)[key]
            assert tensor is not None
            for inside, each in parts_of(tensor):
                if each.numel():
                    yield Place(".".join((path, key, *inside)), owner, key, tensor.requires_grad, inside)


def _by_series(units: Sequence[Unit], scope: str) -> dict[str, dict[int, list[Unit]]]:
    found: dict[str, dict[int, list[Unit]]] = {}
    for unit in units:
        name = unit.block_template if scope == "block" else unit.template
        found.setdefault(name, {}).setdefault(unit.layer, []).append(unit)
    return found


def difference(first: dict[str, Layout], other: dict[str, Layout]) -> str:
    """The first thing in which two layers' tensors are not alike, in words."""
    for name in first.keys() | other.keys():
        if first.get(name) != other.get(name):
            return f"{name} is {first.get(name, 'absent')} in the first and {other.get(name, 'absent')} in the second"
    return "the order of their tensors differs"


def _split(name: str, layers: dict[int, list[Unit]], scope: str, buffers: Sequence[str]) -> list[SeriesPlan]:
    """One series for each structure among the layers, in the order of the first ones' numbers."""
    block = next(iter(layers.values()))[0].block_template
    found: dict[tuple[tuple[str, Layout], ...], SeriesPlan] = {}
    for number, units in sorted(layers.items()):
        places = [place for unit in units for place in places_of(unit.name, unit.module, buffers)]
        start = len(units[0].block) + 1
        tensors = {place.name[start:]: place.layout for place in places}
        if tensors:
            plan = found.setdefault(tuple(tensors.items()), SeriesPlan(name, block, [], tensors, scope=scope))
            plan.numbers.append(number)
            plan.places.append(places)
            plan.units.append(units)
    plans = list(found.values())
    for count, plan in enumerate(plans, 1):
        plan.name = f"{name} #{count}" if len(plans) > 1 else name
        plan.is_part = len(plans) > 1 or layer_number(block) is not None  # stages.1.layers.* beside stages.2.layers.*
    return plans


def _refuse_buffers(units: Sequence[Unit], buffers: Sequence[str]) -> None:
    names = persistent_buffers(units)
    for pattern in buffers:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            there = ", ".join(names[:4]) or "none"
            raise Refused(f"buffers' pattern '{pattern}' matches none that a state_dict would hold; there are: {there}")


def group(units: Sequence[Unit], scope: str, buffers: Sequence[str] = ()) -> list[SeriesPlan]:
    """One series per module name (scope linear), or one per kind of block with all that was chosen in it (block); where
    its layers differ, one for each structure."""
    if scope not in SCOPES:
        raise Refused(f"scope is '{scope}'; it must be one of {', '.join(SCOPES)}")
    _refuse_buffers(units, buffers)
    plans: list[SeriesPlan] = []
    for name, layers in _by_series(units, scope).items():
        plans += _split(name, layers, scope, buffers)
    if not plans:
        names = ", ".join(persistent_buffers(units)[:3])
        hint = f"; buffers ({names}) are shared by name only: buffers='*'" if names else ""
        raise Refused(f"the chosen modules hold no parameters{hint}")
    return plans


def refuse_shared_already(plans: Sequence[SeriesPlan]) -> None:
    """What an earlier call shares is in no other series, whether that call was given this model, one in it, or one
    round it."""
    for plan in plans:
        for units, places in zip(plan.units, plan.places, strict=True):
            for place in places:
                if place.key in shared_keys(place.owner):
                    unit = next(each.name for each in units if place.name.startswith(f"{each.name}."))
                    raise Refused(
                        f"{place.name} is shared already, by an earlier call of shard: leave {unit} out of the "
                        f"patterns, or detach() the model first and give all patterns in one call"
                    )


def tell_apart(plans: Sequence[SeriesPlan], earlier: Sequence[SeriesPlan]) -> None:
    """Let no series have the name of an earlier call's: the next number that is free."""
    taken = {plan.name for plan in earlier}
    for plan in plans:
        base = plan.name.partition(" #")[0]
        names = (f"{base} #{count}" for count in itertools.count(2))
        plan.name = plan.name if plan.name not in taken else next(name for name in names if name not in taken)
        taken.add(plan.name)


def refuse_stripes(plans: Sequence[SeriesPlan], stripes: dict[str, str]) -> None:
    """A pattern that matches no tensor would leave one to be cut by bytes, and be noticed when a slice is asked for."""
    if not isinstance(stripes, dict):
        raise Refused(f"stripe is {stripes!r}: give patterns and kinds, such as {{'*': 'rows'}}")
    names = [f"{plan.block}.{name}" for plan in plans for name in plan.tensors]
    for pattern in stripes:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise Refused(f"stripe's pattern '{pattern}' matches no shared tensor; they are: {', '.join(names[:6])}")


def stripe_of(name: str, stripes: dict[str, str]) -> str:
    """How the tensor @name is to be cut: the last of @stripes' patterns that matches it; by bytes without one."""
    kinds = [kind for pattern, kind in stripes.items() if fnmatchcase(name, pattern)]
    return kinds[-1] if kinds else "bytes"

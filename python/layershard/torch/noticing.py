# SPDX-License-Identifier: Apache-2.0
"""What was done to shared tensors from outside since the library attached them: noticed when their module runs next.

Knows places and tensors; nothing of series or passes. A tensor that is there instead, or shows other memory, is seen
by any look; a write in place is seen where torch counts it (`_version`): not one through `.data` or numpy, nor one to a
tensor that was made in inference mode.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import stateless

from .callers import is_inside
from .grouping import Place
from .refusals import Guarded
from .registrations import on_registration
from .replaced import Link, links, refuse_packed

_LENDING = stateless._functional_call.__code__  # torch.func.functional_call's and the older one's
_MOST = 12  # tensors to look at each time a module runs: what a look costs is part of the hook
_LINKS = 1  # between the modules in it, likewise

_REPLACED = (
    "{name} is no longer what layershard put there: it was replaced, wrapped (a parametrization, adapters, "
    "torch.utils.swap_tensors) or given other memory, and this rank alone would compute from that. Put it back, or do "
    "it before sharding; give new values inside layershard.torch.of(model).update()"
)
_WRITTEN = (
    "{name} was written in place outside an update: on its source that changes the weights of every rank at once, in a "
    "window it is lost. Write inside layershard.torch.of(model).update(), and do so now: passes are refused until an "
    "update has been made"
)


class _Inside:
    """In the place of a module's tensors, for a part of one of them."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def get(self, _key: str) -> torch.Tensor | None:
        try:
            return self._place.tensor
        except (AssertionError, AttributeError, KeyError):  # something else is there
            return None


class _Attached(NamedTuple):
    """One tensor as it was attached: where, what, the address it shows and the writes counted by then."""

    tensors: Mapping[str, torch.Tensor | None] | _Inside  # of its module
    key: str
    tensor: torch.Tensor
    address: int
    version: int | None  # None: torch counts none
    name: str

    @classmethod
    def at(cls, place: Place) -> _Attached:
        tensor, version = place.tensor, None
        with suppress(RuntimeError):  # one that was made in inference mode
            version = tensor._version
        tensors: Any = place.owner._parameters if place.is_parameter else place.owner._buffers
        found = _Inside(place) if place.path else tensors
        return cls(found, place.key, tensor, tensor.data_ptr(), version, place.name)


_watched: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Watch]] = weakref.WeakKeyDictionary()


@on_registration
def _registered(module: nn.Module, *_what: Any) -> None:
    """What parametrizes, prunes or normalises a weight registers something on its module."""
    look_again(module)


def look_again(module: nn.Module) -> None:
    """At all of it, in the next pass."""
    if type(module).__hash__ is None:
        return
    watch = _watched.get(module, _of_none)()
    if watch is not None:
        watch.look_at_all()


def _is_lent() -> bool:
    """Whether functional_call has put its caller's own tensors there, for one pass. Asked where others are there."""
    return is_inside((_LENDING,))


def _of_none() -> None:
    pass


class Watch:
    """The shared tensors that one module computes from, and the ways to the modules in it that hold them. Of many, some
    are looked at in each pass, in turn."""

    def __init__(self, module: nn.Module, places: Sequence[Place]) -> None:
        self._module = module
        self._places = list(places)
        self._link()
        self._counting = True
        _watched.update((place.owner, weakref.ref(self)) for place in places)
        self.record()

    def record(self) -> None:
        """As they are now is how they should be: called whenever the library has attached them."""
        self._attached = [_Attached.at(place) for place in self._places]
        self._arrange()

    def _arrange(self) -> None:
        attached = self._attached if self._counting else [each._replace(version=None) for each in self._attached]
        parts = [tuple(attached[begin : begin + _MOST]) for begin in range(0, len(attached), _MOST)]
        self._all, self._in_turn = tuple(attached), itertools.cycle(parts)
        self._parts: Iterator[tuple[_Attached, ...]] = self._in_turn

    def _link(self) -> None:
        found = links(self._module, {place.owner for place in self._places})
        parts = [tuple(found[begin : begin + _LINKS]) for begin in range(0, len(found), _LINKS)]
        self._all_links, self._links_in_turn = tuple(found), itertools.cycle(parts or [()])
        self._links: Iterator[tuple[Link, ...]] = self._links_in_turn

    def _follow(self, old: nn.Module, new: nn.Module | None) -> None:
        """Another module is where @old was: adapters, say, which hold it."""
        self.look_at_all()
        refuse_packed(old, new)
        self._link()

    def look_at_all(self) -> None:
        """In the next pass."""
        self._links = itertools.chain([self._all_links], self._links_in_turn)
        self._parts = itertools.chain([self._all], self._in_turn)

    def count(self) -> None:
        """A write that is none, in each of the tensors: autograd gives none of those that it has saved by now."""
        torch._C._increment_version([each.tensor for each in self._attached])
        self._attached = [
            each if each.version is None else each._replace(version=each.version + 1) for each in self._attached
        ]
        self._arrange()
        self.look_at_all()

    def _refuse(self, text: str, name: str) -> None:
        self.look_at_all()  # the next pass is refused, too, unless this has been put right
        raise Guarded(text.format(name=name))

    def look(self, _layer: int, _stream: int) -> None:
        """Called as the calls of a pass are, before them."""
        for modules, key, module in next(self._links):
            if modules.get(key) is not module:
                self._follow(module, modules.get(key))
        for tensors, key, tensor, address, version, name in next(self._parts):
            if tensors.get(key) is not tensor or tensor.data_ptr() != address:
                if _is_lent():
                    continue
                self._refuse(_REPLACED, name)
            if version is not None and tensor._version != version:
                self._refuse(_WRITTEN, name)

    def look_compiled(self, layer: int, stream: int) -> None:
        """The same in a compiled program."""
        self.stop_counting()
        self.look(layer, stream)

    def stop_counting(self) -> None:
        """A compiled program may count writes that its operators only claim to make, so from then on writes are not
        looked at."""
        if self._counting:
            self._counting = False
            self._arrange()

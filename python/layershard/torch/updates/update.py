# SPDX-License-Identifier: Apache-2.0
"""New weights in place: while an update lasts, the model's parameters may be written on every rank.

On a layer's source they are the library's own storage (placement whole) or a copy that is cut up at the end (striped).
Elsewhere they are scratch, one layer's worth for the whole series: code that fuses weights runs unchanged on all ranks,
and what it writes to layers that are not its own is dropped. Scratch begins as ones: code that looks whether its result
is finite, or divides by a norm, goes through there, too. Whether it finds its way into what is written to own layers is
followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType

import torch
from torch import nn

from .. import ops
from ..compiled import forget_compiled
from ..grouping import Place
from ..memory import apart, release_freed_memory
from ..refusals import Refused
from ..shared import Read, Shared
from .origins import Origins
from .written import StandIn, collect, refuse_sent, refuse_unshared


class _Abandoned(RuntimeError):
    """An update's body raised, as the other ranks learn from this."""


class Update:
    """with handle.update() as update: collective at both ends. If the body raises on one rank, all ranks raise."""

    def __init__(
        self,
        model: nn.Module,
        shared: list[Shared],
        gate: Callable[[str | None], None],
        shut: Callable[[str, str], None],
        alone: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self._model = model
        self._shared = shared
        self._gate = gate  # given a reason, no pass is made
        self._shut = shut  # the same on all ranks, or on none where one is in a pass
        self._alone = alone  # for what goes through the windows
        self._copies: dict[str, torch.Tensor] = {}
        self._own: dict[str, Place] = {}
        self._stand_ins: list[StandIn] = []
        self._is_open = False
        self._origins = Origins()

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of what this rank is source of: what is worth writing here."""
        return ((name, place.tensor) for name, place in self._own.items())

    def copy(self, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take new values by qualified name; those that belong to other ranks are passed over."""
        if not any(shared.updating for shared in self._shared):
            raise Refused("the update is over: begin another one")
        known = {place.name: place for each in self._shared for places in each.plan.places for place in places}
        for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
            if name not in known:
                raise Refused(f"{name} is not among the shared weights")
            place = known[name]
            if place.tensor.shape != tensor.shape:
                raise Refused(f"{name} is {list(tensor.shape)}; the shared weight is {list(place.tensor.shape)}")
            if name in self._own:
                with torch.no_grad():
                    place.tensor.copy_(tensor)

    # ---- Begin and end ----

    def __enter__(self) -> Update:
        if self._is_open:
            raise Refused("an update is under way already: end it before the next one begins")
        begin = [shared for shared in self._shared if not shared.updating]  # the others' last update has failed
        self._shut(
            "update()",
            "an update of the shared weights is under way: make the pass after the end of "
            "`with layershard.torch.of(model).update():`",
        )
        try:
            self._alone("update()", lambda: self._begin(begin))
        except BaseException:
            if not any(shared.updating for shared in self._shared):
                self._gate(None)  # nothing was changed
            raise
        self._origins = Origins()
        for shared in self._shared:
            self._attach_writable(shared)
        self._is_open = True
        self._origins.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._origins.__exit__(kind, error, traceback)
        self._is_open = False
        refusal = self._take_written() if error is None else None
        failed = error is not None or refusal is not None

        def read(place: Place) -> torch.Tensor:
            if failed:
                raise _Abandoned(str(refusal or "the update was given up"))
            return place.tensor

        self._gate("an update has failed, and the shared weights may be half written: make the update again")
        for stand_in in self._stand_ins:
            stand_in.restore()
        self._stand_ins.clear()
        is_whole = False
        try:
            for shared in self._shared:
                self._end(shared, read, failed)
            self._gate(None)
            is_whole = not failed
            self._copies.clear()
            self._own.clear()
        except Exception:
            if not failed:  # what went wrong first is what the caller must see
                raise
        finally:
            for shared in self._shared:
                shared.attach()
            release_freed_memory()
            if not is_whole:
                forget_compiled()  # a compiled program does not look whether passes are refused
        if refusal is not None:
            raise refusal

    def _begin(self, begin: list[Shared]) -> None:
        for shared in begin:
            self._copy_own(shared)
        for shared in begin:
            shared.series.update_begin()
            shared.updating = True

    def _take_written(self) -> Refused | None:
        try:
            refuse_sent(self._origins.sent)
            refuse_unshared(self._model, self._stand_ins, self._origins.source_of)
            collect(self._stand_ins, self._origins.source_of)
        except Refused as refusal:
            return refusal
        return None

    def _end(self, shared: Shared, read: Read, failed: bool) -> None:
        writer = shared.writer(read) if shared.placement == "striped" or failed else None
        if shared.device.type == "cuda":
            torch.cuda.synchronize(shared.device)  # what the body wrote, on whatever stream
        with torch.no_grad():
            shared.series.update_end(writer)
        shared.updating = False

    def _copy_own(self, shared: Shared) -> None:
        """Of striped layers no rank has all the bytes in one writable place: the source takes a copy.

        All ranks go through all layers, as a collective transport fetches one for all ranks or for none.
        """
        if shared.placement != "striped":
            return
        stream = ops.stream_of(shared.device)
        for layer, places in shared.plan.layers():
            if not shared.series.is_source(layer):
                shared.series.reach(layer, stream)
                shared.series.wait(layer, stream)
                continue
            tensors = shared.gathered(layer, stream)
            self._copies.update({place.name: tensor for place, tensor in zip(places, tensors, strict=True)})

    def _attach_writable(self, shared: Shared) -> None:
        scratch = [layout.ones(shared.device) for layout in shared.layouts]
        for layer, places in shared.plan.layers():
            own = shared.series.is_source(layer)
            for index, place in enumerate(places):
                if not own:
                    target = shared.layouts[index].view(apart(scratch[index]))
                    self._origins.follow(target, place.name)
                    self._stand_ins.append(StandIn(place, target, own=False))
                    continue
                copy = self._copies.get(place.name)
                target = shared.view(layer, index, writable=True) if copy is None else copy
                self._stand_ins.append(StandIn(place, target, own=True))
                self._own[place.name] = place

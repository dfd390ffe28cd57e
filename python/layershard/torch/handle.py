# SPDX-License-Identifier: Apache-2.0
"""What a sharded model can be asked and told: layershard.torch.of(model).

Knows the parts (series, hooks, guards) and puts them together; how each works is theirs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ..errors import Error
from ..group import Group
from ..series import Stats, unsigned
from . import ops
from .alone import Does
from .compiled import forget_compiled, is_recording, register_first, whole
from .dial import Rates
from .exchange import exchange
from .grouping import Place
from .guards import Guards, above, refuse_keeping, refuse_loading
from .memory import address_of, bytes_at, release_freed_memory
from .parts import parts_of, rebuilt
from .refusals import Guarded, Refused, refuse_no_module
from .report import table
from .shared import Shared
from .together import together
from .trace import Trace
from .updates.update import Update
from .wiring import Wiring

Result = TypeVar("Result")
_log = logging.getLogger("layershard")

_ATTRIBUTE = "_layershard_handle"
_GATE = "_layershard_gate"  # why no pass is made; None: they are
_CLOSED = "_layershard_closed"
NOT_LOADED = "the shared weights have not been loaded yet: call layershard.torch.load(model, directory) on all ranks"
GIVEN_UP = (
    "the shared weights have been given up by close(), and cannot be had back: build the model again. A model that is "
    "to go on is given whole weights by detach(), in the place of close()"
)


def _nothing() -> None:
    pass


class Handle:
    """Made by shard. Lives as long as the model does, or until detach."""

    def __init__(self, model: nn.Module, group: Group, device: torch.device) -> None:
        self.group = group  # of the first call of shard
        self.shared: list[Shared] = []  # by all calls
        self.device = device
        self.is_dual = False
        self._groups: list[Group] = []  # to be closed; those that the caller gave stay open
        self._model = model
        self._wiring: Wiring | None = None
        self._ending: ops.Steps | None = None
        self._shut: str | None = None  # why no pass is made
        self._gates: list[Any] = []  # the handles of its hooks
        self._gates_stay = False
        self._guards: Guards | None = None
        self._update: Update | None = None
        model.__dict__[_ATTRIBUTE] = self

    # ---- Put together by shard and load ----

    def guard(self) -> None:
        kinds = {(layout.dtype, self.device) for each in self.shared for layout in each.layouts}
        kinds |= {(place.whole.dtype, self.device) for place in self.all_places()}
        shared = self.shared
        is_alone = all(each.group.size == 1 for each in shared)
        self._guards = Guards(
            self._model,
            self.all_places(),
            kinds,
            lambda: any(each.updating for each in shared),
            is_alone=is_alone,
        )
        if any(each.moves for each in self.shared):
            self._guards.refuse_keeping()

    def refuse_more(self, device: torch.device) -> None:
        """When further modules cannot be shared."""
        if any(each.updating for each in self.shared):
            raise Refused(
                "an update of the shared weights is under way, or has failed: end it, or make it again, before more "
                "is shared"
            )
        if self.is_dual:
            raise Refused("the model has two ways to compute, by dual(): share all that is to be shared before it")
        if device != self.device:
            raise Refused(f"what is shared already is on {self.device}, and a rank has one device; not {device}")

    def add(self, shared: list[Shared], group: Group, *, is_lent: bool) -> None:
        """Further series, of a group that @is_lent: the caller's, which stays open."""
        self.shared += shared
        if not is_lent:
            self._groups.append(group)

    def back_to(self, shared: list[Shared]) -> None:
        """Without what a call that has failed has added to @shared; of a first call's nothing is left."""
        if not shared:
            self.leave()
        elif len(shared) < len(self.shared):
            self.shared[len(shared) :] = []
            self.take()
            self.gate(None if self.committed else NOT_LOADED)

    def take(self) -> None:
        """Hooks and guards for all that is shared by now."""
        self._unhook()
        self._wiring = wiring = Wiring(self._model, self.shared, self.device)
        self._ending = ops.Steps([], [], self.device, wiring.token, joins=[each.series for each in self.shared])
        wiring.install()
        forget_compiled()
        self.guard()

    def gate(self, why: str | None) -> None:
        """No pass as long as there is a reason: there are no weights yet, or not all of them. None opens it. Programs
        enter where they like, so it stands before every module that holds shared tensors, itself or further down.

        Where nothing moves a compiled program has no operator that could refuse. So what is compiled by then is
        compiled once more, with the gate's hooks in it, which stay: dynamo looks at what they ask, not whether they are
        there.
        """
        self._shut = why
        modules = above(self._model, {place.owner for place in self.all_places()})
        for module in modules:
            module.__dict__[_GATE] = why
        if why is not None and not self._gates:
            self._gates = [register_first(module, _refuse_shut) for module in modules]
            if self._wiring is not None and not all(each.moves for each in self.shared):
                self._gates_stay = forget_compiled()
        elif why is None and not self._gates_stay:
            self._remove_gates()

    def caught_up(self) -> None:
        """A call follows that all ranks make: a rank that came back is one of them from here on."""
        for group in {each.group for each in self.shared}:
            group.catching_up = False

    def shut(self, call: str, why: str) -> None:
        """No pass from here on, as gate says. Collective: refused on all ranks, and all go on as before, where a thread
        of one of them is in a pass. Who begins one in the meantime meets the gate, or is found by the second look."""
        before = self._shut

        def step() -> None:
            self.alone(call, lambda: self.gate(why), "write")
            self.alone(call, _nothing, "write")

        try:
            together(self.group, self.device, step)
        except BaseException:
            self.gate(before)
            raise

    def alone(self, call: str, work: Callable[[], Result], does: Does = "fetch") -> Result:
        """What @work returns, which goes through the windows: refused while a pass does, which is refused meanwhile."""
        return work() if self._wiring is None else self._wiring.alone.run(call, work, does)

    def _remove_gates(self) -> None:
        for gate in self._gates:
            gate.remove()
        self._gates.clear()
        self._gates_stay = False

    @property
    def model(self) -> nn.Module:
        """What was sharded, without what wraps it."""
        return self._model

    @property
    def committed(self) -> bool:
        return all(each.committed for each in self.shared)

    def own_places(self) -> Iterator[Place]:
        """What this rank is source of."""
        return (place for each in self.shared for _, places in each.own_layers() for place in places)

    def all_places(self) -> Iterator[Place]:
        return (place for each in self.shared for places in each.plan.places for place in places)

    # ---- Seeing it work ----

    def stats(self) -> dict[str, Stats]:
        """The counters of every series."""
        return {each.plan.name: each.series.stats() for each in self.shared}

    def report(self, *, compute_ns: int = 0, link_bytes_per_s: int = 0) -> str:
        """A table: series, layers, bytes, windows; the transport and why it was taken. Under it, of resident="auto",
        where the dial stands and what the next step would gain, if it is known what a layer computes, @compute_ns, and
        what the link into this rank carries, which some transports measure."""
        rates = Rates(unsigned("compute_ns", compute_ns, 64), unsigned("link_bytes_per_s", link_bytes_per_s, 64))
        return table(self.shared, rates)

    def refuse_half_written(self) -> None:
        """What an update is writing, or has left half written, is not to be looked at."""
        if any(each.updating for each in self.shared):
            raise Guarded(
                "an update of the shared weights is under way, or has failed: end it, or make it again, before they "
                "are read; what it needs of other ranks' layers is to be taken before it begins"
            )

    def verify(self) -> dict[str, int]:
        """Check every layer as this rank sees it against its source's hash; host memory only. Collective."""
        self.refuse_half_written()
        self.caught_up()
        together(self.group, self.device, lambda: self.alone("verify()", _nothing))  # else the others wait in vain
        return self.alone("verify()", lambda: {each.plan.name: each.series.verify() for each in self.shared})

    def trace(self, path: str | os.PathLike[str]) -> Trace:
        """with handle.trace("pass.json"): record this rank's calls; ui.perfetto.dev shows the file. Not compiled. Of
        several ranks each writes its own, pass.0.json and so on."""
        if self._wiring is None:
            raise Refused("the model has been detached: there are no calls to record")
        return Trace(path, self.group, [each.series for each in self.shared], self._wiring.install)

    def steps_of(self, module: nn.Module) -> tuple[list[ops.Step], list[ops.Step]]:
        """The layers that a module reaches and waits for when it runs."""
        return ([], []) if self._wiring is None else self._wiring.steps_of(module)

    # ---- Weights ----

    def update(self) -> Update:
        """New weights in place: a context manager, collective at both ends."""
        of_parts = next((place for place in self.all_places() if place.path), None)
        if of_parts is not None:
            raise Refused(
                f"{of_parts.name} is a part of a {type(of_parts.whole).__name__}, and an update takes plain tensors: "
                f"detach() and shard the new weights, or give them by layershard.torch.fill, part by part"
            )
        if not self.committed:
            raise Guarded("there is nothing to update before the weights have been loaded")
        if any(each.loading for each in self.shared):
            raise Guarded("loading the weights has failed, and they may be half written: load them again")
        self.caught_up()
        self._update = self._update if any(each.updating for each in self.shared) else None
        self._update = self._update or Update(self._model, self.shared, self.gate, self.shut, self.alone)
        return self._update

    def stripe(self, name: str) -> torch.Tensor:
        """This rank's own slice of a weight striped by rows or columns, at an address that stays: for tensor parallel
        products. Empty where no row or column is left for this rank."""
        for shared in self.shared:
            found = shared.find(name)
            if found is not None:
                return self._stripe(shared, *found)
        raise Refused(f"{name} is not among the shared weights")

    def _stripe(self, shared: Shared, layer: int, index: int) -> torch.Tensor:
        layout, stripe = shared.layouts[index], shared.series.stripe(layer, index)
        rows = layout.shape[0]
        if stripe.row_bytes * rows == layout.nbytes:  # whole rows
            shape = (stripe.end - stripe.begin, *layout.shape[1:])
        else:
            shape = (rows, (stripe.end - stripe.begin) * layout.shape[1] * rows // layout.nbytes, *layout.shape[2:])
        if not torch.Size(shape).numel():
            return torch.empty(shape, dtype=layout.dtype, device=self.device)
        nbytes = stripe.row_bytes * shape[0]
        raw = bytes_at(stripe.address, nbytes, self.device)
        whole = raw.view(layout.dtype).view(shape[0], -1)
        return whole[:, : torch.Size(shape[1:]).numel()].view(shape) if len(shape) > 1 else whole.view(shape)

    def state_dict(self, kind: Literal["gathered", "sharded"] = "gathered") -> dict[str, torch.Tensor]:
        """Copies of the shared weights and references to the others: all layers, or those this rank is source of.

        On one-sided transports every rank may ask alone; on collective ones all ask for "gathered" together.
        """
        if kind not in ("gathered", "sharded"):
            raise Refused(f"kind is '{kind}'; it must be gathered or sharded")
        self.refuse_half_written()
        is_here = kind == "sharded" and not any(each.placement == "striped" for each in self.shared)
        does: Does = "read" if is_here else "fetch"
        return self._with_others(self.alone("state_dict()", lambda: self._copies(kind, is_here), does))

    def _copies(self, kind: str, is_here: bool) -> dict[str, torch.Tensor]:
        shared = {}
        for each in self.shared:
            for layer, places in each.plan.layers() if kind == "gathered" else each.own_layers():
                tensors = each.copies(layer) if is_here else each.gathered(layer, ops.stream_of(self.device))
                shared.update({place.name: tensor for place, tensor in zip(places, tensors, strict=True)})
        return shared

    def _with_others(self, shared: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's own state_dict, past the guards, with @shared for what is shared: by the names that modules have
        now, which adapters in the model may have changed."""
        paths = {owner: path for path, owner in self._model.named_modules()}
        with self._unguarded():
            state = dict(self._model.state_dict())
        for (owner, key), places in self._by_name().items():
            if owner not in paths:
                continue
            name = f"{paths[owner]}.{key}" if paths[owner] else key
            parts = {place.path: shared[place.name] for place in places if place.name in shared}
            by_parts = {".".join((name, *place.path)): parts.get(place.path) for place in places}
            if by_parts.keys() <= state.keys():
                state.update(by_parts)  # as modules of quanto save theirs
            else:
                state[name] = rebuilt(places[0].whole, parts) if parts else None
        found = {name: tensor for name, tensor in state.items() if tensor is not None}
        self._refuse_shared(found)
        return found

    def _refuse_shared(self, state: dict[str, Any]) -> None:
        """A module may save what it has under names of its own."""
        addresses = {address_of(place.tensor): place.name for place in self.all_places()}
        for name, value in state.items():
            for _, tensor in parts_of(value) if isinstance(value, torch.Tensor) else ():
                if address_of(tensor) and address_of(tensor) in addresses:
                    raise Refused(
                        f"{name} of a module's own state_dict is {addresses[address_of(tensor)]}, which is shared: "
                        f"detach() first, and save then"
                    )

    def _by_name(self) -> dict[tuple[nn.Module, str], list[Place]]:
        """What is shared of what modules have under one name: it, or its parts."""
        found: dict[tuple[nn.Module, str], list[Place]] = {}
        for place in self.all_places():
            found.setdefault((place.owner, place.key), []).append(place)
        return found

    @contextmanager
    def _unguarded(self) -> Iterator[None]:
        assert self._guards is not None
        self._guards.remove()
        try:
            yield
        finally:
            self.guard()

    # ---- Compiled programs and CUDA graphs ----

    @property
    def token(self) -> torch.Tensor:
        """What a compiled program's operators know this model by: an input of its graphs, as the weights are. A graph
        that was kept from another process runs this model when it is given them, and raises Refused unless series,
        layers and shapes are the same."""
        if self._wiring is None:
            raise Refused("the model has been detached: it is run like any other")
        return self._wiring.token

    def prepare(self) -> None:
        """Before a capture and before each replay, on the stream of the replay."""
        for each in self.shared:
            each.series.prepare(ops.stream_of(self.device))

    def join(self, *outputs: torch.Tensor) -> None:
        """The last call of a captured region: end every use of a layer, order what follows after all transfers.

        In a function that torch.compile compiles, give it the pass's results: it comes after them.
        """
        if is_recording() and self._ending is not None:
            ops.finish(self._ending.token, list(outputs), self._ending.number)
            return
        for each in self.shared:
            each.series.join(ops.stream_of(self.device))

    # ---- Regimes ----

    def pause(self, off: bool) -> None:
        """Passes neither fetch nor wait while off: they must not use whole layers."""
        if self._wiring is None:
            raise Refused("the model has been detached: its weights are no stripes any more")
        self._wiring.switch.off = off

    # ---- End ----

    def detach(self) -> nn.Module:
        """Give the model whole weights of its own again, and leave the group. All ranks must still be there on a
        collective transport, and with memory="torch"; on others each leaves when it likes."""
        if is_closed(self._model):
            raise Refused(GIVEN_UP)
        self.refuse_half_written()
        self.alone("detach()", self._give_back)
        self.leave(self._await_readers)
        release_freed_memory()
        return self._model

    def _give_back(self) -> None:
        for each in self.shared:
            for layer, places in each.plan.layers():
                copies = each.gathered(layer, ops.stream_of(self.device))
                for place, copy in zip(places, copies, strict=True):
                    place.give(copy)

    def close(self) -> None:
        """Leave the group, hooks and guards off: the end of the program, or of the model, which makes no pass then and
        takes no weights, since its parameters still show memory that is read-only. Where that is windows, it shows
        whatever passed through last, and is not to be copied or saved."""
        moves = any(each.moves for each in self.shared)
        self.leave()
        self.gate(GIVEN_UP)
        refuse_loading(self._model, GIVEN_UP)
        if moves:
            refuse_keeping(above(self._model, {place.owner for place in self.all_places()}), GIVEN_UP)
        self._model.__dict__[_CLOSED] = True

    def _await_readers(self) -> None:
        """A shard of torch's memory is given back when the others read it no more; who leaves before never has it. So
        ranks that share such meet when all have closed their series."""
        groups = dict.fromkeys(each.group for each in self.shared if each.is_lent)
        try:
            for group in groups:
                exchange(group, self.device, {})
        except Error as error:
            _log.warning("memory of torch's that other ranks may still read is not given back to it: %s", error.text)

    def leave(self, before: Callable[[], None] = _nothing) -> None:
        """Hooks and guards off, and out of the group, @before which the series are closed. The model's parameters are
        the caller's matter."""
        self._unhook()
        forget_compiled()
        self._wiring = None
        forget(self._model)
        for each in self.shared:
            each.series.close()
        try:
            before()
        finally:
            for group in self._groups:
                group.close()

    def _unhook(self) -> None:
        if self._wiring is not None:
            self._wiring.remove()
        self.gate(None)
        self._remove_gates()
        if self._guards is not None:
            self._guards.remove()


def _refuse_shut(module: nn.Module, _args: Any) -> None:
    if module._layershard_gate is not None:
        raise Guarded(str(module._layershard_gate))


def forget(model: nn.Module) -> None:
    model.__dict__.pop(_ATTRIBUTE, None)


def is_sharded(model: nn.Module) -> bool:
    return _ATTRIBUTE in model.__dict__


def is_closed(model: nn.Module) -> bool:
    return _CLOSED in model.__dict__


def _sharded_in(model: nn.Module) -> nn.Module:
    """The model that is sharded: itself, or the one in what wraps it (torch.compile, DistributedDataParallel, peft)."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_below = any(not above or name.startswith(f"{above}.") for above in found)
        if not is_below and (is_sharded(module) or is_closed(module)):
            found[name] = module
    if len(found) > 1:
        raise Refused(f"there are {len(found)} sharded models in it ({', '.join(found)}): ask for one of them")
    return next(iter(found.values()), model)


def of(model: nn.Module) -> Handle:
    """The handle of a sharded model; also of one that torch.compile, DistributedDataParallel, peft or another module
    wraps, as long as there is one of them."""
    refuse_no_module(model, "of(model)")
    inner = _sharded_in(model)
    handle: Handle | None = inner.__dict__.get(_ATTRIBUTE)
    if is_closed(inner):
        raise Refused(GIVEN_UP)
    if handle is None:
        raise Refused(f"this {type(whole(model)).__name__} has not been sharded: call layershard.torch.shard first")
    return handle

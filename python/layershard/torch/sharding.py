# SPDX-License-Identifier: Apache-2.0
"""shard: one call makes the layers of a model shared. Here the steps are put in order; each has a module of its own.

choose (patterns), group (grouping), refuse (refusals), join (joining), spread (spreading), lay out (shared), fill, hook
(wiring), guard
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from .._declarations import PLACEMENT
from ..group import Group
from ..series import ALL, choice, unsigned
from .compiled import whole
from .coverage import left_out
from .dial import AUTO, choose, refuse_reserve
from .grouping import SeriesPlan, refuse_shared_already, refuse_stripes, tell_apart
from .grouping import group as group_units
from .handle import GIVEN_UP, NOT_LOADED, Handle, is_closed, is_sharded, of
from .joining import left_on_failure, memory_of, open_group, refuse_to_all, refuse_unfit
from .membership import Meant, meant_by
from .memory import release_freed_memory
from .other_holders import held_outside
from .packed import refuse_repacked
from .patterns import select, strings
from .refusals import (
    Refused,
    all_tensors,
    refuse_before_change,
    refuse_cut_up,
    refuse_lazy,
    refuse_no_module,
    refuse_own_copies,
    refuse_renormed,
    refuse_training,
    refuse_wrapping,
)
from .report import wasted
from .shared import Shared, describe
from .sizes import Sizes
from .spreading import Spreading
from .torch_memory import MEMORY, source_for
from .wiring import refuse_uncalled

_log = logging.getLogger("layershard")


def _shared_by(model: nn.Module) -> list[Shared]:
    """What earlier calls share of it."""
    return list(of(model).shared) if is_sharded(model) else []


def _plan(
    model: nn.Module,
    modules: str | Sequence[str],
    scope: str,
    buffers: Sequence[str],
    layer: str | Sequence[str],
) -> list[SeriesPlan]:
    """What would be shared; refused with a reason where it cannot be. Changes nothing, and waits for no other rank."""
    if is_closed(model):
        raise Refused(GIVEN_UP)
    refuse_lazy(model)
    units = select(model, modules, layer)
    refuse_uncalled(model, units, scope)
    named = [(unit.name, unit.module) for unit in units]
    refuse_own_copies(named)
    refuse_cut_up(named)
    refuse_repacked(named)
    plans = group_units(units, scope, buffers)
    earlier = [each.plan for each in _shared_by(model)]
    refuse_shared_already(plans)
    tell_apart(plans, earlier)
    chosen = [place for plan in plans for places in plan.places for place in places]
    refuse_wrapping((place.whole_name, place.whole) for place in chosen)
    refuse_before_change(model, [(place.name, place.tensor) for place in chosen])
    refuse_renormed((place.name, place.owner) for place in chosen)
    refuse_training((place.name, place.owner) for place in chosen if not place.is_parameter)
    left = left_out(units, {place.name: place.tensor.nbytes for place in chosen})
    if left is not None:
        _log.warning("%s", left)
    return plans


def _device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    found = {tensor.device for _, tensor in all_tensors(model) if tensor.device.type != "meta"}
    if device is None:
        device = next(iter(sorted(found, key=str)), torch.device("cpu"))
        if len(found) > 1:
            names = ", ".join(sorted(map(str, found)))
            raise Refused(f"the model is spread over {names}: a rank has one device, move the model to it first")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _resident_bytes(resident: int | float | str, plan: SeriesPlan, plans: Sequence[SeriesPlan]) -> int:
    """One series' part of the memory to spend on further layers: in proportion to its size."""
    part = resident
    if resident == "all":
        return ALL
    if isinstance(resident, str) and resident.endswith("%"):
        with suppress(ValueError):  # else refused below
            part = float(resident[:-1]) / 100
    if isinstance(part, float) and 0 <= part <= 1:
        return int(plan.nbytes * part)
    if isinstance(resident, int) and resident >= 0:
        return resident * plan.nbytes // sum(each.nbytes for each in plans)
    raise Refused(
        f"resident is {resident!r}: give bytes, a part of the layers (0.3 or '30%', at most 1.0 or 100%), 'all' or "
        f"'auto'"
    )


def _refuse_numbers_and_words(
    prefetch: int, placement: str, transport: str, timeout_ms: int | None, memory: str
) -> None:
    """What the library would refuse on this rank alone, when the others wait for it."""
    unsigned("prefetch", prefetch, 32)
    unsigned("timeout_ms", 0 if timeout_ms is None else timeout_ms, 32)
    if not isinstance(transport, str):
        raise Refused(f"transport is {transport!r}: give 'auto' or a transport's name, such as 'shm'")
    choice("placement", placement, {"auto": -1, **PLACEMENT})
    choice("memory", memory, MEMORY)


def _is_empty(model: nn.Module, shared: Sequence[Shared]) -> bool:
    """Whether anything that this rank must hold itself is still on the meta device."""
    elsewhere = {
        place.name
        for each in shared
        for layer, places in each.plan.layers()
        if not each.series.is_source(layer)
        for place in places
    }
    saved = {
        f"{path}.{key}" if path else key
        for path, module in model.named_modules(remove_duplicate=False)
        for key in module._buffers.keys()  # a list in a ScriptModule
        if key not in module._non_persistent_buffers_set
    }
    return any(
        tensor.device.type == "meta"
        for name, tensor in all_tensors(model)
        if name not in elsewhere and (name in saved or isinstance(tensor, nn.Parameter))
    )


def _fill(model: nn.Module, shared: Sequence[Shared], earlier: Sequence[Shared]) -> str | None:
    """Copy the model's own weights into the library; its parameters change only when all of them are there. Why no
    pass is to be made yet, if so."""
    empty = not all(each.committed for each in earlier) or _is_empty(model, [*earlier, *shared])
    if not empty:
        for each in shared:
            each.commit(lambda place: place.tensor)
    for each in shared:
        each.attach()
    return NOT_LOADED if empty else None


def _warn_of_other_holders(model: nn.Module, shared: Sequence[Shared]) -> None:
    moving = [place for each in shared if each.moves for places in each.plan.places for place in places]
    holder = held_outside(model, ((place.name, place.whole) for place in moving)) if moving else None
    if holder is not None:
        _log.warning("%s", holder)


@dataclass
class Join:
    """How this rank joins the others: to share, or to tell them why it cannot. Until an argument has been found to make
    sense the default stands for it."""

    ranks: Meant
    transport: str = "auto"
    device: torch.device = torch.device("cpu")
    timeout_ms: int | None = None

    @property
    def is_lent(self) -> bool:
        """Whether the group is the caller's, and stays open."""
        return isinstance(self.ranks, Group)

    def refuse(self, refusal: Exception) -> NoReturn:
        refuse_to_all(refusal, self.ranks, self.transport, self.device, self.timeout_ms)

    @contextmanager
    def opened(self, plans: Sequence[SeriesPlan], model: nn.Module | None = None) -> Iterator[Group]:
        """The ranks, joined. If the body fails, also by Ctrl-C, they are left and the plans' tensors are as before: a
        model that is shared by half, without hooks, would compute with what passes through windows."""
        ranks = open_group(self.ranks, self.transport, self.device, self.timeout_ms)
        earlier = [] if model is None else _shared_by(model)
        undo = [place.undo() for plan in plans for places in plan.places for place in places]
        with left_on_failure(ranks, self.is_lent):
            try:
                yield ranks
            except BaseException:
                for restore in undo:
                    restore()
                if model is not None and is_sharded(model):
                    of(model).back_to(earlier)
                raise


def shard(
    model: nn.Module,
    modules: str | Sequence[str],
    group: Any = None,
    prefetch: int = 1,
    placement: str = "auto",
    transport: str = "auto",
    scope: str = "linear",
    resident: int | float | str = 0,
    *,
    stripe: dict[str, str] | None = None,
    buffers: str | Sequence[str] = (),
    layer: str | Sequence[str] = (),
    device: torch.device | str | None = None,
    timeout_ms: int | None = None,
    memory: str = "library",
    reserve: int | None = None,
) -> nn.Module:
    """Let the ranks of @group store the chosen layers once between them. In place; returns the model. Collective.

    modules    fnmatch patterns on qualified names ("*.mlp.*_proj", ["*.q_proj", "*.o_proj"], "model.layers.*"):
               linears, any module or whole blocks. A number in a name is the layer's, see layer.
    group      a layershard.Group, which stays the caller's; {"rank": r, "size": n, "job": name}, what is missing from
               the environment; a ProcessGroup; a dimension of a DeviceMesh; or None: the default process group; without
               one, or where it is this rank alone, the ranks of torchrun or of LAYERSHARD_JOB on this host; else this
               process alone.
    prefetch   layers fetched ahead, k: at most k + 1 windows per series.
    placement  "whole" (layer i whole on rank i % n), "striped" (1/n of each layer everywhere) or "auto": striped where
               stripe is given or a series has fewer layers than there are ranks, else whole.
    transport  as layershard.Group.
    scope      "linear": a series and a wait for each chosen module of a block; "block": all that is chosen in a block
               is fetched together.
    resident   memory for resident layers, which other ranks store: bytes for all series together, a part of the layers
               (0.3, "30%"), "all", or "auto": as many layers as memory allows when shard is called.
    stripe     how "striped" cuts a tensor: {"*": "rows", "*.o_proj.weight": "columns"}; by bytes without.
    buffers    fnmatch patterns of buffers of the chosen modules to share as well ("*.qweight"): those that a state_dict
               holds and no forward writes to. Without, every rank keeps all buffers.
    layer      which number in a name is the layer's, where there are several: names with a * there ("encoder.layer.*").
               Without, the first by which layers are alike.
    device     where layers live, for a model that is on the meta device entirely.
    timeout_ms the longest wait for other ranks in one call.
    reserve    with resident="auto": bytes that this rank leaves free; a tenth of what is free for it without.
    memory     whose shards and windows are: the "library"'s own, or "torch": of torch's allocator, which counts them.

    A model whose own weights are on the meta device (layershard.torch.empty_weights) is filled by load, or by fill.
    It may be called again for other modules of the model, with other options; the handle is of all that is shared.
    Parameters that are shared do not require gradients any more. Refused is raised before anything has changed; where
    one rank alone refuses, the others raise Mismatch with its reason.
    """
    refuse_no_module(model, "shard(model, modules)")
    given, model = model, whole(model)
    join = Join(meant_by(group))
    if stripe and placement == "auto":
        placement = "striped"
    try:
        _refuse_numbers_and_words(prefetch, placement, transport, timeout_ms, memory)
        join.transport, join.timeout_ms = transport, timeout_ms
        found = _device_of(model, device)
        memory_of(found)
        refuse_unfit(join.ranks, transport, found, timeout_ms)
        if is_sharded(model):
            of(model).refuse_more(found)
        join.device = found
        plans = _plan(model, modules, scope, strings("buffers", buffers), layer)
        refuse_reserve(resident, reserve)
        if resident != AUTO:
            _resident_bytes(resident, plans[0], plans)
        refuse_stripes(plans, stripe or {})
        for plan in plans:
            describe(plan, stripe or {})
    except Exception as refusal:
        join.refuse(refusal)
    with join.opened(plans, model) as ranks:
        source = source_for(ranks, memory, found)
        spreading = Spreading.over(ranks, prefetch, placement)
        if not stripe:  # of which each rank may want its own slices, whatever they save
            plans = spreading.worth_sharing(plans)
        spreading.place(plans)
        dial = None
        if resident == AUTO:
            sizes = Sizes(spreading, plans, [describe(plan, stripe or {}) for plan in plans], found, memory)
            dial = choose(ranks, sizes, reserve)
        spending = dial.spending if dial else [_resident_bytes(resident, plan, plans) for plan in plans]
        shared = [
            Shared(
                ranks,
                plan,
                found,
                prefetch=prefetch,
                placement=spreading.placement_of(plan),
                resident_bytes=resident_bytes,
                stripes=stripe or {},
                source=source,
                dial=dial,
            )
            for plan, resident_bytes in zip(plans, spending, strict=True)
        ]
        earlier = _shared_by(model)
        handle = of(model) if earlier else Handle(model, ranks, found)
        handle.add(shared, ranks, is_lent=join.is_lent)
        missing = _fill(model, shared, earlier)
        _warn_of_other_holders(model, shared)
        handle.take()
        handle.gate(missing)
    release_freed_memory()
    for line in wasted(ranks, shared):
        _log.warning("%s", line)
    if stripe and placement == "whole":
        _log.warning("stripe says how layers are cut, and placement='whole' cuts none: stripe is passed over")
    return given

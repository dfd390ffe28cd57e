# SPDX-License-Identifier: Apache-2.0
"""The functions of vllm-ascend's layer sharding, by the same names and with the same meaning, on this library.

    register_layer_to_shared_weight_series("o_proj", group, layer, prefetch_step=1)     for every layer, before loading
    post_process_after_loading_for_shared_weight_series(layer)                          once, for any of its layers
    reach_layer_for_shared_weight_series(layer)                                         in every pass, at every layer

What differs: post-processing runs once per layer, on its source, and what it leaves (scales, values, names that are
gone) is on all ranks afterwards, or is refused by name; a layer's weight is at one address for ever; a pass may be
aborted, repeated or skip layers; ranks need no lockstep where the transport needs none; misuse raises and names series
and layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import ops
from .gradients import Saving
from .grouping import Place, SeriesPlan, difference
from .hooks import Hooks, Switch, arrival_hooks
from .joining import await_ranks
from .layout import Layout
from .membership import meant_by
from .numbering import layer_number
from .one_thread import Turn
from .processed import Processed, adopt, process
from .refusals import Refused
from .sharding import Join
from .shared import Shared

_ATTRIBUTE = "_layershard_series"
_registering: dict[str, _Series] = {}


class _Ranks:
    """A GroupCoordinator of vLLM's, a ProcessGroup, or None for the default one."""

    def __init__(self, group: Any) -> None:
        self.process_group = getattr(group, "cpu_group", None) or getattr(group, "device_group", None) or group
        if self.process_group is None and dist.is_available() and dist.is_initialized():
            self.process_group = dist.group.WORLD
        alone = self.process_group is None
        self.rank: int = 0 if alone else dist.get_rank(self.process_group)
        self.size: int = 1 if alone else dist.get_world_size(self.process_group)

    def all_of(self, mine: Any) -> list[Any]:
        """What each rank has: collective."""
        if self.size == 1:
            return [mine]
        await_ranks(self.process_group)
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, mine, group=self.process_group)
        return every


def _index_of(layer: nn.Module) -> int:
    found = layer_number(layer.prefix)  # type: ignore[arg-type]
    if found is None:
        raise Refused(f"'{layer.prefix}' has no number in it: there is no telling which layer it is")
    return found[0]


def _drop(layer: nn.Module) -> None:
    """Free what would be loaded into, and let the loader pass it over."""
    weight: Any = layer.weight
    weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)
    weight.weight_loader = lambda *_args, **_kwargs: None


def _take_post_method(quant_method: Any) -> Callable[[nn.Module], None]:
    """The method that processes loaded weights, which nobody else shall call. Layers may have one quant_method."""
    method = quant_method.process_weights_after_loading

    def passed_over(_layer: nn.Module) -> None:
        pass

    passed_over.taken = getattr(method, "taken", method)  # type: ignore[attr-defined]
    quant_method.process_weights_after_loading = passed_over
    return passed_over.taken  # type: ignore[attr-defined, no-any-return]


class _Series:
    """The layers that have been registered under a name; shared once post_process has run."""

    def __init__(self, name: str, group: Any, prefetch_step: int, device: torch.device) -> None:
        self.name = name
        self.ranks = _Ranks(group)
        self.prefetch_step = prefetch_step
        self.device = device
        self.layers: dict[int, nn.Module] = {}
        self.post_methods: dict[int, Callable[[nn.Module], None]] = {}
        self.shared: Shared | None = None

    def is_source(self, index: int) -> bool:
        return bool(index % self.ranks.size == self.ranks.rank)

    def register(self, layer: nn.Module) -> None:
        index = _index_of(layer)
        if index in self.layers:
            raise Refused(f"series '{self.name}' has a layer {index} already: {self.layers[index].prefix}")
        self.layers[index] = layer
        self.post_methods[index] = _take_post_method(layer.quant_method)
        if not self.is_source(index):
            _drop(layer)
        layer.__dict__[_ATTRIBUTE] = self

    # ---- After loading ----

    def _process_own(self) -> dict[int, Processed]:
        own = (index for index in sorted(self.layers) if self.is_source(index))
        return {index: process(self.layers[index], self.post_methods.pop(index)) for index in own}

    def _process(self) -> dict[int, Processed]:
        """All layers after their processing. Only a source can know what one looks like, so it tells the others."""
        mine: dict[int, Processed] | str
        failure = None
        try:
            mine = self._process_own()
        except Exception as error:  # the others wait to be told
            failure, mine = error, f"rank {self.ranks.rank}: {error}"
        every = self.ranks.all_of(mine)
        if failure is not None:
            raise failure
        for each in every:
            if isinstance(each, str):
                raise Refused(f"series '{self.name}' cannot be shared: {each}")
        return {index: processed for each in every for index, processed in each.items()}

    def _refuse_unlike(self, processed: dict[int, Processed]) -> dict[str, Layout]:
        """The layouts that all layers have."""
        first, *others = sorted(processed)
        layouts = processed[first].layouts
        if not layouts:
            raise Refused(f"series '{self.name}': {self.layers[first].prefix} has no tensor after its processing")
        for index in others:
            if list(processed[index].layouts.items()) != list(layouts.items()):
                raise Refused(
                    f"series '{self.name}': {self.layers[first].prefix} and {self.layers[index].prefix} differ: "
                    f"{difference(layouts, processed[index].layouts)}"
                )
        return layouts

    def _plan(self) -> SeriesPlan:
        numbers = sorted(self.layers)
        if numbers != list(range(numbers[0], numbers[-1] + 1)):
            raise Refused(f"series '{self.name}' has layers {numbers}: they must be consecutive")
        processed = self._process()
        layouts = self._refuse_unlike(processed)
        places = []
        for number in numbers:
            layer = self.layers[number]
            if not self.is_source(number):
                adopt(layer, processed[number], self.device)
            places.append([Place(f"{layer.prefix}.{name}", layer, name) for name in layouts])
        return SeriesPlan(self.name, self.name, numbers, layouts, places)

    def post_process(self) -> None:
        if self.shared is not None:
            return
        plan = self._plan()
        with Join(meant_by(self.ranks.process_group), device=self.device).opened([plan]) as ranks:
            shared = Shared(
                ranks, plan, self.device, prefetch=self.prefetch_step, placement="whole", resident_bytes=0, stripes={}
            )
            shared.commit(lambda place: place.tensor)
            shared.attach()
        self.shared = shared
        self._wrap_forwards(shared)
        _registering.pop(self.name, None)

    def _wrap_forwards(self, shared: Shared) -> None:
        if not shared.moves:
            return
        token = ops.new_token(self.device)
        turn = Turn(self.layers.values(), token)
        for index, places in shared.plan.layers():
            layer, weights = self.layers[index], [place.tensor for place in places]
            steps, saving = [(shared.series, index)], Saving(layer, places)
            hooks = arrival_hooks([], steps, self.device, Switch(), token, weights, saving, turn)
            layer.forward = _waiting(layer, hooks, layer.forward)

    def reach(self, layer: nn.Module) -> None:
        if self.shared is None:
            raise Refused(f"series '{self.name}': call post_process_after_loading_for_shared_weight_series first")
        self.shared.series.reach_fast(_index_of(layer), ops.stream_of(self.device))


def _waiting(layer: nn.Module, hooks: Hooks, forward: Callable[..., Any]) -> Callable[..., Any]:
    before, after, steps = hooks
    assert after is not None

    def wait_and_forward(*args: Any, **kwargs: Any) -> Any:
        before(layer, args, kwargs)
        output = None
        try:
            output = forward(*args, **kwargs)
        finally:
            after(layer, args, kwargs, output)
        return output

    wait_and_forward.steps = steps  # type: ignore[attr-defined]  # compiled programs find them as long as it lives
    return wait_and_forward


def _series_of(layer: nn.Module) -> _Series:
    series: _Series | None = layer.__dict__.get(_ATTRIBUTE)
    if series is None:
        raise Refused(f"'{getattr(layer, 'prefix', layer)}' has not been registered to a series")
    return series


def register_layer_to_shared_weight_series(
    series_name: str, group: Any, layer: nn.Module, prefetch_step: int = 1
) -> None:
    """Add a linear layer to the series. Where it is not to be stored, its storage is freed and its loading skipped."""
    series = _registering.get(series_name)
    if series is None:
        series = _Series(series_name, group, prefetch_step, layer.weight.device)  # type: ignore[arg-type]
        _registering[series_name] = series
    series.register(layer)


def post_process_after_loading_for_shared_weight_series(layer: nn.Module) -> None:
    """Process, share and prefetch the whole series of @layer, once: collective. Further calls do nothing."""
    _series_of(layer).post_process()


def reach_layer_for_shared_weight_series(layer: nn.Module) -> None:
    """The program has arrived at @layer: start to fetch what is needed after it."""
    _series_of(layer).reach(layer)


def is_hidden_layer(vllm_config: Any, layer: nn.Module) -> bool:
    """Whether @layer is one of the model's own, not one of a draft model's that is numbered after them."""
    return bool(_index_of(layer) < vllm_config.model_config.hf_config.num_hidden_layers)

# SPDX-License-Identifier: Apache-2.0
"""What shard is made of, for engines that build, load and run their modules by themselves: docs/python.md, "For
engines", has the whole way.

Knows parameters, series and hooks; nothing of patterns, checkpoints or how ranks meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..series import Series, Tensor
from . import ops
from .compiled import forget_compiled, is_recording
from .gradients import Saving
from .grouping import Place
from .hooks import Switch, arrival_hooks, install
from .layout import Layout
from .memory import bytes_of
from .noticing import Watch
from .one_thread import Uses, turns_of
from .ops import Step
from .refusals import Refused
from .shared import description, poison_of


def describe(name: str, layout: Layout, stripe: str = "bytes") -> Tensor:
    """What Group.series is to be told of a tensor. Ranks compare it: the name carries shape, strides and dtype."""
    return description(name, layout, stripe)


def view(series: Series, layer: int, tensor: int, layout: Layout, *, writable: bool = False) -> torch.Tensor:
    """The tensor in the library's memory, with the layout's shape and strides. Nothing is copied; the memory lives as
    long as the view. Read-only: what a pass reads, between wait and the next reach of another layer. Writable: the
    source's storage, until commit and in an update (placement "whole")."""
    return layout.view(bytes_of(series, layer, tensor, layout.nbytes, writable=writable))


def _skip(*_args: Any, **_kwargs: Any) -> bool:
    """In the place of a parameter's weight_loader. True: the loader need not look for another parameter."""
    return True


def without_storage(parameter: nn.Parameter) -> None:
    """Give up the memory of a parameter of a layer that this rank does not store, before it is loaded.

    Object, shape, dtype and device stay; what is read is NaN, or bytes of 0xff, from one element. A loader that calls
    parameter.weight_loader, as vLLM's do, passes it over; one that copies to it is told by torch (RuntimeError: more
    than one element refers to a single memory location).
    """
    filler = poison_of(Layout((), (), parameter.dtype)) or b"\xff"  # NaN in every floating type, also of 8 bits
    raw = torch.full((parameter.element_size(),), filler[0], dtype=torch.uint8, device=parameter.device)
    parameter.requires_grad_(False)
    parameter.data = raw.view(parameter.dtype).expand(parameter.shape)
    try:
        parameter.weight_loader = _skip  # type: ignore[attr-defined]
    except AttributeError:  # a property without a setter, as of vLLM's own kinds of parameters
        parameter._weight_loader = _skip  # type: ignore[attr-defined]


class Arrivals:
    """What modules wait for before they run: hooks in eager mode, which under torch.compile are operators in the graph.

    token  what ties compiled programs to these modules: an input of their graphs, as weights are, and the same number
           of steps is found by it in another process
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.token = ops.new_token(self.device)
        self._reaches: dict[nn.Module, list[Step]] = {}
        self._waits: dict[nn.Module, list[Step]] = {}
        self._places: dict[nn.Module, list[Place]] = {}
        self._ending: ops.Steps | None = None
        self._handles: list[Any] = []

    def add(
        self,
        module: nn.Module,
        waits: Iterable[Step],
        reaches: Iterable[Step] | None = None,
        tensors: Sequence[str] | None = None,
    ) -> None:
        """Before each run of @module: reach these layers of these series, then wait for those. Call install after it.

        reaches  None: what it waits for
        tensors  the parameters and buffers of the module that are views, by their names in it; None: all parameters
        """
        self._waits[module] = list(waits)
        self._reaches[module] = list(self._waits[module] if reaches is None else reaches)
        names = [name for name, _ in module.named_parameters()] if tensors is None else tensors
        self._places[module] = [_place(module, name) for name in names]

    @property
    def _series(self) -> list[Series]:
        steps = [step for each in (self._reaches, self._waits) for of_one in each.values() for step in of_one]
        return list(dict.fromkeys(series for series, _ in steps))

    def install(self) -> None:
        """Put the hooks in, round all other hooks there are by then, in place of those from before. The tensors are as
        a pass reads them: what is put there instead, or written later, is refused by name when the module runs."""
        self.remove()
        self._ending = ops.Steps([], [], self.device, self.token, joins=self._series)
        series_of = {
            module: Uses(
                frozenset(series for series, _ in self._waits[module]),
                frozenset(series for series, _ in self._reaches[module]),
            )
            for module in self._waits
        }
        for module, turn in turns_of(series_of, self.token).items():
            places = self._places[module]
            watch = Watch(module, places)
            weights, saving = [place.tensor for place in places], Saving(module, places, watch)
            hooks = arrival_hooks(
                self._reaches[module],
                self._waits[module],
                self.device,
                Switch(),
                self.token,
                weights,
                saving,
                turn,
                watch,
                type(module).__name__,
            )
            self._handles += install(module, hooks, saving)
        forget_compiled()

    def prepare(self) -> None:
        """Before the capture of a CUDA graph and before each replay, on the stream of the replay."""
        for series in self._series:
            series.prepare(ops.stream_of(self.device))

    def join(self, *outputs: torch.Tensor) -> None:
        """The last call of a captured region. In a function that is compiled, give it the pass's results."""
        if self._ending is None:
            raise Refused("join ends a pass: call install first")
        if is_recording():
            ops.finish(self.token, list(outputs), self._ending.number)
            return
        for series in self._series:
            series.join(ops.stream_of(self.device))

    def remove(self) -> None:
        """The hooks off. Views stay what they are: of a layer in a window, whatever passes through."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _place(module: nn.Module, name: str) -> Place:
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    if key not in owner._parameters and key not in owner._buffers:
        raise Refused(f"a {type(module).__name__} has no parameter or buffer {name}")
    return Place(name, owner, key)

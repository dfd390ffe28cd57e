# SPDX-License-Identifier: Apache-2.0
"""The library's calls of a pass as an operator, for torch.compile: opaque, ordered, without a graph break.

layershard::arrive(Tensor(a!)[] activations, SymInt steps) says that it changes the activations. It does not; what reads
the layer's weights computes from those activations, and so comes after it. An operator's arguments are plain values:
what to call is known by a number. The numbers are far from 0 and 1, which torch.compile makes constants of, and each is
used once, so that blocks compiled one by one share one graph.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence

import torch

from ..series import Series
from .noticing import Watch
from .refusals import Refused, refuse_freezing

Step = tuple[Series, int]  # a series and the library's number of one of its layers

_numbers = itertools.count(1000)
_known: weakref.WeakValueDictionary[int, Steps] = weakref.WeakValueDictionary()
_library = torch.library.Library("layershard", "DEF")  # type: ignore[no-untyped-call]
_library.define("arrive(Tensor(a!)[] activations, SymInt steps) -> ()")  # type: ignore[no-untyped-call]


def stream_of(device: torch.device) -> int:
    """The handle of the device's current stream; 0 where there is none."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _ending(series: Series) -> Callable[[int, int], None]:
    return lambda _layer, stream: series.join(stream)


class Steps:
    """What one module's arrival calls: layers reached, then layers waited for; or the end of a pass. Known to the
    operator by its number."""

    def __init__(
        self,
        reaches: Sequence[Step],
        waits: Sequence[Step],
        device: torch.device,
        joins: Sequence[Series] = (),
        watch: Watch | None = None,
    ) -> None:
        self.calls: list[tuple[Callable[[int, int], None], int]] = []
        self.calls += [(series.reach_fast, layer) for series, layer in reaches]
        self.calls += [(series.wait_fast, layer) for series, layer in waits]
        self.calls += [(_ending(series), 0) for series in joins]
        self.eager = self.calls
        if watch is not None:
            self.eager = [(watch.look, 0), *self.calls]
            self.calls = [(watch.look_compiled, 0), *self.calls]
        self.device = device
        self.number = next(_numbers)
        _known[self.number] = self


def _arrive(activations: list[torch.Tensor], number: int) -> None:
    steps = _known[number]
    stream = stream_of(steps.device)
    for call, layer in steps.calls:
        call(layer, stream)


def _arrive_fake(activations: list[torch.Tensor], number: int) -> None:
    refuse_freezing()
    if not activations:
        raise Refused("a module with shared weights was called without a floating-point tensor to order them by")


_library.impl("arrive", _arrive, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("layershard::arrive", _arrive_fake, lib=_library)

arrive = torch.ops.layershard.arrive.default

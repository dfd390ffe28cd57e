# SPDX-License-Identifier: Apache-2.0
"""One series and the tensors of the model that are attached to it.

Knows a plan (which tensor is where), a series (where bytes are) and a device; nothing of hooks or of how ranks connect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..group import Group
from ..memory_source import MemorySource
from ..series import Series, Tensor
from .dial import Dial
from .grouping import Place, SeriesPlan, stripe_of
from .layout import Layout, short
from .memory import bytes_at, bytes_of
from .refusals import Refused

Read = Callable[[Place], torch.Tensor]


def poison_of(layout: Layout) -> bytes:
    """What a window is poisoned with; b"" is bytes of 0xff, which are NaN in all other floating types."""
    return b"\x80" if str(layout.dtype).endswith("fnuz") else b""


def description(name: str, layout: Layout, stripe: str) -> Tensor:
    """Ranks compare descriptions: the name carries what the library itself does not look at."""
    label, poison = short(f"{name} {layout}"), poison_of(layout)
    if stripe == "bytes":
        return Tensor(label, layout.nbytes, poison=poison)
    if not layout.is_plain or not layout.shape:
        raise Refused(f"{name} is {layout}: only a plain tensor with rows can be striped by {stripe}")
    rows, row_bytes = layout.shape[0], layout.nbytes // layout.shape[0]
    if stripe == "rows":
        return Tensor(label, layout.nbytes, stripe="rows", rows=rows, poison=poison)
    if stripe == "columns" and len(layout.shape) > 1:
        column_bytes = row_bytes // layout.shape[1]
        return Tensor(label, layout.nbytes, stripe="columns", rows=rows, column_bytes=column_bytes, poison=poison)
    raise Refused(f"stripe '{stripe}' of {name}: it must be bytes, rows or, with two dimensions, columns")


def describe(plan: SeriesPlan, stripes: dict[str, str]) -> list[Tensor]:
    """What the library is told of one layer's tensors; refused where they cannot be cut so."""
    return [
        description(name, layout, stripe_of(f"{plan.block}.{name}", stripes)) for name, layout in plan.tensors.items()
    ]


def _nobody() -> None:
    pass


class Shared:
    """The layers of one series: what the model saw before, what the library holds now."""

    def __init__(
        self,
        group: Group,
        plan: SeriesPlan,
        device: torch.device,
        *,
        prefetch: int,
        placement: str,
        resident_bytes: int,
        stripes: dict[str, str],
        source: MemorySource | None = None,
        dial: Dial | None = None,
    ) -> None:
        self.group = group
        self.plan = plan
        self.device = device
        self.placement = placement
        self.layouts = list(plan.tensors.values())
        self.series: Series = group.series(
            short(plan.name),
            first_layer=plan.first_layer,
            layer_count=len(plan.places),
            tensors=describe(plan, stripes),
            prefetch=prefetch,
            placement=placement,  # type: ignore[arg-type]  # the library names what is wrong
            resident_bytes=resident_bytes,
            # In the library's host memory it takes none before it is on.
            poison="ready" if device.type == "cpu" and source is None else "off",
            memory_source=source,
        )
        self.is_lent = source is not None  # its memory is not the library's
        self.dial = dial  # what chose the residents of this call's series
        # Whether any layer has to be fetched; where all are read in place, a pass has nothing to call.
        self.moves = self.series.stats().windows > 0
        self.committed = False
        self.updating = False
        self.on_attached: Callable[[], None] = _nobody  # called whenever the tensors have been attached
        self.loading = False  # a load is under way, or has failed and must be made again

    # ---- Layers and tensors ----

    def own_layers(self) -> Iterator[tuple[int, list[Place]]]:
        """The layers that this rank is source of."""
        return ((layer, places) for layer, places in self.plan.layers() if self.series.is_source(layer))

    def find(self, name: str) -> tuple[int, int] | None:
        """Layer and tensor index of a qualified name."""
        for layer, places in self.plan.layers():
            for index, place in enumerate(places):
                if place.name == name:
                    return layer, index
        return None

    # ---- Views ----

    def view(self, layer: int, index: int, *, writable: bool = False) -> torch.Tensor:
        layout = self.layouts[index]
        return layout.view(bytes_of(self.series, layer, index, layout.nbytes, writable=writable))

    @torch.inference_mode(False)
    def attach(self) -> None:
        """Let the model's parameters be views of the library's memory, for good. Not as tensors of inference mode,
        whoever calls: of those torch counts no writes, and after detach they could not be trained."""
        for layer, places in self.plan.layers():
            for index, place in enumerate(places):
                place.put(self.view(layer, index))
        self.on_attached()

    @torch.inference_mode(False)
    def gathered(self, layer: int, stream: int) -> list[torch.Tensor]:
        """Copies of one layer's tensors, fetched if need be."""
        self.series.reach(layer, stream)
        self.series.wait(layer, stream)
        return self.copies(layer)

    @torch.inference_mode(False)
    def copies(self, layer: int) -> list[torch.Tensor]:
        """Of the tensors of a layer that is there."""
        return [self.view(layer, index).clone() for index in range(len(self.layouts))]

    # ---- Bytes ----

    def writer(self, read: Read) -> Callable[[int, list[int]], None]:
        """What commit and update_end call for each layer this rank is source of: @read gives its tensors."""

        def write(layer: int, addresses: list[int]) -> None:
            places = self.plan.places[layer - self.plan.first_layer]
            for place, address, layout in zip(places, addresses, self.layouts, strict=True):
                layout.view(bytes_at(address, layout.nbytes, self.device)).copy_(read(place))
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()

        return write

    def commit(self, read: Read) -> None:
        with torch.no_grad():
            self.series.commit(self.writer(read))
        self.committed = True

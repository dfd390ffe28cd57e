# SPDX-License-Identifier: Apache-2.0
"""A series: isomorphic layers, stored once over the ranks, and the calls of a pass.

Knows the calls of the C series; its life is _handles.py.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from types import TracebackType
from typing import Any, Literal, NamedTuple

from . import _declarations as c
from ._calls import FirstError
from ._handles import GroupHandle, SeriesHandle
from ._interrupts import interruptible
from .dlpack import View, data_type
from .errors import Invalid
from .memory_source import Lender, MemorySource

ALL = 2**64 - 1
PostProcess = Callable[[int, list[int]], None]


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a layer, the same in every layer of the series.

    stripe  how placement "striped" divides it: anywhere, by whole rows (of `rows`), or by columns within each of the
            `rows`, `column_bytes` being the bytes of one column's element
    poison  what fills it, over and over, where a window is poisoned; b"": bytes of 0xff, NaN in every floating type
    """

    name: str
    nbytes: int
    alignment: int = 0
    stripe: Literal["bytes", "rows", "columns"] = "bytes"
    rows: int = 0
    column_bytes: int = 0
    poison: bytes = b""


@dataclass(frozen=True)
class Stats:
    """What was built (first eight, and the last) and what happened since commit. Bytes, nanoseconds, counts."""

    layer_bytes: int
    shard_bytes: int
    window_bytes: int
    resident_bytes: int
    windows: int
    residents: int
    fetched_layers: int
    below_k: tuple[int, ...]
    below_k_count: int
    generation: int
    reaches: int
    waits: int
    stalls: int
    misses: int
    fetches: int
    fetched_bytes: int
    blocked_ns: int
    max_blocked_ns: int
    link_busy_ns: int
    numa_copy_bytes: int


class Stripe(NamedTuple):
    """This rank's slice of a tensor: where it is, which rows (or bytes in each row), bytes from row to row."""

    address: int
    begin: int
    end: int
    row_bytes: int


def unsigned(name: str, value: int, bits: int) -> int:
    """The value, refused where C would silently take another number."""
    try:
        number = index(value)
    except TypeError:
        raise Invalid(f"{name} is {value!r}: it must be a whole number") from None
    if not 0 <= number < 2**bits:
        raise Invalid(f"{name} is {number}: it must be in 0..{2**bits - 1}")
    return number


def choice(name: str, word: str, words: Mapping[str, int]) -> int:
    if word not in tuple(words):  # also what cannot be hashed
        raise Invalid(f"{name} is {word!r}: it must be one of {', '.join(map(repr, words))}")
    return words[word]


def _tensor_description(tensor: Tensor) -> c.TensorDescription:
    of = f"of tensor {tensor.name!r}"
    return c.TensorDescription(
        name=tensor.name.encode(),
        bytes=unsigned(f"nbytes {of}", tensor.nbytes, 64),
        alignment=unsigned(f"alignment {of}", tensor.alignment, 32),
        stripe=choice(f"stripe {of}", tensor.stripe, c.STRIPE),
        rows=unsigned(f"rows {of}", tensor.rows, 64),
        column_bytes=unsigned(f"column_bytes {of}", tensor.column_bytes, 32),
    )


def _pattern(tensor: Tensor) -> c.PoisonPattern:
    """Valid as long as the tensor; the library copies it."""
    if not isinstance(tensor.poison, bytes):
        raise Invalid(f"poison of tensor {tensor.name!r} is {tensor.poison!r}: it must be bytes")
    address = ctypes.cast(ctypes.c_char_p(tensor.poison), ctypes.c_void_p) if tensor.poison else None
    return c.PoisonPattern(pattern=address, bytes=len(tensor.poison))


def series_options(
    name: str,
    first_layer: int,
    layer_count: int,
    tensors: Sequence[Tensor],
    prefetch: int,
    placement: str,
    resident_bytes: int,
    poison: str,
) -> c.SeriesOptions:
    return c.SeriesOptions(
        name=name.encode(),
        first_layer=unsigned("first_layer", first_layer, 32),
        layer_count=unsigned("layer_count", layer_count, 32),
        tensors=(c.TensorDescription * len(tensors))(*map(_tensor_description, tensors)),
        tensor_count=len(tensors),
        prefetch=unsigned("prefetch", prefetch, 32),
        placement=choice("placement", placement, c.PLACEMENT),
        resident_bytes=unsigned("resident_bytes", resident_bytes, 64),
        poison=choice("poison", poison, c.POISON),
        poison_patterns=(c.PoisonPattern * len(tensors))(*map(_pattern, tensors)),
    )


def _post_process_callback(post_process: PostProcess | None, tensor_count: int, kept: FirstError) -> object:
    if post_process is None:
        return c.POST_PROCESS()
    function = post_process

    def called(_user: int | None, layer: int, tensors: Any) -> int:
        def process() -> int:
            function(layer, [tensors[i] or 0 for i in range(tensor_count)])
            return 0

        return int(kept.run(process, 1, layer))

    return c.POST_PROCESS(called)


class Series:
    """Made by Group.series. One thread at a time per series, but for stats.

    A stream is the device's own handle as an integer (torch.cuda.Stream.cuda_stream); 0 for host memory.
    Layers are numbered from first_layer on, tensors in the order in which they were described.

    reach_fast(layer, stream=0), wait_fast(layer, stream=0)
        what reach and wait do, with as little Python as can be, for hooks.
    """

    reach_fast: Callable[..., None]
    wait_fast: Callable[..., None]
    joined_fetches = 0  # of stats' fetches those that came before the last join on a stream

    def __init__(
        self, group: GroupHandle, options: c.SeriesOptions, device: tuple[int, int], source: MemorySource | None = None
    ) -> None:
        self.layers = range(options.first_layer, options.first_layer + options.layer_count)
        self.name: str = options.name.decode()
        self._bytes = [tensor.bytes for tensor in options.tensors[: options.tensor_count]]
        self._device = device
        lender = None if source is None else Lender(source)
        if lender is not None:
            options.memory_source = ctypes.pointer(lender.structure)
        self._handle = SeriesHandle(group, options, lender)
        asked = os.environ.get("LAYERSHARD_POISON") == "1"
        self.is_poisoned = asked or options.poison == c.POISON["on"]
        self.reach_fast = self._bind(self._handle.library.lshard_reach)
        self.wait_fast = self._bind(self._wait_function())

    def _wait_function(self) -> Callable[..., int]:
        """lshard_wait itself, but where it may wait for others: with layers that are fetched into windows, on
        collective transports and wrapped ones. On the others it ends by itself: this process copies from memory it has
        mapped."""
        function: Callable[..., int] = self._handle.library.lshard_wait
        spec = self._handle.group.transport.split(" (")[0]
        base = spec.rsplit(",", 1)[-1]
        copies = spec.split(":")[0] in ("shm", "local") and "lockstep" not in spec
        blocks = self._device[0] == c.MEMORY["host"] or base.split(":")[0] == "callback"
        if copies or not blocks or self.stats().windows == 0:
            return function
        return interruptible(function, self._handle.group.abort)

    def _bind(self, function: Callable[..., int]) -> Callable[..., None]:
        """The C function with this series as its first argument; a closed series is an error, not a crash."""
        handle = self._handle  # and not self: a cycle would put off the end of a forgotten series
        pointer = handle.pointer

        def call(layer: int, stream: int = 0) -> None:
            if not pointer:
                handle.refuse_closed()
            status = function(pointer, layer, stream)
            if status:
                handle.fail(status, layer)

        return call

    def _check(self, status: int, layer: int | None = None) -> None:
        if status < 0:
            self._handle.fail(status, layer)

    @property
    def _c(self) -> ctypes.c_void_p:
        if self.closed:
            self._handle.refuse_closed()
        return self._handle.pointer

    @property
    def closed(self) -> bool:
        return self._handle.closed

    # ---- Where bytes are ----

    @property
    def filled(self) -> bool:
        """Whether the weights are there already, as this rank came back: commit calls no `post_process`."""
        return bool(self._handle.library.lshard_series_is_filled(self._c))

    def is_source(self, layer: int) -> bool:
        """Whether this rank loads and processes the layer."""
        return bool(self._handle.library.lshard_series_is_source(self._c, layer))

    def address(self, layer: int, tensor_index: int) -> int:
        """Where the tensor is found after wait. Fixed for the life of the series. Read-only."""
        found = ctypes.c_void_p()
        self._check(self._handle.library.lshard_series_address(self._c, layer, tensor_index, found), layer)
        return found.value or 0

    def storage(self, layer: int, tensor_index: int) -> int:
        """Where the source may put processed bytes before commit or during an update (placement "whole" only)."""
        found = ctypes.c_void_p()
        self._check(self._handle.library.lshard_series_storage(self._c, layer, tensor_index, found), layer)
        return found.value or 0

    def stripe(self, layer: int, tensor_index: int) -> Stripe:
        """This rank's own slice of a tensor striped by rows or columns. Its bytes stay where they are."""
        found, slice_ = ctypes.c_void_p(), c.Range()
        self._check(self._handle.library.lshard_series_stripe(self._c, layer, tensor_index, found, slice_), layer)
        return Stripe(found.value or 0, slice_.begin, slice_.end, slice_.row_bytes)

    def view(self, layer: int, tensor_index: int, shape: Sequence[int], dtype: object, writable: bool = False) -> View:
        """The tensor's memory for numpy.from_dlpack or torch.from_dlpack; nothing is copied. `dtype` is a name
        ("bfloat16", "float8_e4m3fn") or numpy's or torch's own. Holds the layer's bytes between wait and the next
        reach of another layer. Writable: the source's storage, to be written only before commit or in an update.
        """
        address = self.storage(layer, tensor_index) if writable else self.address(layer, tensor_index)
        view = View(self._handle, address, tuple(shape), data_type(dtype), self._device, not writable)
        if view.nbytes != self._bytes[tensor_index]:
            raise Invalid(
                f"series '{self.name}': {tuple(shape)} of {dtype} is {view.nbytes} bytes; tensor {tensor_index} has "
                f"{self._bytes[tensor_index]}",
                layer=layer,
            )
        return view

    # ---- Filling ----

    def commit(self, post_process: PostProcess | None = None) -> None:
        """Fill the series: collective. `post_process` gets a layer that this rank is source of and the addresses to
        write its tensors to; None: they are in storage already. What it raises is the cause of CallbackFailed.
        """
        self._fill(self._handle.library.lshard_series_commit, post_process)

    def update_begin(self) -> None:
        """Begin to give the layers new bytes: collective. When it returns, sources may write."""
        pointer = self._c
        self._check(self._handle.group.run(lambda: int(self._handle.library.lshard_series_update_begin(pointer))))

    def update_end(self, post_process: PostProcess | None = None) -> None:
        """End the update, as commit does. On failure it may be called again."""
        self._fill(self._handle.library.lshard_series_update_end, post_process)

    def _fill(self, function: Callable[..., int], post_process: PostProcess | None) -> None:
        pointer, kept = self._c, FirstError()
        callback = _post_process_callback(post_process, len(self._bytes), kept)
        status = self._handle.group.run(lambda: int(function(pointer, callback, None)))
        if status < 0:
            self._handle.fail(status, None, kept)

    # ---- The pass ----

    def reach(self, layer: int, stream: int = 0) -> None:
        """The program has arrived at the layer: start to fetch what it needs next. Ends the view of every other."""
        self.reach_fast(layer, stream)

    def wait(self, layer: int, stream: int = 0) -> None:
        """Make the layer usable: host memory blocks until it is there, a stream is ordered after its arrival."""
        self.wait_fast(layer, stream)

    def release(self, layer: int, stream: int = 0) -> None:
        """End the use of the layer before the next reach. Optional."""
        self._check(self._handle.library.lshard_release(self._c, layer, stream), layer)

    def prepare(self, stream: int = 0) -> None:
        """Put the windows into start-of-pass state: before a capture and before each replay."""
        self._check(self._handle.library.lshard_series_prepare(self._c, stream))

    def join(self, stream: int = 0) -> None:
        """End every use and order what follows after everything in flight: last call of a captured region."""
        status = self._handle.library.lshard_series_join(self._c, stream)
        if stream:  # also of a region that is refused: its copies lead back
            self.joined_fetches = self.stats().fetches
        self._check(status)

    def rewind(self) -> None:
        """Back to the start of a pass: the cure for OutOfStep. Collective on collective transports."""
        pointer = self._c
        self._check(self._handle.group.run(lambda: int(self._handle.library.lshard_series_rewind(pointer))))

    def poison(self, on: bool, stream: int = 0) -> None:
        """Between passes, from now on: whether windows hold poison where nothing is in use, in a series created with
        poison "ready" or "on". Ends every use. Capture again after it."""
        self._check(self._handle.library.lshard_series_poison(self._c, on, stream))
        self.is_poisoned = on

    # ---- Seeing it work ----

    def stats(self) -> Stats:
        found = c.StatsResult()
        self._check(self._handle.library.lshard_series_stats(self._c, found))
        values = {name: getattr(found, name) for name in Stats.__dataclass_fields__ if name != "below_k"}
        return Stats(below_k=tuple(found.below_k[: min(found.below_k_count, c.BELOW_K_NAMED)]), **values)

    def verify(self) -> int:
        """Check every layer against its source's hashes: collective, host memory only. The hash of all of it."""
        pointer, found = self._c, ctypes.c_uint64()
        self._check(self._handle.group.run(lambda: int(self._handle.library.lshard_series_verify(pointer, found))))
        return found.value

    # ---- End ----

    def close(self) -> None:
        """Free the series, or leave that to the last array that shows its memory."""
        self._handle.close()

    def __enter__(self) -> Series:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"layers {self.layers.start}..{self.layers.stop - 1}"
        return f"<layershard.Series '{self.name}', {state}>"

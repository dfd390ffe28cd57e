# SPDX-License-Identifier: Apache-2.0
"""The library's calls of a pass as operators, for torch.compile: opaque, in order, without a graph break.

    arrive(Tensor(a!) token, Tensor(b!)[] weights, SymInt steps)                      before a module: reach and wait
    settle(Tensor(a!) token, Tensor(b!)[] outputs, Tensor(c!)[] weights, SymInt steps) after it: tells a check, if any
    leave(Tensor(a!) token, Tensor(b!)[] weights, SymInt steps)                       after that: does nothing
    arrive_parts(...)                      as arrive, for modules with weights that wrap others (torchao's, quanto's)

A compiler knows nothing of windows: to it, two layers in one window are tensors of their own, and reads of the one may
come after the arrival of the other. So the operators say that they change what they must be ordered with. The token,
one tensor for each model, keeps them in a line. arrive changes the module's weights: every read comes after it. settle
changes the module's results, which are then computed before it, and the weights; leave changes the weights once more:
inductor finishes reads that it has put off when it meets a first change, but behind that one (FallbackKernel.__init__
in torch/_inductor/ir.py registers the kernel before it asks for them), and the second change is what they come before.
Without the results settle would come too early, and what they put off would be refused as a copy. That it changes them
is a precaution: no program was found that goes wrong where it only reads them.

All get the tensors themselves, and none is ever written. A compiler that hands over copies (aot_eager does, and
inductor where a weight is read after leave) would go on to write them back: arrive and leave compare addresses, and
raise. An operator finds its steps by the token's address and a number that is the same in every process, so a graph
that was kept on disk runs the steps of the model it is given, or none.

They are tagged as unfit for CUDA graphs: inductor makes a graph of what lies between two of them (graph partition), and
calls them itself, on the stream on which it replays those. So transfers are started and awaited anew in each pass, and
nobody has to prepare or join. The token and the weights count as static, so what changes them is no obstacle.
"""

from __future__ import annotations

import hashlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..errors import Busy
from ..series import Series
from . import captures, partition
from .callers import is_within
from .compiled import refuse_exporting
from .noticing import Watch
from .one_thread import Turn, window_taken
from .refusals import Refused, refuse_freezing

Step = tuple[Series, int]  # a series and the library's number of one of its layers

_known: weakref.WeakValueDictionary[tuple[int, int], Steps] = weakref.WeakValueDictionary()
_library = torch.library.Library("layershard", "DEF")  # type: ignore[no-untyped-call]

_COPIES = (
    "the compiled program has copied {name} of a module with shared weights, and would compute from old bytes: {why}"
)
_BACKEND = (
    "this backend of torch.compile copies what an operator changes (aot_eager does): use inductor or eager; or the "
    "program was given other weights than the model's"
)
_PARTS = (
    "weights that wrap other tensors (torchao's, quanto's) and are fetched into windows cannot be compiled by this "
    "backend, which takes such a weight and its parts for different tensors: run the model in eager mode, or use "
    "torch.compile(..., backend='eager')"
)
_UNKNOWN = (
    "a compiled program was given no model that is sharded in this process, or one whose series, layers or shapes are "
    "not those that it was compiled for: compile it again by inductor or eager (not aot_eager, which copies what an "
    "operator changes), or give a saved program of(model).token with the model's weights"
)
_LATE = (
    "something that the module computes from its weights, and does not return, is computed after the module has ended: "
    "return it from the module, or leave that module uncompiled (torch.compiler.disable)"
)


def stream_of(device: torch.device) -> int:
    """The handle of the device's current stream; 0 where there is none."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def new_token(device: torch.device) -> torch.Tensor:
    """What keeps a model's operators in line. Static, as weights are: else CUDA graphs would be passed over."""
    token = torch.zeros(1, device=device)
    # torch._dynamo.mark_static_address does no more, and takes seconds to import.
    token._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return token


def _ending(series: Series) -> Callable[[int, int], None]:
    return lambda _layer, stream: series.join(stream)


def _number(words: Sequence[str]) -> int:
    """The same in every process. Far from 0 and 1, which torch.compile makes constants of."""
    return int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:7], "little") | 1 << 56


class Steps:
    """What one module's arrival calls: layers reached, then layers waited for; or the end of a pass. Known to the
    operators by the model's token and its number as long as it lives."""

    def __init__(
        self,
        reaches: Sequence[Step],
        waits: Sequence[Step],
        device: torch.device,
        token: torch.Tensor,
        weights: Sequence[torch.Tensor] = (),
        joins: Sequence[Series] = (),
        turn: Turn | None = None,
        watch: Watch | None = None,
        name: str = "",
    ) -> None:
        self.name = name  # of the module
        self.calls: list[tuple[Callable[[int, int], None], int]] = []
        self.calls += [(series.reach_fast, layer) for series, layer in reaches]
        self.calls += [(series.wait_fast, layer) for series, layer in waits]
        self.calls += [(_ending(series), 0) for series in joins]
        self.turn = turn
        self.watch = watch
        self.eager = self.calls if watch is None else [(watch.look, 0), *self.calls]
        self.device = device
        if device.type == "cuda" and turn is not None:
            captures.watch((series for series, _ in (*reaches, *waits)), turn)
        self.token = token
        self.weights = list(weights)
        self.addresses = [weight.data_ptr() for weight in weights]
        words = [f"reach {series.name} {layer}" for series, layer in reaches]
        words += [f"wait {series.name} {layer}" for series, layer in waits]
        words += [f"join {series.name}" for series in joins]
        words += [f"{list(weight.shape)} {list(weight.stride())} {weight.dtype}" for weight in weights]
        self.number = _number(words)
        _known[token.data_ptr(), self.number] = self

    def remove(self) -> None:
        """Programs do not find it any more, also while an exception's frames still hold it."""
        key = self.token.data_ptr(), self.number
        if _known.get(key) is self:
            del _known[key]

    def refuse_copies(self, weights: Sequence[torch.Tensor], why: str) -> None:
        for weight, address in zip(weights, self.addresses, strict=True):
            if weight.data_ptr() != address:
                raise Refused(_COPIES.format(name="a weight", why=why))


def _steps(token: torch.Tensor, number: int) -> Steps:
    steps = _known.get((token.data_ptr(), number))
    if steps is None:
        for watch in [each.watch for each in _known.values() if each.watch is not None]:
            watch.stop_counting()
        raise Refused(_UNKNOWN)
    return steps


def _arrive(token: torch.Tensor, weights: list[torch.Tensor], number: int) -> None:
    steps = _steps(token, number)
    if steps.turn is not None:
        steps.turn.take_compiled(sys._getframe(2))  # the program, or, where torch calls from C++, what called it
    if steps.watch is not None:
        steps.watch.look_compiled(0, 0)
    steps.refuse_copies(weights, _BACKEND)
    stream = stream_of(steps.device)
    try:
        for call, layer in steps.calls:
            call(layer, stream)
    except Busy as error:
        raise window_taken(steps.name) from error


_observers: dict[int, Callable[[str, Sequence[torch.Tensor]], None]] = {}  # by the token's address


@contextmanager
def observed(token: torch.Tensor, observer: Callable[[str, Sequence[torch.Tensor]], None]) -> Iterator[None]:
    """Inside, it is told the name and the results of each module that a compiled program settles."""
    _observers[token.data_ptr()] = observer
    try:
        yield
    finally:
        del _observers[token.data_ptr()]


def _settle(token: torch.Tensor, outputs: list[torch.Tensor], weights: list[torch.Tensor], number: int) -> None:
    observer = _observers.get(token.data_ptr()) if _observers else None
    if observer is not None and not (token.is_cuda and torch.cuda.is_current_stream_capturing()):
        observer(_steps(token, number).name, outputs)


def _leave(token: torch.Tensor, weights: list[torch.Tensor], number: int) -> None:
    _steps(token, number).refuse_copies(weights, _LATE)


def _finish(token: torch.Tensor, outputs: list[torch.Tensor], number: int) -> None:
    steps = _steps(token, number)
    stream = stream_of(steps.device)
    for call, layer in steps.calls:
        call(layer, stream)


def _fake(*_args: object) -> None:
    partition.mend()
    refuse_freezing()
    refuse_exporting()


def _fake_parts(*_args: object) -> None:
    """A compiler that takes weights apart would order reads of its own parts by nothing."""
    _fake()
    if is_within("torch._functorch"):
        raise Refused(_PARTS)


for _schema, _function, _traced in (
    ("arrive(Tensor(a!) token, Tensor(b!)[] weights, SymInt steps) -> ()", _arrive, _fake),
    ("arrive_parts(Tensor(a!) token, Tensor(b!)[] weights, SymInt steps) -> ()", _arrive, _fake_parts),
    ("settle(Tensor(a!) token, Tensor(b!)[] outputs, Tensor(c!)[] weights, SymInt steps) -> ()", _settle, _fake),
    ("leave(Tensor(a!) token, Tensor(b!)[] weights, SymInt steps) -> ()", _leave, _fake),
    ("finish(Tensor(a!) token, Tensor(b!)[] outputs, SymInt steps) -> ()", _finish, _fake),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=(torch.Tag.cudagraph_unsafe,))  # type: ignore[no-untyped-call]
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"layershard::{_name}", _traced, lib=_library)

arrive = torch.ops.layershard.arrive.default
arrive_parts = torch.ops.layershard.arrive_parts.default
settle = torch.ops.layershard.settle.default
leave = torch.ops.layershard.leave.default
finish = torch.ops.layershard.finish.default

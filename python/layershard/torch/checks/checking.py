# SPDX-License-Identifier: Apache-2.0
"""check: whether a program's own pass reads every shared weight only when it is there, and writes none.

The pass is made twice from the same state, as it is and with poison in the windows. Knows how to compare and what to
say; how state is put back, calls are observed and records are exchanged is in modules of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ...errors import Aborted, Error, OutOfStep, PeerFailed, Timeout
from .. import ops
from ..compiled import whole
from ..exchange import exchange
from ..handle import Handle, of
from ..memory import bytes_of
from ..refusals import Guarded, Refused
from ..shared import Shared, poison_of
from .digests import Unseen, bits_of
from .findings import Records, causes_first, findings, poisoned_layers, read_early
from .observing import Event, Observation, first_difference
from .reading import Reads
from .state import SavedState, fresh, modules_in


class CheckFailed(RuntimeError):
    """The pass reads weights when they are not there, or writes to them; the text says where. The same on all ranks."""


@dataclass(frozen=True)
class Checked:
    """What a check that found nothing wrong has seen.

    is_equal  whether anything was compared: False where nothing moves, or the pass used nothing that does
    layers    of how many layers in all series, `seen` were fetched into a poisoned window of some rank
    """

    is_equal: bool
    layers: int
    seen: int
    why: str

    def __str__(self) -> str:
        return self.why


_STILL = (
    "nothing was compared: no layer is fetched into a window on any rank, so there is nothing that could be read at "
    "the wrong time; what is stored was not written"
)
_UNUSED = "nothing was compared: the call waited for none of the layers that are fetched into windows"
_NO_MEMORY = (
    "its windows cannot be poisoned, since in device memory and in torch's that takes room for one window more than "
    "there are: start all ranks with LAYERSHARD_POISON=ready, for this check"
)


_FOLLOWS = (Aborted, OutOfStep, PeerFailed, Timeout)  # what a rank meets where another has failed


def _text(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def check(model: nn.Module, *inputs: Any, call: Callable[..., Any] | None = None, **kwargs: Any) -> Checked:
    """Make this pass twice, as it is and with poison where no weights may be read, and compare bit for bit. Collective.

    check(model, x) calls model(x); check(model, ids, call=model.generate, max_new_tokens=8) what is given. Random
    states, arguments (caches too), buffers and what modules keep in attributes are put back between. CheckFailed, the
    same on all ranks, names the first module that gave another result, and what was written of the stored weights. Once
    for each model and version of the program, at its start, is enough.
    """
    return _Check(of(model), whole(model), model if call is None else call, (inputs, kwargs)).run()


class _Check:
    """One rank's part of one check."""

    def __init__(self, handle: Handle, model: nn.Module, call: Callable[..., Any], arguments: Any) -> None:
        self._handle = handle
        self._model = model
        self._call = call
        self._arguments = arguments
        self._saved: SavedState | None = None
        self._error: Exception | None = None  # of the call
        self._failed: tuple[str, Exception] | None = None  # what no rank goes on after
        self._unseen: Unseen = set()

    def run(self) -> Checked:
        windows = self._begin()
        before = self._here(self._stored, {})
        first = self._pass_as_it_is()
        if not windows:
            self._raise_findings([self._exchange(written=self._written(before))])
            return Checked(False, self._n_layers(), 0, _STILL)
        reads, elsewhere = self._reads()
        waits = self._waits()
        with self._poisoned():
            seen = self._here(self._seen, [])
            second = self._pass()
        used = self._waits() > waits
        records = self._exchange(
            differs=first_difference(first, second),
            raised=_text(self._error),
            follows=isinstance(self._error, _FOLLOWS),
            written=self._written(before),
            reads=reads,
            elsewhere=elsewhere,
            seen=seen,
            used=used,
            unseen=sorted(self._unseen)[:8],
        )
        differs, wrote = self._again(records, second)
        self._raise_findings([records, self._exchange(differs=differs, wrote=wrote, raised=_text(self._error))])
        return self._verdict(records)

    # ---- Steps, each on all ranks ----

    def _exchange(self, **record: Any) -> Records:
        """The records of all ranks. Where one has failed all raise what its record says of that."""
        if self._failed is not None:
            what, error = self._failed
            record.update(failed=f"{what}: {_text(error)}", follows=isinstance(error, _FOLLOWS))
        records = exchange(self._handle.group, self._handle.device, record)
        if any(record.get("raised") or record.get("failed") for record in records):
            self._rewind()
        for rank, record in causes_first(records):
            if record.get("failed"):
                raise CheckFailed(f"rank {rank}: {record['failed']}") from (self._failed or [None, None])[1]
        return records

    def _here(self, work: Callable[[], Any], otherwise: Any = None) -> Any:
        """What this rank does alone. Where it fails, the others learn it from the next record."""
        try:
            return work()
        except Exception as error:
            self._failed = self._failed or ("check itself fails", error)
            return otherwise

    def _rewind(self) -> None:
        """A pass that ended early on any rank has left the ranks of a collective transport at different places. One
        that another thread is in would lose its windows."""
        with suppress(Refused):
            self._alone(lambda: [self._here(each.series.rewind) for each in self._handle.shared])

    def _alone(self, work: Callable[[], Any]) -> Any:
        return self._handle.alone("check()", work)

    def _begin(self) -> int:
        """How many windows there are on all ranks. Whatever keeps one rank from taking part is told to all."""
        refusal: Exception | None = None
        try:
            self._handle.refuse_half_written()
            modules = [self._model, *modules_in(self._arguments)]
            self._saved = SavedState(modules, self._handle.all_places(), self._handle.device)
            fresh(self._model, self._arguments)
            self._alone(self._try_poison)
        except Exception as error:
            refusal = error
        windows = sum(each.windows for each in self._handle.stats().values())
        answers = self._exchange(refusal=str(refusal or ""), windows=windows)
        if refusal is not None:
            raise refusal
        for rank, answer in enumerate(answers):
            if answer["refusal"]:
                raise Refused(f"rank {rank} cannot take part: {answer['refusal']}")
        return sum(answer["windows"] for answer in answers)

    def _try_poison(self) -> None:
        for each in self._handle.shared:
            if each.device.type != "cpu" and each.moves and not each.series.is_poisoned:
                try:
                    self._switch(each, True)
                except Error as error:
                    raise Refused(f"series '{each.plan.name}': {_NO_MEMORY} ({error.text})") from error
                self._switch(each, False)

    def _pass(self, around: Any = None) -> list[Event]:
        """Made from the state of the beginning, with new copies of the arguments; leaves that state behind."""
        assert self._saved is not None
        self._error = None
        seen = Observation(self._model)
        self._here(lambda: self._call_once(seen, around or nullcontext()))
        self._here(self._saved.put_back)
        self._unseen |= seen.unseen
        return seen.events

    def _call_once(self, seen: Observation, around: Any) -> None:
        inputs, kwargs = fresh(self._model, self._arguments)
        with seen:
            try:
                with around, ops.observed(self._handle.token, seen.settled):
                    result = self._call(*inputs, **kwargs)
            except Exception as error:
                self._error = error
                seen.raised(error)
                return
            seen.returned((result, inputs, kwargs))

    def _reads(self) -> tuple[list[tuple[int, int, str, str]], str | None]:
        """One more pass, in eager mode: what it reads of other layers than the one whose turn it is; and what it runs
        where nobody looks."""
        seen = Reads(self._model, self._handle.shared, self._handle.steps_of)
        compiles = "torch._dynamo" in sys.modules  # to import it takes seconds
        with self._poisoned(False), torch.compiler.set_stance("force_eager") if compiles else nullcontext():
            self._pass(seen)
        self._raise_failure("the call fails in eager mode, though not as it is")
        return [(*weight, where) for weight, where in seen.found.items()][:8], seen.elsewhere

    def _pass_as_it_is(self) -> list[Event]:
        with self._poisoned(False):
            events = self._pass()
        self._raise_failure("the call itself fails, without poison")
        return events

    def _raise_failure(self, what: str) -> None:
        if self._error is not None:
            is_refused = isinstance(self._error, Refused | Guarded)
            self._failed = self._failed or ("the call is refused" if is_refused else what, self._error)
        self._exchange()

    def _again(self, records: Records, second: list[Event]) -> tuple[str | None, list[str]]:
        """Where anything differs, whether the call gives the same bits twice at all, and which weights of its own it
        writes. With poison, since what is read too early may have come by luck without it."""
        if not any(record["differs"] for record in records):
            return None, []
        before = self._here(self._unshared, {})
        with self._poisoned():
            differs = first_difference(second, self._pass())
        after = self._here(self._unshared, before)
        return differs, [name for name, digest in before.items() if after.get(name) != digest][:8]

    def _unshared(self) -> dict[str, bytes | None]:
        shared = {id(place.whole) for place in self._handle.all_places()}
        return {name: bits_of(each) for name, each in self._model.named_parameters() if id(each) not in shared}

    # ---- Poison ----

    def _switch(self, shared: Shared, on: bool) -> None:
        shared.series.poison(on, ops.stream_of(self._handle.device))

    def _switch_all(self, on: list[bool]) -> None:
        for each, one in zip(self._handle.shared, on, strict=True):
            self._here(partial(self._switch, each, one))

    @contextmanager
    def _poisoned(self, on: bool = True) -> Iterator[None]:
        """Windows as asked for; afterwards as they were."""
        before = [each.series.is_poisoned for each in self._handle.shared]
        self._here(partial(self._alone, lambda: self._switch_all([on] * len(before))))
        try:
            yield
        finally:
            self._here(partial(self._alone, lambda: self._switch_all(before)))

    def _seen(self) -> list[str]:
        """Of each series, as a number in base 16, a bit for each layer that shows poison here, outside of its turn."""
        return [
            f"{sum(1 << i for i, layer in enumerate(each.series.layers) if _shows_poison(each, layer)):x}"
            for each in self._handle.shared
        ]

    def _waits(self) -> int:
        return sum(each.waits for each in self._handle.stats().values())

    # ---- Stored weights ----

    def _stored(self) -> dict[str, bytes | None]:
        """Digests of what this rank is source of. Of stripes no rank has a whole layer in one place: they are fetched,
        and since a collective transport fetches a layer for all ranks or for none, all ranks go through all layers."""
        return dict(self._alone(self._stored_alone))

    def _stored_alone(self) -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        stream = ops.stream_of(self._handle.device)
        for each in self._handle.shared:
            for layer, places in each.plan.layers():
                if each.placement == "striped":
                    each.series.reach(layer, stream)
                    each.series.wait(layer, stream)
                if each.series.is_source(layer):
                    found.update((place.name, bits_of(each.view(layer, i))) for i, place in enumerate(places))
        return found

    def _written(self, before: dict[str, bytes | None]) -> list[str]:
        after = self._here(self._stored, before)
        return [name for name, digest in before.items() if after[name] != digest][:8]

    # ---- What came out ----

    def _n_layers(self) -> int:
        return sum(len(each.series.layers) for each in self._handle.shared)

    def _raise_findings(self, rounds: list[Records]) -> None:
        found = []
        again = rounds[-1] if len(rounds) > 1 else [{} for _ in rounds[0]]
        is_cause = any(record.get("raised") and not record["follows"] for record in rounds[0])
        for rank, record in causes_first(rounds[0]):
            if is_cause and record["follows"]:  # its result differs since another rank has failed
                record["differs"] = None
            found += [f"rank {rank}: {each}" for each in findings(record, again[rank])]
        found = [*read_early(rounds[0]), *found]
        if found:
            raise CheckFailed("; ".join(found)) from self._error

    def _verdict(self, records: Records) -> Checked:
        layers = self._n_layers()
        seen = sum(bin(mask).count("1") for mask in poisoned_layers(records))
        if not any(record["used"] for record in records):
            return Checked(False, layers, 0, _UNUSED)
        text = f"equal with poison: {seen} of {layers} layers were fetched into a poisoned window of some rank"
        if seen < layers:
            text += ", the others are read in place, or resident on every rank that does not store them"
        text += "; what is stored was not written"
        unseen = sorted({each for record in records for each in record["unseen"]})
        if unseen:
            text += f"; not compared, as it cannot be looked into: {', '.join(unseen)}"
        return Checked(True, layers, seen, text)


def _shows_poison(shared: Shared, layer: int) -> bool:
    """The beginnings of all tensors: where a layer is stored there are no such bytes."""
    for index, layout in enumerate(shared.layouts):
        start = bytes_of(shared.series, layer, index, layout.nbytes)[:64]
        if not bool((start == (poison_of(layout) or b"\xff")[0]).all()):
            return False
    return True

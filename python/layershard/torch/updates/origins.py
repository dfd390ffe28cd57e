# SPDX-License-Identifier: Apache-2.0
"""Which memory holds what was computed from certain weights, followed through torch's operators while a program runs.

An update uses it to find own weights that were computed from scratch, which stands for other ranks' weights. Each of
those has a number, and so has what comes from it. Operators that move elements are run on the numbers, too, and tell by
themselves where each goes. Elementwise ones take the largest number in each place. Sums and products are run on ones,
once with NaN and once with 0 instead of what is followed: what differs comes from it. What is sorted, ranked or
transformed comes from its whole line, and of any other operator everything from all that it reads.

The values themselves tell nothing: an operator that compares, sorts or counts may give the same for two of them by
chance. So what is run on others is on a list, and of that only arithmetic by which NaN stays NaN.

Numbers taken out of tensors escape, as do other threads and what does not go through torch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch._ops import HigherOrderOperator, OperatorBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..compiled import Eager
from ..containers import tensors_in
from .collective_operators import is_collective, sent_by
from .operators import Call, each_index, rule_of
from .storages import Numbers, Storages, Unclear, any_of, even, flat, key_of


def _largest(numbers: list[Numbers], target: torch.Tensor) -> Numbers:
    """In each place of @target, to which the operands are broadcast."""
    one = max((each for each in numbers if isinstance(each, int)), default=0)
    several = [each for each in numbers if isinstance(each, torch.Tensor)]
    if one or not several:
        return one
    return functools.reduce(torch.maximum, several).expand(target.shape)


def _lines(dims: Any, numbers: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """In each place of @target the largest of the line, whose dimensions have another size there, or are gone."""
    return numbers.amax(dims, keepdim=target.dim() == numbers.dim()).expand(target.shape)


def _matrices(numbers: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """In each place of @target the largest of its matrix: what there is for each of a batch begins with its shape."""
    largest = numbers.amax((-2, -1))
    return largest.view(*largest.shape, *[1] * (target.dim() - largest.dim())).expand(target.shape)


class Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """with Origins() as origins: origins.follow(tensor, name), and later origins.source_of(another)."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported, which takes seconds

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = Storages()
        self._names: list[str | None] = [None]  # by their numbers
        self._eager = Eager()
        self.sent: tuple[str, str] | None = None  # an operator that gave it to other ranks, and what

    def __enter__(self) -> Origins:
        self._eager.__enter__()  # compiled code that must not be broken up fails where it meets a mode
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._eager.__exit__(*error)

    def follow(self, tensor: torch.Tensor, source: str) -> None:
        """The whole storage of @tensor, as Storages.fix says."""
        self._storages.fix(tensor, len(self._names))
        self._names.append(source)

    def source_of(self, tensor: torch.Tensor) -> str | None:
        """A name that was followed to the memory of @tensor, or whose memory it is, fresh or not."""
        return self._names[self._storages.fixed(tensor) or any_of([self._storages.of(tensor)])]

    # ---- Operators ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = self._run_untraced if "torch._dynamo" in sys.modules else self._run
        return run(func, types, args, kwargs or {})

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if any(each.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for each in types):
            return NotImplemented  # it calls operators on what it wraps
        if isinstance(func, HigherOrderOperator):
            return self._run_bodies(func, args, kwargs)
        rule = rule_of(func)
        if rule.is_composite:
            with self._again():
                return func.decompose(*args, **kwargs)
        if rule.passes and not is_collective(func):
            return func(*args, **kwargs)
        keys = {key_of(each) for each in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        if not self._storages.known.keys().isdisjoint(keys):
            with torch.inference_mode(False):  # numbers may be written outside of it
                if is_collective(func):
                    self._send(func, args, kwargs)
                elif rule.by_index:
                    for index, each, named in each_index(args, kwargs):
                        self._take(Call(func, rule, each, named), keys, result[index] if result else None)
                else:
                    self._take(Call(func, rule, args, kwargs), keys, result)
        return result

    def _run_bodies(self, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        """Of torch.cond and the like. What it does itself with what the functions gave is not seen."""
        given = list(tensors_in((args, kwargs)))

        def seen(body: Any) -> Any:
            if not callable(body) or isinstance(body, OperatorBase):
                return body

            def run(*args: Any) -> Any:
                with self._again():
                    result = body(*args)
                given.extend(tensors_in([result]))
                return result

            return run

        result = func(*tree_map(seen, args), **tree_map(seen, kwargs))
        keys, number = {key_of(each) for each in given}, any_of(map(self._storages.of, given))
        for each in tensors_in([result]):
            if key_of(each) not in keys:
                self._storages.put(each, number)
        return result

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """While it runs an operator it sees no others, but those inside."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    _run_untraced = _disable_dynamo(_run)  # what is compiled meanwhile runs in eager mode, but not this

    def _send(self, func: Any, args: Any, kwargs: Any) -> None:
        """Not refused here, where other ranks wait in it, too."""
        given, received, lasts = sent_by(func, args, kwargs)
        for each in given:
            source = self.source_of(each) if lasts else self._names[any_of([self._storages.of(each)])]
            if source is not None:
                self.sent = self.sent or (func._schema.name.partition("::")[2].strip("_"), source)
        for each in received:
            self._storages.put(each, 0)

    def _take(self, call: Call, given: set[int], result: Any) -> None:
        written = call.written()
        targets = [*written, *(flat(each) for each in tensors_in([result]) if key_of(each) not in given)]
        if not targets:
            return  # what is made is a view of what was given
        numbers = [self._storages.of(each) for each in call.read()]
        try:
            for target, found in zip(targets, self._found(call, numbers, written, targets), strict=True):
                self._storages.put(target, found)
        except (Unclear, RuntimeError, IndexError):  # the latter two: numbers' shapes or dimensions that do not fit
            for target in targets:
                self._storages.put(target, any_of(numbers))

    def _found(
        self, call: Call, numbers: list[Numbers], written: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> list[Numbers]:
        """What each of @targets comes from."""
        kind, moves = call.rule.kind, call.rule.kind == "moves"
        if kind != "each" and not moves:
            numbers = [even(each) for each in numbers]
        several = [each for each in numbers if isinstance(each, torch.Tensor)]
        if kind == "each" or (not several and (not moves or len(set(numbers)) == 1)):
            return [_largest(numbers, target) for target in targets]
        if kind == "sums" or (moves and call.adds()):
            return self._summed(call, any_of(numbers))
        if moves:
            return self._moved(call, written, targets)
        if kind == "other" or len(numbers) > 1:
            raise Unclear
        along = functools.partial(_lines, call.dims()) if kind == "lines" else _matrices
        return [along(several[0], target) for target in targets]

    def _moved(self, call: Call, written: list[torch.Tensor], targets: list[torch.Tensor]) -> list[Numbers]:
        picks = call.picks()

        def numbered(tensor: torch.Tensor, says_places: bool) -> torch.Tensor:
            if says_places:
                return tensor if tensor is picks else self._clean(tensor)
            if any(tensor is each for each in written):
                return self._storages.room(tensor)
            numbers = torch.as_tensor(self._storages.of(tensor), dtype=torch.int32, device=tensor.device)
            return numbers.expand(tensor.shape)

        moved: list[Numbers] = [flat(each) for each in tensors_in([call.run_on(numbered, zeros=True)])]
        return moved if picks is None else [_largest([*moved, self._storages.of(picks)], targets[0])]

    def _summed(self, call: Call, number: int) -> list[Numbers]:
        def filled(fill: float, tensor: torch.Tensor, says_places: bool) -> torch.Tensor:
            if says_places:
                return self._clean(tensor)
            is_followed = torch.as_tensor(self._storages.of(tensor), device=tensor.device) != 0
            return torch.ones(tensor.shape, device=tensor.device).masked_fill_(is_followed, fill)

        one, other = (call.run_on(functools.partial(filled, fill), zeros=False) for fill in (float("nan"), 0.0))
        return [
            (x != y).int() * number if x.is_floating_point() else number
            for x, y in zip(tensors_in([one]), tensors_in([other]), strict=True)
        ]

    def _clean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Operands that say places are given as they are."""
        if any_of([self._storages.of(tensor)]):
            raise Unclear
        return tensor

# SPDX-License-Identifier: Apache-2.0
"""Which memory holds what was computed from certain weights, followed through torch's operators while a program runs.

An update uses it to find own weights that were computed from scratch, which stands for other ranks' weights. What is
followed are bytes of storages: views need no thought, and elementwise operators, joined tensors and operators on lists
take each part where it goes, so that vectors of all parameters stay right. Numbers taken out of tensors escape, as do
other threads and what does not go through torch. Nothing is kept alive.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch._compile import _disable_dynamo
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from .compiled import Eager
from .containers import tensors_in
from .layout import Layout
from .sending import is_collective, sent_by

_OVERWRITES = frozenset(
    ["copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_"]
)
_JOINS = frozenset(["cat", "stack"])


class _Part(NamedTuple):
    """Bytes of a storage that come from the weight @source."""

    begin: int
    end: int
    source: str


class _Known(NamedTuple):
    """A fixed one was followed from the beginning and is shared memory: @parts hold unless it is fresh."""

    is_gone: Callable[[], bool]
    parts: list[_Part]
    is_fixed: bool = False


class _Rule(NamedTuple):
    """How an operator's results come from its operands.

    passes      they are the operand's memory, or have nothing but its shape
    written     position and name of the operands that are written
    overwrites  these are not read
    is_aligned  each element comes from the operands' elements in the same place
    joins       the operands of a list lie in the result one after another
    by_index    an operator for each index of its lists
    """

    passes: bool
    written: tuple[tuple[int, str], ...]
    overwrites: bool
    is_aligned: bool
    joins: bool
    by_index: bool


@functools.cache
def _rule_of(func: Any) -> _Rule:
    schema = getattr(func, "_schema", None)  # of operators that take functions there is none
    if schema is None:
        return _Rule(False, (), False, False, False, False)
    name = schema.name.partition("::")[2]
    by_index = name.startswith("_foreach_") or (name.startswith("_fused_") and not schema.returns)  # optimizers' steps
    name = name.removeprefix("_foreach_")
    writes = [(i, each) for i, each in enumerate(schema.arguments) if each.alias_info and each.alias_info.is_write]
    is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns)
    return _Rule(
        passes=is_view or torch.Tag.inplace_view in func.tags or name.startswith("new_") or name.endswith("_like"),
        written=tuple((index, each.name) for index, each in writes),
        overwrites=name in _OVERWRITES or any(each.is_out for _, each in writes),
        is_aligned=by_index or torch.Tag.pointwise in func.tags or name in ("copy_", "_to_copy"),
        joins=name in _JOINS,
        by_index=by_index,
    )


def _key(tensor: torch.Tensor) -> int:
    """Not another's as long as the storage is watched."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)  # sparse ones, and others that consist of several


def _gone(tensor: torch.Tensor) -> Callable[[], bool]:
    try:
        return StorageWeakRef(tensor.untyped_storage()).expired  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        alive = weakref.ref(tensor)
        return lambda: alive() is None


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """From the first byte in its storage to the last, holes included."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return 0, 1 << 62
    begin = int(tensor.storage_offset()) * tensor.itemsize
    return begin, begin + (Layout.of(tensor).nbytes if tensor.numel() else 0)


def _is_solid(tensor: torch.Tensor) -> bool:
    """Nothing else lies in its extent."""
    begin, end = _extent(tensor)
    return end - begin == tensor.numel() * tensor.itemsize


def _cut(parts: Iterable[_Part], begin: int, end: int) -> list[_Part]:
    found = (_Part(max(each.begin, begin), min(each.end, end), each.source) for each in parts)
    return [each for each in found if each.begin < each.end]


def _carried(parts: list[_Part], source: torch.Tensor, target: torch.Tensor, *, is_aligned: bool) -> list[_Part]:
    """What of @target comes from these parts of @source's storage."""
    begin, end = _extent(target)
    if is_aligned and source.numel() == target.numel() and source.is_contiguous() and target.is_contiguous():
        start, size, wide = _extent(source)[0], source.itemsize, target.itemsize
        return [
            _Part(begin + (first - start) // size * wide, begin - (start - last) // size * wide, name)
            for first, last, name in parts
        ]
    return [_Part(begin, end, parts[0].source)]


def _each_index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int, Any, Any]]:
    """The operands of a list operator, one tensor of each list at a time."""

    def at(value: Any, index: int) -> Any:
        return value[index] if isinstance(value, (list, tuple)) and index < len(value) else value

    for index in range(max((len(each) for each in args if isinstance(each, (list, tuple))), default=0)):
        yield index, [at(each, index) for each in args], {name: at(each, index) for name, each in kwargs.items()}


def _dim(args: Any, kwargs: Any) -> int:
    """Along which cat and stack join."""
    dim: int = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    return dim


def _pieces(target: torch.Tensor, operands: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each operand and where it lies in what cat or stack made of them."""
    flat, begin, found = target.view(-1), 0, []
    for each in operands:
        found.append((each, flat.narrow(0, begin, each.numel())))
        begin += each.numel()
    return found


class Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """with Origins() as origins: origins.follow(tensor, name), and later origins.source_of(another)."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported, which takes seconds

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, _Known] = {}
        self._crowded = 1000  # where it is looked which storages are gone
        self._fresh: dict[int, int] = {}  # by address, the followed storage through which all was last written
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
        """The whole storage of @tensor. Storages may share its memory: what is written by one name is not there by
        that name any more when another one is written."""
        self._known[_key(tensor)] = _Known(_gone(tensor), [_Part(*_extent(tensor), source)], is_fixed=True)

    def source_of(self, tensor: torch.Tensor) -> str | None:
        """A name that was followed to the memory of @tensor, or whose memory it is, fresh or not."""
        known = self._known.get(_key(tensor))
        if known is not None and known.is_fixed:
            return known.parts[0].source
        parts = self._parts(tensor)
        return parts[0].source if parts else None

    def _parts(self, tensor: torch.Tensor) -> list[_Part]:
        known = self._known.get(_key(tensor))
        if known is None or known.is_gone() or (known.is_fixed and self._is_fresh(tensor)):
            return []
        return _cut(known.parts, *_extent(tensor))

    def _is_fresh(self, tensor: torch.Tensor) -> bool:
        return self._fresh.get(tensor.untyped_storage().data_ptr()) == _key(tensor)

    def _write_fixed(self, known: _Known, target: torch.Tensor, parts: list[_Part]) -> None:
        is_whole = _is_solid(target) and _extent(target) == known.parts[0][:2]
        if not parts and is_whole:
            self._fresh[target.untyped_storage().data_ptr()] = _key(target)
        elif parts or not self._is_fresh(target):
            self._fresh.pop(target.untyped_storage().data_ptr(), None)

    # ---- Operators ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = self._run_untraced if "torch._dynamo" in sys.modules else self._run
        return run(func, types, args, kwargs or {})

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # it calls operators on what it wraps
        keys = {_key(each) for each in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        if not self._known.keys().isdisjoint(keys):
            rule = _rule_of(func)
            if is_collective(func):
                self._send(func, args, kwargs)
            elif rule.by_index:
                for index, each, named in _each_index(args, kwargs):
                    self._take(rule, each, named, result[index] if result else None)
            elif not rule.passes:
                self._take(rule, args, kwargs, result)
        return result

    _run_untraced = _disable_dynamo(_run)  # what is compiled meanwhile runs in eager mode, but not this

    def _send(self, func: Any, args: Any, kwargs: Any) -> None:
        """Not refused here, where other ranks wait in it, too."""
        given, received, lasts = sent_by(func, args, kwargs)
        for each in given:
            source = self.source_of(each) if lasts else next((part.source for part in self._parts(each)), None)
            if source is not None:
                self.sent = self.sent or (func._schema.name.partition("::")[2].strip("_"), source)
        for each in received:
            self._set(each, [])

    def _take(self, rule: _Rule, args: Any, kwargs: Any, result: Any) -> None:
        written = [kwargs.get(name, args[i] if i < len(args) else None) for i, name in rule.written]
        read: Any = [args, kwargs]
        if rule.overwrites:
            places = dict(rule.written)
            read = [each for i, each in enumerate(args) if i not in places]
            read += [each for name, each in kwargs.items() if name not in places.values()]
        keys = {_key(each) for each in tensors_in([args, kwargs])}
        results = [each for each in tensors_in([result]) if _key(each) not in keys]
        operands = list(tensors_in(read))
        for target in [*tensors_in(written), *results]:
            pieces = [(each, target) for each in operands]
            if rule.joins and target.is_contiguous() and _dim(args, kwargs) % target.dim() == 0:
                pieces = _pieces(target, operands)
            self._set(target, [part for each, piece in pieces for part in self._moved(rule, each, piece)])

    def _moved(self, rule: _Rule, source: torch.Tensor, target: torch.Tensor) -> list[_Part]:
        parts = self._parts(source)
        return _carried(parts, source, target, is_aligned=rule.is_aligned or rule.joins) if parts else []

    def _set(self, target: torch.Tensor, parts: list[_Part]) -> None:
        """Let @parts be all that is known of the extent of @target."""
        known = self._known.get(_key(target))
        if known is None or known.is_gone():
            if not parts:
                return
            self._sweep()
            known = self._known[_key(target)] = _Known(_gone(target), [])
        if known.is_fixed:
            self._write_fixed(known, target, parts)
            return
        begin, end = _extent(target)
        whole = [each for each in parts if (each.begin, each.end) == (begin, end)]
        if whole or _is_solid(target):
            known.parts[:] = _cut(known.parts, 0, begin) + _cut(known.parts, end, 1 << 62)
        known.parts.extend(whole[:1] or parts)

    def _sweep(self) -> None:
        if len(self._known) > self._crowded:
            self._known = {key: known for key, known in self._known.items() if not known.is_gone()}
            self._crowded = 1000 + 2 * len(self._known)

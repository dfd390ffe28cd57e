# SPDX-License-Identifier: Apache-2.0
"""Which elements of memory come from certain weights, and from which: a number for each weight, 0 for none of them.

Of a storage one number is known, or, where that is not enough, one for each element, in a tensor that lies as the
elements do. So views need no thought, and what a look or a write takes does not grow with those before it.

Knows storages; nothing of operators or weights. Nothing is kept alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..layout import Layout

Numbers = int | torch.Tensor  # of all elements, or of each


class Unclear(Exception):
    """It cannot be told apart which elements come from where."""


def key_of(tensor: torch.Tensor) -> int:
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


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of several tensors that torch has put into one, as they lie there."""
    if not tensor.is_nested or not tensor.is_contiguous():
        return tensor
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def _is_plain(tensor: torch.Tensor) -> bool:
    """Its elements lie in its storage by its strides."""
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_all(tensor: torch.Tensor) -> bool:
    """Nothing else lies in its storage."""
    size = tensor.numel() * tensor.itemsize
    return _is_plain(tensor) and size == Layout.of(tensor).nbytes == tensor.untyped_storage().nbytes()


def even(numbers: Numbers) -> Numbers:
    """One number, where it is the same everywhere."""
    if isinstance(numbers, int):
        return numbers
    least, largest = torch.aminmax(numbers)
    return int(largest) if least == largest else numbers


def any_of(numbers: Iterable[Numbers]) -> int:
    return max((int(each if isinstance(each, int) else each.max()) for each in numbers), default=0)


class _Known:
    """What is known of a storage. A fixed one was followed from the beginning and is shared memory: what is known
    holds unless it is fresh."""

    def __init__(self, tensor: torch.Tensor, number: int, *, is_fixed: bool = False) -> None:
        self.is_gone = _gone(tensor)
        self.numbers: Numbers = number
        self.is_fixed = is_fixed
        self._itemsize = 0  # of the elements that numbers are of

    def at(self, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers of its elements; where they are kept, unless that is several of them to an element."""
        kept = self._kept(tensor)
        return kept.squeeze(-1) if kept.shape[-1] == 1 else kept.amax(-1)

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of the smallest elements that it was looked at by, so that a look takes nothing away: in the last dimension
        those that one of its elements consists of."""
        nbytes, itemsize = tensor.untyped_storage().nbytes(), tensor.itemsize
        if isinstance(self.numbers, int):
            self._itemsize = itemsize
            self.numbers = torch.full((-(-nbytes // itemsize),), self.numbers, dtype=torch.int32, device=tensor.device)
        elif itemsize < self._itemsize:
            self.numbers = self.numbers.repeat_interleave(self._itemsize // itemsize)
            self._itemsize = itemsize
        missing = -(-nbytes // self._itemsize) - len(self.numbers)
        if missing:
            self.numbers = torch.nn.functional.pad(self.numbers, (0, missing))
        n = itemsize // self._itemsize
        strides = [n * each for each in tensor.stride()]
        return self.numbers.as_strided((*tensor.shape, n), (*strides, 1), n * tensor.storage_offset())

    def put(self, tensor: torch.Tensor, numbers: Numbers) -> None:
        """Let them be all that is known of its elements."""
        if isinstance(self.numbers, torch.Tensor) and self._are_kept(tensor, numbers):
            return
        if _is_all(tensor):
            numbers = even(numbers)
        if not _is_plain(tensor):
            self.numbers = any_of([self.numbers, numbers])  # it may be part of what lies there
        elif isinstance(numbers, torch.Tensor):
            self._kept(tensor).copy_(numbers.unsqueeze(-1))
        elif _is_all(tensor):
            self.numbers = numbers
        elif isinstance(self.numbers, torch.Tensor) or self.numbers != numbers:
            self._kept(tensor).fill_(numbers)

    def _are_kept(self, tensor: torch.Tensor, numbers: Numbers) -> bool:
        """Whether an operator has written them where they are kept."""
        return isinstance(numbers, torch.Tensor) and self.at(tensor).is_set_to(numbers)


class Storages:
    """What is known of all of them, by key_of."""

    def __init__(self) -> None:
        self.known: dict[int, _Known] = {}
        self._crowded = 1000  # where it is looked which storages are gone
        self._fresh: dict[int, int] = {}  # by address, the fixed storage through which all was last written

    def fix(self, tensor: torch.Tensor, number: int) -> None:
        """The whole storage of @tensor. Storages may share its memory: what is written through one is not there through
        it any more when another one is written."""
        self.known[key_of(tensor)] = _Known(tensor, number, is_fixed=True)

    def fixed(self, tensor: torch.Tensor) -> int:
        """What its storage was fixed to, fresh or not."""
        known = self.known.get(key_of(tensor))
        return any_of([known.numbers]) if known is not None and known.is_fixed else 0

    def of(self, tensor: torch.Tensor) -> Numbers:
        tensor = flat(tensor)
        known = self.known.get(key_of(tensor))
        if known is None or known.is_gone() or (known.is_fixed and self._is_fresh(tensor)) or not tensor.numel():
            return 0
        if isinstance(known.numbers, int):
            return known.numbers
        return known.at(tensor) if _is_plain(tensor) else any_of([known.numbers])

    def put(self, tensor: torch.Tensor, numbers: Numbers) -> None:
        """Let them be all that is known of its elements."""
        known = self.known.get(key_of(tensor))
        is_nothing = isinstance(numbers, int) and not numbers
        if not tensor.numel() or tensor.is_meta or (is_nothing and (known is None or known.is_gone())):
            return
        known = self._watched(tensor)
        if known.is_fixed:
            self._put_fixed(tensor, any_of([numbers]) > 0)
        else:
            known.put(tensor, numbers)

    def room(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where the numbers of its elements are kept, to be written and then put."""
        known = self._watched(tensor)
        if known.is_fixed or not _is_plain(tensor):
            raise Unclear
        return known.at(tensor)

    def _watched(self, tensor: torch.Tensor) -> _Known:
        known = self.known.get(key_of(tensor))
        if known is None or known.is_gone():
            self._sweep()
            known = self.known[key_of(tensor)] = _Known(tensor, 0)
        return known

    def _is_fresh(self, tensor: torch.Tensor) -> bool:
        return self._fresh.get(tensor.untyped_storage().data_ptr()) == key_of(tensor)

    def _put_fixed(self, tensor: torch.Tensor, is_any: bool) -> None:
        if not is_any and _is_all(tensor):
            self._fresh[tensor.untyped_storage().data_ptr()] = key_of(tensor)
        elif is_any or not self._is_fresh(tensor):
            self._fresh.pop(tensor.untyped_storage().data_ptr(), None)

    def _sweep(self) -> None:
        if len(self.known) > self._crowded:
            self.known = {key: known for key, known in self.known.items() if not known.is_gone()}
            self._crowded = 1000 + 2 * len(self.known)

# SPDX-License-Identifier: Apache-2.0
"""The caller's own memory for shards and windows: a Python object's methods behind lshard_memory_source.

Knows who lent what the library has not given back. That may be after the series and the group are gone, since other
ranks may read a shard longer than its own rank, so the functions that C calls are never freed, and a lender lives as
long as anything of it is out.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Literal, Protocol

from . import _declarations as c
from ._calls import FirstError

Purpose = Literal["shard", "windows"]

_WORDS: dict[int, Purpose] = {c.PURPOSE["shard"]: "shard", c.PURPOSE["windows"]: "windows"}
_numbers = itertools.count(1)  # 0 would be NULL
_lenders: weakref.WeakValueDictionary[int, Lender] = weakref.WeakValueDictionary()
_out: dict[int, Lender] = {}  # what is lent, by its address


class MemorySource(Protocol):
    """Where a series' shard and windows are to lie, instead of in the library's own memory: for transports that take
    the caller's (layershard.transports() says which), on all ranks or none. Memory is given by address.

    A shard that another rank still reads when the last rank of this process has left is never given back.
    """

    def allocate(self, purpose: Purpose, count: int, alignment: int) -> int:
        """The address of as many bytes, in host memory or on the group's device, that nothing else uses. What it raises
        is the cause of NoMemory."""

    def release(self, purpose: Purpose, address: int) -> None:
        """Take back what was allocated. Called by any thread."""


class Lender:
    """A source while a series uses it."""

    def __init__(self, source: MemorySource) -> None:
        self.source = source
        self.kept = FirstError()
        number = next(_numbers)
        _lenders[number] = self
        self.structure = c.MemorySource(allocate=_ALLOCATE, release=_RELEASE, user=number)


def _allocate(number: int, purpose: int, count: int, alignment: int) -> int:
    lender = _lenders[number]

    def lend() -> int:
        address = lender.source.allocate(_WORDS[purpose], count, alignment)
        _out[address] = lender
        return address

    return int(lender.kept.run(lend, 0))


def _release(_number: int, purpose: int, address: int) -> None:
    lender = _out.pop(address)
    try:
        lender.source.release(_WORDS[purpose], address)
    except BaseException as error:  # nothing passes through C
        lender.kept.keep(error)
        _out[address] = lender


_ALLOCATE = c.ALLOCATE_FOR(_allocate)
_RELEASE = c.RELEASE_FOR(_release)

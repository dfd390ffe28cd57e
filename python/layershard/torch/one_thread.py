# SPDX-License-Identifier: Apache-2.0
"""One thread at a time: two passes of one model at once would take the windows from under each other, so the second is
refused when it begins, or arrives where the first one is.

A turn belongs to modules that must not run in two threads at once: one in which passes begin; those that wait for, or
only reach, layers of the same series. It keeps the thread that came last and nothing else, so that nothing has to be
given back after a pass, nor after an exception or a Ctrl-C: whether that thread is still inside is asked of its stack,
when another one comes. So passes may follow each other in any threads, a pass may move between threads, and threads
that a module starts may run what is in it, as long as each runs modules of different series.

Inside means: running a module that waits for the series, or the hook that reaches it. Between two blocks, and in the
rest of a block that only reaches, nothing reads the windows, and another thread that calls a block by itself is let in:
no stack tells a thread of the same pass from one of another.

Knows modules, threads and frames; nothing of series or windows.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import Tensor, compiler, nn

from .refusals import Refused

_CALL = nn.Module._call_impl.__code__
_OPERATORS = frozenset(("arrive", "arrive_parts"))

_BUSY = (
    "thread '{late}' began a pass of a model that is in a pass in thread '{early}': both would use the windows of its "
    "shared layers. Let passes take turns (a threading.Lock round each), or give each thread a model of its own, built "
    "and sharded by itself. Thread '{early}' goes on unharmed"
)

_WINDOW_TAKEN = (
    "{name} was called while another layer is in the window that it needs: by itself, without its block, whose call "
    "makes room, or in two threads at once. Call the block, and let passes take turns (a threading.Lock round each) or "
    "give each thread a model of its own, built and sharded by itself. Nothing was changed: passes go on unharmed"
)

_reads = threading.Lock()


@contextmanager
def reading_stacks() -> Iterator[None]:
    """One thread at a time. A garbage collection may let other threads run, and Python 3.11 reads a frame's f_locals,
    for which it makes a dict, from memory that the frame has left by then: it would crash."""
    with _reads:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def name_of(ident: int) -> str:
    names = {each.ident: each.name for each in threading.enumerate()}
    return names.get(ident, str(ident))


def is_call(code: CodeType) -> bool:
    """Whether it is torch's code that calls a module, or what dynamo has made of it."""
    return code is _CALL or (code.co_name == _CALL.co_name and code.co_filename == _CALL.co_filename)


def _is_same(tensor: Tensor, other: Tensor | None) -> bool:
    """Compilers make tensors anew of what they are given."""
    return other is not None and tensor.data_ptr() == other.data_ptr()


def window_taken(name: str) -> Refused:
    """What the library calls busy, in words for who called the module."""
    return Refused(_WINDOW_TAKEN.format(name=name or "a module"))


class Uses(NamedTuple):
    """The series that a module waits for, and those that it reaches."""

    waits: frozenset[Hashable]
    reaches: frozenset[Hashable]


class Turn:
    """Before a module runs: if turn.thread != threading.get_ident(): turn.take(). Compiled programs of the modules are
    given the @token."""

    def __init__(self, modules: Iterable[nn.Module], token: Tensor | None = None) -> None:
        self.thread = 0  # which need not ask: no other one has come since, here or beside
        self.hook: CodeType | None = None  # the modules', in which they reach
        self._last = 0
        self._token = token
        self._hooks = {id(module._forward_pre_hooks) for module in modules}  # which DataParallel's replicas share
        self._program: tuple[int, CodeType | None] = 0, None  # the compiled one that ran a module last: frame and code
        self._beside: list[tuple[Turn, bool]] = []  # those of the same series, and whether all of a module is inside

    def take(self) -> None:
        """Refused while another thread is inside. That one asks, and waits, if it comes before the answer."""
        here = threading.get_ident()
        with reading_stacks():
            for turn in (self, *(turn for turn, _ in self._beside)):
                if turn.thread != here:
                    turn.thread = 0
            stacks = sys._current_frames()
            for turn, whole in [(self, True), *self._beside]:
                if turn._last != here and turn._is_inside(stacks.get(turn._last), whole):
                    raise turn.refusal(here)
            self.thread = self._last = here

    def refusal(self, here: int) -> Refused:
        """Of a thread that comes while the last one is inside."""
        return Refused(_BUSY.format(late=name_of(here), early=name_of(self._last)))

    def put_beside(self, other: Turn, whole: bool = True) -> None:
        self._beside.append((other, whole))

    def came_last(self, thread: int) -> bool:
        return self._last == thread

    def take_compiled(self, program: FrameType) -> None:
        """The same for a module in a compiled program, whose modules are on no stack."""
        if self.thread != threading.get_ident():
            self.take()
        self._program = id(program), program.f_code

    def _is_inside(self, frame: FrameType | None, whole: bool) -> bool:
        inside = whole
        while frame is not None:
            if frame.f_code is self.hook:
                inside = True
            elif frame.f_code is _CALL:
                if inside and id(vars(frame.f_locals["self"]).get("_forward_pre_hooks")) in self._hooks:
                    return True
                inside = whole
            elif frame.f_code is self._program[1] and self._is_program(frame):
                return True
            frame = frame.f_back
        return False

    def _is_program(self, frame: FrameType) -> bool:
        """Models of one kind share code, and a frame may lie where one was before. What calls the operators by itself
        has the token until the last call. Inductor's cpp_wrapper does not: only the address tells its frames apart."""
        if _OPERATORS.isdisjoint(frame.f_code.co_names):
            return id(frame) == self._program[0]
        return any(type(each) is Tensor and _is_same(each, self._token) for each in frame.f_locals.values())


def turns_of(uses: Mapping[nn.Module, Uses], token: Tensor) -> dict[nn.Module, Turn]:
    """One for all modules that use the same series in the same way; those that share some are beside each other."""
    modules: dict[Uses, list[nn.Module]] = {}
    for module, used in uses.items():
        modules.setdefault(used, []).append(module)
    turns = {used: Turn(users, token) for used, users in modules.items()}
    for one, other in itertools.permutations(turns, 2):
        _put_beside(one, other, turns)
    return {module: turns[used] for module, used in uses.items()}


def _put_beside(one: Uses, other: Uses, turns: Mapping[Uses, Turn]) -> None:
    """A module that only reaches what another one waits for does not read it, and is inside while its hook runs."""
    all_of_one, all_of_other = one.waits | one.reaches, other.waits | other.reaches
    if all_of_one & all_of_other:
        reads = bool(all_of_one & other.waits)
        turns[one].put_beside(turns[other], reads or not one.waits & all_of_other)


def entering(turn: Turn) -> Callable[[nn.Module, Any], None]:
    """A hook for modules in which passes begin, before any that waits. In compiled ones the operators ask."""
    is_compiled, here = compiler.is_compiling, threading.get_ident

    def enter(module: nn.Module, args: Any) -> None:
        if not is_compiled() and turn.thread != here():
            turn.take()

    return enter

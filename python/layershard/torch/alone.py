# SPDX-License-Identifier: Apache-2.0
"""What a handle does beside passes: it goes through the same windows, or writes what they read, and so never meets one.

A call takes the turn of every module at once, see one_thread: refused while a thread is in a pass; a pass that begins
meanwhile is refused. A pass is found on the stacks of threads, as modules that hold what is shared; there it is also
found where layers are read in place and no module has a hook. In the thread of the call itself only a module that waits
for its layer counts: between two of them a pass has nothing in a window that it still needs.

Knows modules, threads and frames; nothing of series or windows.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FrameType
from typing import Literal, TypeVar

from torch import nn

from .compiled import whole
from .one_thread import Turn, is_call, name_of, reading_stacks
from .refusals import Refused

Result = TypeVar("Result")
Does = Literal["read", "fetch", "write"]  # with what is stored

_LOCK = "Let them take turns: hold one threading.Lock round each pass and round {call}"
_IN_A_PASS = (
    "{call} was called in thread '{here}' while thread '{there}' is in a pass of the model{module}: {why}. "
    f"{_LOCK}. Nothing was changed, and thread '{{there}}' goes on unharmed"
)
_IN_A_BLOCK = (
    "{call} was called from inside {module}, in the middle of its forward (a hook, perhaps): it would take the weights "
    "of that module out of their window while they are needed. Call it before the pass or after it. Nothing was changed"
)
_IN_A_CALL = (
    "{call} was called in thread '{here}' while thread '{there}' makes {other}: {why}. Let them take turns: hold one "
    "threading.Lock round each. Nothing was changed, and thread '{there}' goes on unharmed"
)
_PASS_BESIDE = (
    "thread '{here}' is in a pass of a model, or began one, while thread '{there}' makes {call} of it, which uses the "
    f"windows of its shared layers too. {_LOCK}. Thread '{{there}}' goes on unharmed"
)
_WINDOWS = "both would use the windows of its shared layers"
_WRITES = "the pass would compute from some old and some new weights"


class Alone(Turn):
    """The turn of a handle's calls, beside those of all modules.

    @names    of the modules that hold what is shared, themselves or further down
    @waiting  names of those that need a window until their forward has ended; none where nothing moves
    @turns    of the modules that have one
    """

    def __init__(
        self, names: Mapping[nn.Module, str], waiting: Mapping[nn.Module, str], turns: Collection[Turn], *, moves: bool
    ) -> None:
        super().__init__(())
        self._names, self._waiting = _by_hooks(names), _by_hooks(waiting)
        self._turns = turns
        self._moves = moves
        self._call = ""
        for turn in turns:
            turn.put_beside(self)

    def run(self, call: str, work: Callable[[], Result], does: Does) -> Result:
        """What @work returns, which no pass meets. While this is on the stack of the thread that came last, that one
        has the turn. What only reads what is stored, or where nothing moves, meets no call that writes."""
        here = threading.get_ident()
        is_within = self._last == here  # another call of this thread
        try:
            if does == "write" or (does == "fetch" and self._moves):
                self._take(call, here, _WRITES if does == "write" else _WINDOWS)
            return work()
        finally:
            if self._last == here and not is_within:
                self._last = 0

    def _take(self, call: str, here: int, why: str) -> None:
        with reading_stacks():
            for turn in self._turns:
                turn.thread = 0  # it asks, and waits, if it comes before the answer
            self._refuse(call, here, sys._current_frames(), why)
            self._last, self._call = here, call

    def refusal(self, here: int) -> Refused:
        return Refused(_PASS_BESIDE.format(here=name_of(here), there=name_of(self._last), call=self._call))

    # ---- On stacks ----

    def _refuse(self, call: str, here: int, stacks: Mapping[int, FrameType], why: str) -> None:
        block = _innermost(stacks[here], self._waiting)
        if block is not None:
            raise Refused(_IN_A_BLOCK.format(call=call, module=block or "the model"))
        for thread, frame in stacks.items():
            names = {"call": call, "here": name_of(here), "there": name_of(thread), "why": why}
            if thread != here and self._is_inside(frame, True):
                raise Refused(_IN_A_CALL.format(other=self._call or "another such call", **names))
            if thread != here and self._is_in_a_pass(thread, frame):
                module = _innermost(frame, self._names)
                raise Refused(_IN_A_PASS.format(module=f", in {module}" if module else "", **names))

    def _is_in_a_pass(self, thread: int, frame: FrameType) -> bool:
        """Its modules are on its stack, or the compiled program that ran one last."""
        compiled = any(turn.came_last(thread) and turn._is_inside(frame, False) for turn in self._turns)
        return compiled or _innermost(frame, self._names) is not None

    def _is_inside(self, frame: FrameType | None, whole: bool) -> bool:
        return any(map(self._is_run, _frames(frame)))

    def _is_run(self, frame: FrameType) -> bool:
        return frame.f_code is _RUN and frame.f_locals["self"] is self


_RUN = Alone.run.__code__


def _by_hooks(names: Mapping[nn.Module, str]) -> dict[int, str]:
    """By what replicas of DataParallel share."""
    return {id(module._forward_pre_hooks): name for module, name in names.items()}


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _innermost(frame: FrameType, known: Mapping[int, str]) -> str | None:
    """Of the modules that are being called there."""
    for each in _frames(frame):
        module = each.f_locals.get("self") if is_call(each.f_code) else None
        name = None if module is None else known.get(id(vars(whole(module)).get("_forward_pre_hooks")))
        if name is not None:
            return name
    return None

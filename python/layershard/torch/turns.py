# SPDX-License-Identifier: Apache-2.0
"""One thread at a time: two passes of one model at once would take the windows from under each other, so the second is
refused when it begins, or arrives where the first one is.

A turn belongs to modules that must not run in two threads at once: those in which passes begin; those that wait for
layers of one series. It keeps the thread that came last and nothing else, so that nothing has to be given back after a
pass, nor after an exception or a Ctrl-C: whether that thread is still inside is asked of its stack, when another one
comes. So passes may follow each other in any threads, a pass may move between threads, and threads that a module starts
may each run modules of different series.

Knows modules, threads and frames; nothing of series or windows.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, compiler, nn

from .refusals import Refused

_CALL = nn.Module._call_impl.__code__

_BUSY = (
    "thread '{late}' began a pass of a model that is in a pass in thread '{early}': both would use the windows of its "
    "shared layers. Let passes take turns (a threading.Lock round each), or give each thread a model of its own, built "
    "and sharded by itself. Thread '{early}' goes on unharmed"
)


def _name_of(ident: int) -> str:
    names = {each.ident: each.name for each in threading.enumerate()}
    return names.get(ident, str(ident))


def _is_same(tensor: Tensor, other: Tensor | None) -> bool:
    """Compilers make tensors anew of what they are given."""
    return other is not None and tensor.data_ptr() == other.data_ptr()


class Turn:
    """Before a module runs: if turn.thread != threading.get_ident(): turn.take(). Compiled programs of the modules are
    given the @token."""

    def __init__(self, modules: Iterable[nn.Module], token: Tensor | None = None) -> None:
        self.thread = 0
        self._token = token
        self._hooks = {id(module._forward_pre_hooks) for module in modules}  # which DataParallel's replicas share
        self._program: tuple[int, CodeType | None] = 0, None  # the compiled one that ran a module last: frame and code
        self._taking = threading.Lock()

    def take(self) -> None:
        """Refused while another thread is inside."""
        with self._taking:
            frame = sys._current_frames().get(self.thread)
            here = threading.get_ident()
            if self.thread != here and frame is not None and self._is_inside(frame):
                raise Refused(_BUSY.format(late=_name_of(here), early=_name_of(self.thread)))
            self.thread = here

    def take_compiled(self, program: FrameType) -> None:
        """The same for a module in a compiled program, whose modules are on no stack."""
        if self.thread != threading.get_ident():
            self.take()
        self._program = id(program), program.f_code

    def _is_inside(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code is _CALL and id(vars(frame.f_locals["self"]).get("_forward_pre_hooks")) in self._hooks:
                return True
            if frame.f_code is self._program[1] and self._is_program(frame):
                return True
            frame = frame.f_back
        return False

    def _is_program(self, frame: FrameType) -> bool:
        """Models of one kind share code, and a frame may lie where one was before. What calls the operators by itself
        has the token until the last call. Inductor's cpp_wrapper does not: only the address tells its frames apart."""
        if "arrive" not in frame.f_code.co_names:
            return id(frame) == self._program[0]
        return any(type(each) is Tensor and _is_same(each, self._token) for each in frame.f_locals.values())


def entering(turn: Turn) -> Callable[[nn.Module, Any], None]:
    """A hook for modules in which passes begin, before any that waits. In compiled ones the operators ask."""
    is_compiled, here = compiler.is_compiling, threading.get_ident

    def enter(module: nn.Module, args: Any) -> None:
        if not is_compiled() and turn.thread != here():
            turn.take()

    return enter

# SPDX-License-Identifier: Apache-2.0
"""A module in a block is called without the block, which alone waits for the weights of both: refused.

Some models do so in every pass (diffusers' DiT asks its first block's embedding once more at the end), and would read
whatever the window holds by then. Such a program shows it soon, so each block looks at two passes, and costs nothing
from then on. Not seen: what is compiled by then.

Knows modules and hooks; nothing of series.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import compiler, nn

from .compiled import refuse_exporting, register_first
from .refusals import Refused

_PASSES = 2  # in which a block is looked at: what is called after the last block comes before the second


class Compiled:
    """Whether any block of a model has been: then parts of it may run for themselves, and nothing tells where."""

    seen = False


class Outside:
    """Looks at one @block that waits for the weights of modules in it, until remove."""

    def __init__(self, block: nn.Module, name: str, parts: Mapping[nn.Module, str], compiled: Compiled) -> None:
        self._name = name
        self._parts = parts
        self._compiled = compiled
        self._entered = self._passes = 0
        self._handles: list[Any] = [
            register_first(block, self._enter),
            block.register_forward_hook(self._leave),
            *(register_first(part, self._look) for part in parts),
        ]

    def _enter(self, block: nn.Module, args: Any) -> None:
        if compiler.is_compiling():
            self._compiled.seen = True
        else:
            self._entered += 1

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        if compiler.is_compiling():
            return
        self._entered -= 1
        self._passes += 1
        if self._passes == _PASSES:
            self.remove()

    def _look(self, part: nn.Module, args: Any) -> None:
        if not compiler.is_dynamo_compiling():
            refuse_exporting()
        if compiler.is_compiling() or self._compiled.seen or self._entered:
            return
        if torch._C._current_graph_task_id() != -1:
            return  # what is computed again in a backward pass is refused by gradients
        self._passes = 0  # the program may catch this and make the pass again, which is refused again
        raise Refused(
            f"{self._parts[part]} was called without {self._name}, which waits for the weights of both: it would "
            f"read what the window holds by then. Leave {self._name} out of what is shared (choose the other layers), "
            f"or choose modules in the layers with scope='linear', where each waits for its own weights"
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def outside(waiting: Mapping[nn.Module, Iterable[nn.Module]], names: Mapping[nn.Module, str]) -> list[Outside]:
    """One for each module that waits for other modules' weights: @waiting says for whose."""
    found, compiled = [], Compiled()
    for block, owners in waiting.items():
        parts = {owner: names[owner] for owner in owners if owner is not block}
        if parts:
            found.append(Outside(block, names[block], parts, compiled))
    return found

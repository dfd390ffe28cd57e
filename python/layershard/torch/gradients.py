# SPDX-License-Identifier: Apache-2.0
"""Gradients through shared weights are refused: a backward pass would read a window that holds another layer by then.

Wherever the wish comes from (an input, at any depth; an adapter in the block; a tensor that a module captured): what a
backward pass will read, autograd saves in the forward pass, and has hooks for that. While a module that waits runs in
grad mode, a shared weight that is about to be saved is refused by name. What is not saved is not read: an adapter
beside a frozen layer stays allowed. Layers that this rank stores are refused, too: all ranks fail in one place.

Some reads pass those hooks by. Functions of the program's may keep a weight in an attribute, so the module's part of
the graph is looked through for them. What runs a part of a module again in a backward pass (checkpointing inside a
block) is refused then. torch.func has no such hooks, and compilers ask none: there any gradient of a result is refused.

Nothing is asked where grad mode is off. Knows autograd and memory; nothing of series or windows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import compiler, nn

from .containers import tensors_in
from .grouping import Place
from .refusals import Refused

_autograd: Any = torch._C._autograd

_WANTED = (
    "a gradient is wanted through {what}: a backward pass would read the weights again, when their window holds "
    "another layer. Run the pass in torch.inference_mode() or torch.no_grad(); to train, detach() first"
)
_WRITTEN = (
    "one of the tensors needed for a gradient was modified in place after it had been saved: {shape}, at version "
    "{now}, expected {then}"
)


def _memory_of(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of a subclass that has none, or of a tracer
        return 0


def _keep(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """As autograd keeps it, which looks at versions no more where there are hooks."""
    return tensor.detach(), tensor._version


def _give(kept: tuple[torch.Tensor, int]) -> torch.Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(_WRITTEN.format(shape=list(tensor.shape), now=tensor._version, then=version))
    return tensor


def refuse_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What a module is given directly it computes from, as good as always: told before anything is fetched."""
    for each in (*args, *kwargs.values()):
        if isinstance(each, torch.Tensor) and each.requires_grad:
            raise Refused(_WANTED.format(what=f"a {type(module).__name__} whose weights are shared by layershard"))


def refuse_results(module: nn.Module, results: Iterable[torch.Tensor]) -> None:
    """Where nobody tells what is saved."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in results):
        what = f"a {type(module).__name__} whose weights are shared by layershard (compiled, or in torch.func)"
        raise Refused(_WANTED.format(what=what))


class Saving:
    """Of one module that computes from @places. begin and end stand round its forward, where grad mode is on."""

    def __init__(self, module: nn.Module, places: Sequence[Place]) -> None:
        self._names = {_memory_of(place.tensor): f"{place.name}, which is shared by layershard" for place in places}
        self._module = module
        self._inner = [owner for owner in dict.fromkeys(place.owner for place in places) if owner is not module]
        self.inside: list[int] = []  # threads that run the module in grad mode
        self._handles: list[Any] = []

    def _refuse(self, tensor: torch.Tensor) -> None:
        name = self._names.get(_memory_of(tensor))
        if name is not None:
            raise Refused(_WANTED.format(what=name))

    # ---- Round a forward ----

    def begin(self) -> None:
        """Of several hooks autograd asks the innermost only: those of the program are asked by these."""
        self._watch()
        self.inside.append(threading.get_ident())
        if not _autograd._saved_tensors_hooks_is_enabled():
            return
        keep, give = _autograd._top_saved_tensors_default_hooks(False) or (_keep, _give)

        def pack(tensor: torch.Tensor) -> Any:
            self._refuse(tensor)
            return keep(tensor)

        _autograd._push_saved_tensors_default_hooks(pack, give)

    def leave(self) -> None:
        """Of what was not begun nothing is ended."""
        if threading.get_ident() in self.inside:
            self.inside.remove(threading.get_ident())
            if _autograd._saved_tensors_hooks_is_enabled():
                _autograd._pop_saved_tensors_default_hooks()

    def end(self, given: Any, output: Any) -> None:
        """Before leave, with what the forward has returned."""
        results = [each for each in tensors_in(output) if each.requires_grad]
        if not _autograd._saved_tensors_hooks_is_enabled():
            refuse_results(self._module, results)
        self._refuse_kept(results, tensors_in(given))

    # ---- What hooks do not tell ----

    def _refuse_kept(self, results: Iterable[torch.Tensor], given: Iterable[torch.Tensor]) -> None:
        """In the graph between what the module was given and its results."""
        seen = {each.grad_fn for each in given}
        nodes: list[Any] = [each.grad_fn for each in results]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [each for each, _ in node.next_functions]
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                for tensor in tensors_in(vars(node)):
                    self._refuse(tensor)

    # ---- Hooks of modules ----

    def _watch(self) -> None:
        """From the first pass in grad mode on. A hook that is called after an exception, too, keeps dynamo from using
        one graph for several blocks, so it is not there before."""
        if not self._handles:
            self._handles = [each.register_forward_pre_hook(self._refuse_again) for each in self._inner]
            self._handles.append(self._module.register_forward_hook(self._leave, always_call=True))

    def _leave(self, *_args: Any) -> None:
        if not compiler.is_compiling():
            self.leave()

    def _refuse_again(self, module: nn.Module, args: Any) -> None:
        if compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        if torch.is_grad_enabled() and threading.get_ident() not in self.inside:
            what = f"a {type(module).__name__} that a backward pass runs again by itself (checkpointing in its block)"
            raise Refused(_WANTED.format(what=what))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

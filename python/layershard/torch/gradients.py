# SPDX-License-Identifier: Apache-2.0
"""Gradients through shared weights are refused: a backward pass would read a window that holds another layer by then.

Wherever the wish comes from (an input, at any depth; an adapter in the block; a tensor that a module captured): what a
backward pass will read, autograd saves in the forward pass, and has hooks for that. While a module that waits runs in
grad mode, a shared weight that is about to be saved is refused by name. What is not saved is not read: an adapter
beside a frozen layer stays allowed. Layers that this rank stores are refused, too: all ranks fail in one place.

Some reads pass those hooks by. Hooks of the program's inside a module are asked in place of these, which look at what
they keep. Functions of the program's may keep a weight in an attribute, so the module's part of the graph is looked
through for them. What runs a part of a module again in a backward pass (checkpointing inside a block) is refused then.
torch.func has no such hooks, and compilers ask none: there any gradient of a result is refused.

Nothing is asked where grad mode is off. Knows autograd and memory; nothing of series or windows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import compiler, nn
from torch.autograd.graph import saved_tensors_hooks

from .containers import tensors_in
from .grouping import Place
from .memory import address_of
from .noticing import Watch
from .parts import parts_of
from .refusals import Refused

HookAfter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
_Begun = tuple[int | None, Any]  # autograd's last node by then, None where it asks no hooks; and round which one

_autograd: Any = torch._C._autograd
_Tensor = torch.Tensor
last_node = _autograd._get_sequence_nr  # a number that rises with each node of a graph that this thread makes
_hooks_are_enabled, _top_hooks = _autograd._saved_tensors_hooks_is_enabled, _autograd._top_saved_tensors_default_hooks
_push_hooks = _autograd._push_saved_tensors_default_hooks
_pop_hooks = _autograd._pop_saved_tensors_default_hooks

_WANTED = (
    "a gradient is wanted through {what}: a backward pass would read the weights again, when their window holds "
    "another layer. Run the pass in torch.inference_mode() or torch.no_grad(); to train, detach() first"
)
_WRITTEN = (
    "one of the tensors needed for a gradient was modified in place after it had been saved: {shape}, at version "
    "{now}, expected {then}"
)


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
    for each in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(each, _Tensor) and each.requires_grad:
            raise Refused(_WANTED.format(what=f"a {type(module).__name__} whose weights are shared by layershard"))


def refuse_results(module: nn.Module, results: Iterable[torch.Tensor]) -> None:
    """Where nobody tells what is saved."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in results):
        what = f"a {type(module).__name__} whose weights are shared by layershard (compiled, or in torch.func)"
        raise Refused(_WANTED.format(what=what))


def _has_graph(output: Any) -> bool:
    return any(each.requires_grad for each in tensors_in(output))


_all: weakref.WeakValueDictionary[int, Saving] = weakref.WeakValueDictionary()


def _enter(hooks: saved_tensors_hooks) -> None:
    """The program's own hooks in a module, in any thread: of several autograd asks these, and none that are outside."""
    pack, reads_again = hooks.pack_hook, type(hooks).__module__ == "torch.utils.checkpoint"
    if not compiler.is_compiling():
        for saving in [each() for each in _all.valuerefs()]:
            if saving is not None and saving.inside:
                pack = saving.pack_inside(pack, reads_again)
    _autograd._push_saved_tensors_default_hooks(pack, hooks.unpack_hook)


saved_tensors_hooks.__enter__ = _enter  # type: ignore[method-assign]


class Saving:
    """Of one module that computes from @places. begin and end stand round its forward, where grad mode is on."""

    def __init__(self, module: nn.Module, places: Sequence[Place], watch: Watch | None = None) -> None:
        self._names = {address_of(place.tensor): f"{place.name}, which is shared by layershard" for place in places}
        self._module, self._watch = module, watch
        self.has_parts = any(place.path for place in places)  # weights that wrap others
        self.number = 0  # the last node's when the module began without gradients
        self._inner = [owner for owner in dict.fromkeys(place.owner for place in places) if owner is not module]
        self.inside: dict[int, _Begun] = {}  # by the thread that runs the module in grad mode
        self._own_pack = self._pack_before(_keep)
        self._after: HookAfter | None = None
        self._handles: list[Any] = []
        self._is_always_called = self._is_graph_made = False
        _all[id(self)] = self

    def _refuse(self, tensor: torch.Tensor) -> None:
        for each in [part for _, part in parts_of(tensor)] if self.has_parts else (tensor,):
            address = address_of(each)
            if address and address in self._names:
                raise Refused(_WANTED.format(what=self._names[address]))

    def _pack_before(self, keep: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def pack(tensor: torch.Tensor) -> Any:
            self._refuse(tensor)
            return keep(tensor)

        return pack

    def pack_inside(self, keep: Callable[[torch.Tensor], Any], reads_again: bool) -> Callable[[torch.Tensor], Any]:
        """Before hooks of the program's in the module: what they keep must be no shared weight. Checkpointing's keep
        nothing, and read it again."""

        def pack(tensor: torch.Tensor) -> Any:
            kept = keep(tensor)
            for each in tensors_in(tensor if reads_again else kept):
                self._refuse(each)
            return kept

        return pack

    # ---- Round a forward ----

    def begin(self) -> None:
        """Of several hooks autograd asks the innermost only: those of the program are asked by these."""
        if not self._is_always_called:
            self._call_always()
        thread, number = get_ident(), None
        if _hooks_are_enabled():
            theirs = _top_hooks(False)
            if theirs is None:
                _push_hooks(self._own_pack, _give)
            else:
                _push_hooks(self._pack_before(theirs[0]), theirs[1])
            number = last_node()
        self.inside[thread] = number, self.inside.get(thread)

    def end(self, given: Any, output: Any) -> None:
        """Of what was not begun in this thread nothing is ended. @output: what the forward has returned; None also
        where it has not. Nothing more is looked at where it made no part of a graph: numbers tell of this thread's,
        and results of those of threads that the module started."""
        begun = self.inside.pop(get_ident(), None)
        if begun is None:
            return
        number, outer = begun
        if outer is not None:
            self.inside[get_ident()] = outer
        if number is not None:
            _pop_hooks()
        if number != last_node() or (output.requires_grad if type(output) is _Tensor else _has_graph(output)):
            self.look(given, output, are_told=number is not None)

    def look(self, given: Any, output: Any, are_told: bool = True) -> None:
        """Where a part of a graph was made. What nobody has told, in another thread or where gradients were turned on
        inside, autograd refuses when a backward pass asks for it: it takes the weights for written from here on."""
        self._watch_again()
        if self._watch is not None:
            self._watch.count()
        results = [each for each in tensors_in(output) if each.requires_grad]
        if not are_told:
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
                self._refuse_of(node)

    def _refuse_of(self, node: Any) -> None:
        """Tensors in its attributes, and in modules there. What reentrant checkpointing runs is asked when it runs."""
        kept = vars(node)
        modules = [[each._parameters, each._buffers] for each in kept.values() if isinstance(each, nn.Module)]
        for tensor in tensors_in([kept, modules]):
            self._refuse(tensor)
        if callable(kept.get("run_function")):
            node.run_function = self._watched(node.run_function)

    def _watched(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def again(*args: Any) -> Any:
            keep, give = _top_hooks(False) or (_keep, _give)
            _push_hooks(self._pack_before(keep), give)
            try:
                return run(*args)
            finally:
                _pop_hooks()

        return again

    # ---- Hooks of modules ----

    def attach(self, after: HookAfter) -> None:
        """The module's hook that calls end."""
        self._after = after
        self._handles.append(self._module.register_forward_hook(after, with_kwargs=True))

    def _call_always(self) -> None:
        """From the first pass in grad mode on, and after all hooks there are by then. A hook that is called after an
        exception, too, keeps dynamo from using one graph for several blocks, so it is no such one before."""
        self._is_always_called = True
        if self._after is not None:
            self._handles.pop().remove()
            again = self._module.register_forward_hook(self._after, with_kwargs=True, always_call=True)
            self._handles.append(again)

    def _watch_again(self) -> None:
        """From the first graph on: without one there is no backward pass."""
        if not self._is_graph_made:
            self._is_graph_made = True
            self._handles += [each.register_forward_pre_hook(self._refuse_again) for each in self._inner]

    def _refuse_again(self, module: nn.Module, args: Any) -> None:
        if compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        if torch.is_grad_enabled() and get_ident() not in self.inside:
            what = f"a {type(module).__name__} that a backward pass runs again by itself (checkpointing in its block)"
            raise Refused(_WANTED.format(what=what))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

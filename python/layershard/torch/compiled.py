# SPDX-License-Identifier: Apache-2.0
"""What torch.compile, tracers and exporters made, or are making, of a model whose hooks come and go.

Knows torch's compilers; nothing of series or windows.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .refusals import Refused

_log = logging.getLogger("layershard")

_OUTLIVES = (
    "{how} makes a program that would compute with whatever passes through a window: make it from a "
    "copy of the model before sharding (copy.deepcopy), or after detach(), which gives the whole weights back"
)


def whole(model: nn.Module) -> nn.Module:
    """The model itself where torch.compile has wrapped it."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def _guard_hooks() -> None:
    config: Any = sys.modules["torch._dynamo"].config
    config.skip_nnmodule_hook_guards = False


def forget_compiled() -> bool:
    """Dynamo does not look whether hooks have come or gone: what it has compiled so far is compiled anew when it is
    called next. It cannot be told to forget one model's graphs only. Whether there was anything. From now on, for all
    models, it does look whether a module without hooks still has none: what it compiles for a model that is not sharded
    would else be run for a sharded one of the same class."""
    if not any(isinstance(each, _WithCompiler) and each.function is _guard_hooks for each in sys.meta_path):
        _WithCompiler(_guard_hooks)
    frames = sys.modules.get("torch._dynamo.convert_frame")  # nothing was compiled where it has not been imported
    if frames is not None and frames.input_codes.seen:
        _log.info("torch.compiler.reset(): what was compiled before knows nothing of hooks that have come or gone")
        torch.compiler.reset()
        return True
    return False


def register_first(module: nn.Module, hook: Callable[..., Any], with_kwargs: bool = False) -> RemovableHandle:
    """A hook before every other one that there is. Dynamo's guards find a hook by its place among the dict's keys, and
    torch's prepend changes only the order in which the OrderedDict itself gives them: the others are put in again
    behind it. Guards are then of the hook that they were made for; torch 2.11 fails to make those of methods else."""
    handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=with_kwargs)
    hooks = module._forward_pre_hooks
    others = list(hooks)[1:]
    hooks.update(zip(others, map(hooks.pop, others), strict=True))  # one call, no Python: a pass beside it misses none
    return handle


def refuse_exporting() -> None:
    """What is exported has weights and addresses of this process in it, and runs in another one."""
    if torch.compiler.is_exporting():
        raise Refused(_OUTLIVES.format(how="torch.export"))


def refuse_scripting() -> nn.Module:
    raise Refused(_OUTLIVES.format(how="torch.jit.script"))


def refuse_made_by_trace() -> None:
    raise Refused(_OUTLIVES.format(how="torch.jit.trace"))


def refuse_tracing() -> None:
    """Where a module is run to be recorded, by something that does not record the calls of its hooks."""
    refuse_exporting()
    if torch._C._is_tracing():
        refuse_made_by_trace()
    symbolic_trace: Any = torch.fx._symbolic_trace  # torch 2.11 has no types there
    if symbolic_trace.is_fx_symbolic_tracing():
        raise Refused(_OUTLIVES.format(how="torch.fx.symbolic_trace"))


def is_recording() -> bool:
    """Whether torch.compile, torch.export or make_fx records operators: the library's calls are to be among them."""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or _is_proxied()


def _is_proxied() -> bool:
    """make_fx hands on tensors that write down what is done with them."""
    depth, kind = torch._C._len_torch_dispatch_stack(), torch._C._TorchDispatchModeKey.PROXY
    return depth > 0 and torch._C._get_dispatch_mode(kind) is not None


class Eager:
    """Inside, what torch.compile made, or makes, runs in eager mode. What must not be broken up would fail where it
    meets a mode that sees operators."""

    def __init__(self) -> None:
        self._stance: contextlib.AbstractContextManager[None] | None = None
        self._is_inside = False

    def __enter__(self) -> None:
        self._is_inside = True
        self._waiting = _WithCompiler(self._set)

    def __exit__(self, *error: Any) -> None:
        self._is_inside = False
        self._waiting.cancel()
        if self._stance is not None:
            self._stance.__exit__(*error)

    def _set(self) -> None:
        if self._is_inside:  # another thread may have been at its import for long
            self._stance = torch.compiler.set_stance("force_eager")


class _WithCompiler:
    """Calls @function now, or as soon as Dynamo has been imported: that takes seconds, and may never be needed."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        if "torch._dynamo" in sys.modules:
            function()
        else:
            sys.meta_path.insert(0, self)

    def cancel(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Asked wherever modules are looked for."""
        if name != "torch._dynamo":
            return None
        self.cancel()
        spec = find_spec(name)  # may be another one's of this class
        loader: Any = spec and spec.loader
        load = loader.exec_module

        def load_and_call(module: ModuleType) -> None:
            load(module)
            self.function()

        loader.exec_module = load_and_call
        return spec

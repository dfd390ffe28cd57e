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


def forget_compiled() -> bool:
    """Dynamo does not look whether hooks have come or gone: what it has compiled so far is compiled anew when it is
    called next. It cannot be told to forget one model's graphs only. Whether there was anything."""
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
    meets a mode that sees operators. The compiler is not imported for that, which takes seconds, but may be inside."""

    def __init__(self) -> None:
        self._stance: contextlib.AbstractContextManager[None] | None = None
        self._is_inside = False

    def __enter__(self) -> None:
        self._is_inside = True
        if "torch._dynamo" in sys.modules:
            self._set()
        else:
            sys.meta_path.insert(0, self)

    def __exit__(self, *error: Any) -> None:
        self._is_inside = False
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self._stance is not None:
            self._stance.__exit__(*error)

    def _set(self) -> None:
        self._stance = torch.compiler.set_stance("force_eager")

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Asked wherever modules are looked for: sets the stance as soon as the compiler has been imported."""
        if name != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        loader: Any = spec and spec.loader
        load = loader.exec_module

        def load_and_set(module: ModuleType) -> None:
            load(module)
            if self._is_inside:  # another thread may have been at it for long
                self._set()

        loader.exec_module = load_and_set
        return spec

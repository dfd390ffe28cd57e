# SPDX-License-Identifier: Apache-2.0
"""What is refused, found before anything in the model is replaced.

Knows torch's modules and the marks that other libraries leave on them; nothing of ranks or series.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .parts import part, parts_of

Named = tuple[str, torch.Tensor]


class Refused(ValueError):
    """The model or the call cannot be sharded; the text says why. Nothing was changed."""


class Guarded(RuntimeError):
    """It would change shared weights, or copy what is only passing through; the text says what to do instead."""


def all_tensors(model: nn.Module) -> Iterable[Named]:
    """Every parameter and buffer under every name it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _memory_of(tensor: torch.Tensor) -> tuple[str, int]:
    """Equal for two tensors that share memory."""
    plain = tensor.device.type != "meta" and tensor.layout is torch.strided
    if not plain or is_traceable_wrapper_subclass(tensor) or not tensor.untyped_storage().nbytes():
        return "object", id(tensor)
    return "storage", tensor.untyped_storage().data_ptr()


def refuse_freezing() -> None:
    """Frozen weights are packed into copies of their own, which neither arrive nor change with the library's."""
    config = sys.modules.get("torch._inductor.config")  # to import it takes seconds and 100 MB
    if os.environ.get("TORCHINDUCTOR_FREEZING") == "1" if config is None else config.freezing:
        raise Refused("torch._inductor.config.freezing is on; its copies of weights would not be shared: set it False")


def refuse_no_module(model: object, call: str) -> None:
    """Most often arguments in another order."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{call}: model is of type {type(model).__name__}; give a torch.nn.Module")


def refuse_hooked(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise Refused(
                f"{name or 'the model'} has accelerate's hooks (device_map or offloading), which move weights by "
                f"themselves: load without device_map, or accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )


_OTHERS = ("torch.distributed.", "torch.nested.")  # each rank's is a part of its own; lengths that torch numbers
_MOVING = ("layerwise_casting", "group_offloading")  # hooks of diffusers


def refuse_casting(model: nn.Module, chosen: Iterable[Named]) -> None:
    """diffusers' hooks that convert or move a module's weights round each of its forwards, on a module or above it."""
    for above, module in model.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        kinds = [kind for kind in _MOVING if kind in hooks]
        inside = [name for name, _ in chosen if not above or name.startswith(f"{above}.")] if kinds else []
        if inside:
            raise Refused(
                f"{above or 'the model'} has diffusers' hook '{kinds[0]}', which replaces {inside[0]} round each "
                f"forward: leave what is to be shared out of it (skip_modules_pattern), or do without it"
            )


def refuse_tied(model: nn.Module, chosen: Iterable[Named]) -> None:
    names: dict[tuple[str, int], list[str]] = {}
    for name, tensor in all_tensors(model):
        for path, each in parts_of(tensor):
            names.setdefault(_memory_of(each), []).append(".".join((name, *path)))
    for name, tensor in chosen:
        others = [other for other in names[_memory_of(tensor)] if other != name]
        if others:
            raise Refused(
                f"{name} is tied to {others[0]}: one tensor cannot be fetched with a layer and stay for the "
                f"other name. Leave both out of the patterns, or untie them"
            )


def refuse_strange(chosen: Iterable[Named]) -> None:
    for name, tensor in chosen:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise Refused(f"{name} is sparse or quantized by torch; only plain strided tensors can be shared")
        if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise Refused(f"{name} is an expanded tensor, whose elements share memory: make it contiguous first")


def refuse_wrapping(wholes: Iterable[Named]) -> None:
    """Of what a module has under a name. One that wraps tensors is shared by these."""
    for name, tensor in wholes:
        if tensor.grad is not None:
            raise Refused(f"{name} has a gradient: shared weights are for inference; set its .grad to None first")
        if not is_traceable_wrapper_subclass(tensor):
            continue
        kind = type(tensor)
        if kind.__module__.startswith(_OTHERS):
            raise Refused(f"{name} is a {kind.__name__}, which is not plain memory: leave it out")
        if tensor.device.type == "meta":
            raise Refused(f"{name} is a {kind.__name__} on the meta device: shard the model when its weights are there")
        if any(part(tensor, path) is not each for path, each in parts_of(tensor)):
            raise Refused(f"{name} is a {kind.__name__}, which makes its parts anew when asked: leave it out")


def keeps_statistics(module: nn.Module) -> bool:
    """Whether it writes to its buffers when it runs in train mode."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats


def refuse_training(buffers: Iterable[tuple[str, nn.Module]]) -> None:
    """In train mode a batch norm writes its statistics in every pass, to memory that is read-only by then."""
    for name, owner in buffers:
        if keeps_statistics(owner) and owner.training:
            raise Refused(
                f"a {type(owner).__name__} in train mode writes to {name}, which is to be shared: call model.eval() "
                f"first, or leave it out of buffers"
            )


def refuse_lazy(model: nn.Module) -> None:
    """Parameters and buffers that get their shapes in the first pass."""
    for name, tensor in all_tensors(model):
        if nn.parameter.is_lazy(tensor):
            raise Refused(f"{name} has no shape before the first pass: make one pass, then shard the model")


def refuse_renormed(places: Iterable[tuple[str, nn.Module]]) -> None:
    """An embedding with max_norm shortens rows of its weight in its forward, in memory that is read-only by then."""
    for name, owner in places:
        max_norm = owner.max_norm if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) else None
        if max_norm is not None:
            raise Refused(
                f"{name} is written by every pass: its {type(owner).__name__} has max_norm={max_norm}. Shorten all "
                f"rows once, with weight.data.renorm_({owner.norm_type}, 0, {max_norm}), and set its max_norm to None; "
                f"or leave it out of the patterns"
            )


def refuse_own_copies(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """bitsandbytes' Linear8bitLt multiplies by state.CB, which it makes from its weight and keeps beside it."""
    for chosen, module in modules:
        for name, each in module.named_modules(prefix=chosen):
            if hasattr(getattr(each, "state", None), "CB"):
                raise Refused(
                    f"{name} is a {type(each).__name__}, which computes from a copy of its own (state.CB) and not from "
                    f"its weight: nothing would be saved; leave it out of the patterns"
                )


def refuse_cut_up(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """FullyShardedDataParallel, made before, lets parameters show what it has of them."""
    for chosen, module in modules:
        for name, tensor in module.named_parameters(prefix=chosen):
            if getattr(tensor, "_fsdp_flattened", False):
                raise Refused(
                    f"{name} is part of a FullyShardedDataParallel, which has cut it up between the ranks already: "
                    f"shard the model first and wrap it then, which leaves out what is shared"
                )


def refuse_before_change(model: nn.Module, chosen: list[Named]) -> None:
    """Every check that needs no other rank."""
    refuse_freezing()
    refuse_hooked(model)
    refuse_casting(model, chosen)
    refuse_strange(chosen)
    refuse_tied(model, chosen)

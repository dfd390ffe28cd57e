# SPDX-License-Identifier: Apache-2.0
"""Weights that a kernel's library packed into memory of its own: no tensors of their module, or none with a storage.

Knows torch's quantised and oneDNN modules, and bitsandbytes' marks; nothing of ranks or series.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .refusals import Refused


def _is_packed(module: nn.Module) -> bool:
    if any(tensor is not None and tensor.is_mkldnn for tensor in module._buffers.values()):
        return True
    is_compiled = isinstance(module, torch.jit.ScriptModule)  # it is such an object all over
    return not is_compiled and any(isinstance(value, torch.ScriptObject) for value in vars(module).values())


def is_packed(module: nn.Module) -> bool:
    """Whether it computes from packed weights alone: there is no parameter in it."""
    return next(module.parameters(), None) is None and any(map(_is_packed, module.modules()))


def why_whole(name: str, module: nn.Module) -> str:
    """Why nothing of it can be shared."""
    kind = module._get_name()  # type: ignore[no-untyped-call]
    return (
        f"{name} is a {kind} whose weights are packed (quantised by torch, or oneDNN's) and not "
        f"tensors of the module: every rank holds them whole"
    )


def packed_bytes(path: str, module: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and size of what one module has packed, where torch tells them."""
    for key, tensor in module._buffers.items():
        if tensor is not None and tensor.is_mkldnn:
            yield f"{path}.{key}", tensor.numel() * tensor.element_size()
    if type(module).__module__.startswith("torch.ao.nn.quantized"):
        weight = getattr(module, "weight", None)
        value = weight() if callable(weight) else None  # unpacks it
        if isinstance(value, torch.Tensor):
            yield f"{path}.weight", value.numel() * value.element_size()


def refuse_repacked(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """bitsandbytes' Linear4bit packs its weight anew for some processors, in its first pass and after a state_dict."""
    for chosen, module in modules:
        for name, each in module.named_modules(prefix=chosen):
            weight = getattr(each, "weight", None)
            is_done = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
            on_host = isinstance(weight, torch.Tensor) and weight.device.type == "cpu"
            will_be = on_host and getattr(each, "support_avx512bf16_for_cpu", False)
            if is_done or will_be:
                raise Refused(
                    f"{name} is a {type(each).__name__} that packs its weight for this processor, in memory of its own "
                    f"and anew whenever it likes: nothing would be saved. Set support_avx512bf16_for_cpu = False on "
                    f"all such modules before their first pass, or leave them out of the patterns"
                )

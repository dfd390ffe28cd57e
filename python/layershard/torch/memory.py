# SPDX-License-Identifier: Apache-2.0
"""The library's memory as torch tensors of bytes; nothing is copied.

Knows addresses and devices; nothing of modules or of what the bytes mean.
"""

from __future__ import annotations

import ctypes

import torch
import torch.utils.dlpack

from ..series import Series


class _DeviceBytes:
    """Device memory as torch.as_tensor takes it from other libraries."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory that the caller keeps alive: what a callback of the library was given, or a stripe."""
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
    return torch.as_tensor(_DeviceBytes(address, nbytes), device=device)


def bytes_of(series: Series, layer: int, tensor: int, nbytes: int, *, writable: bool = False) -> torch.Tensor:
    """A layer's tensor where it is found after wait. Holds the series' memory as long as anybody looks at it."""
    found: torch.Tensor = torch.utils.dlpack.from_dlpack(series.view(layer, tensor, (nbytes,), "uint8", writable))
    return found


@torch.inference_mode(False)
def zeros_at(count: int, alignment: int, device: torch.device) -> torch.Tensor:
    """Bytes of torch's allocator at a multiple of @alignment; no more of them than need be."""
    block = torch.empty(count, dtype=torch.uint8, device=device)
    if block.data_ptr() % alignment:
        del block
        block = torch.empty(count + alignment, dtype=torch.uint8, device=device)
        first = -block.data_ptr() % alignment
        block = block[first : first + count]
    return block.zero_()


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage as a storage of its own, by which who looks there can be told from others."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    found: torch.Tensor = torch.utils.dlpack.from_dlpack(torch._C._to_dlpack(raw))
    return found


def address_of(tensor: torch.Tensor) -> int:
    """Of its storage; 0 where it has none, or an empty one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of a subclass that has none, or of a tracer
        return 0


def release_freed_memory() -> None:
    """Let the C library return to the system what has been freed: it keeps large parts of it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

# SPDX-License-Identifier: Apache-2.0
"""Shards and windows in memory of torch's allocator, so that what torch counts and says of memory is all of it.

Knows torch's allocator and which transports take the caller's memory; nothing of layers.
"""

from __future__ import annotations

import torch

from ..errors import NotSupported
from ..group import Group
from ..memory_source import MemorySource, Purpose
from ..planning import transports
from .device import TorchDevice
from .memory import zeros_at

MEMORY = {"library": 0, "torch": 1}


class TorchMemory:
    """A layershard.MemorySource. The device is awaited first for what had the memory before, and last for what still
    reads it: in between other streams use it than torch knows of."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: dict[int, torch.Tensor] = {}

    def _await_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def allocate(self, _purpose: Purpose, count: int, alignment: int) -> int:
        block = zeros_at(count, alignment, self._device)
        self._await_device()
        self._blocks[block.data_ptr()] = block
        return block.data_ptr()

    def release(self, _purpose: Purpose, address: int) -> None:
        self._await_device()
        del self._blocks[address]


def kind_of(group: Group) -> str:
    """The transport of a group without wrappers and options: "shm" of "trace=run.json,shm:copy (asked for)"."""
    return group.transport.split(" (")[0].rsplit(",", 1)[-1].split(":")[0]


def source_for(group: Group, memory: str, device: torch.device) -> MemorySource | None:
    """What the series of this group get their memory from; None where that is the library, or torch already."""
    kind = kind_of(group)
    is_torchs = kind == "callback" and isinstance(getattr(group.callbacks, "device", None), TorchDevice)
    if memory == "library" or is_torchs:
        return None
    carried = {each.name: each for each in transports()}
    if kind in carried and not carried[kind].caller_memory:
        others = ", ".join(name for name, each in carried.items() if each.caller_memory)
        raise NotSupported(
            f"memory='torch' cannot be had with transport {kind}, whose ranks read each other's layers in memory that "
            f"the library itself shares between processes: leave it out, or take a transport that carries layers in "
            f"memory of torch's ({others})",
            rank=group.rank,
        )
    return TorchMemory(device)

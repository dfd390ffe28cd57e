# SPDX-License-Identifier: Apache-2.0
"""What each rank of a sharded model says, told to all of them by the library's own means, whatever the transport.

Knows a group and bytes: a series of one layer a rank, which every rank keeps whole.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from ..group import Group
from ..series import ALL, Tensor
from .memory import bytes_at

_BYTES = 16384
_LONGEST_TEXT = 1000


def exchange(group: Group, device: torch.device, word: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's word, in rank order: collective. Waits for the others as long as any call of the group."""
    mine = json.dumps(_cut(word)).encode()
    if len(mine) > _BYTES:
        mine = json.dumps({"text": f"{len(mine)} bytes are too many to tell the other ranks"}).encode()

    def write(_layer: int, addresses: list[int]) -> None:
        bytes_at(addresses[0], _BYTES, device).copy_(torch.frombuffer(bytearray(mine.ljust(_BYTES)), dtype=torch.uint8))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    tensors = [Tensor("word", _BYTES)]
    with group.series(
        "layershard.torch.words", first_layer=0, layer_count=group.size, tensors=tensors, resident_bytes=ALL
    ) as words:
        words.commit(write)
        found = [bytes_at(words.address(rank, 0), _BYTES, device).cpu() for rank in range(group.size)]
        return [json.loads(bytes(each.tolist())) for each in found]


def _cut(word: dict[str, Any]) -> dict[str, Any]:
    return {key: value[:_LONGEST_TEXT] if isinstance(value, str) else value for key, value in word.items()}

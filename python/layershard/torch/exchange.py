# SPDX-License-Identifier: Apache-2.0
"""One record of each rank of a sharded model, given to all of them by the library's own means, whatever the transport.

Knows a group and bytes: a series of one layer a rank, which is resident on every rank.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from ..group import Group
from ..series import ALL, Tensor
from .memory import bytes_at

_BYTES = 16384
_HEAD = 8  # bytes, of the length
_LONGEST_TEXT = 1000
_NAME = "layershard.torch.records"


def exchange(group: Group, device: torch.device, record: dict[str, Any], name: str = _NAME) -> list[dict[str, Any]]:
    """Every rank's record, in rank order: collective. Waits for the others as long as any call of the group. What is
    too long on any rank, of many series, is given once more, whole. Ranks that make another call are told the @name. A
    rank that came back takes over what the others agreed on before: until it has, there is only its own record."""
    if group.catching_up:
        return [json.loads(json.dumps(_cut(record)))] * group.size
    text = json.dumps(_cut(record)).encode()
    mine = len(text).to_bytes(_HEAD, "little") + text
    found = _round(group, device, mine, _BYTES, name)
    needed = max(_HEAD + _length(each) for each in found)
    if needed > _BYTES:
        found = _round(group, device, mine, needed, name)
    return [json.loads(each[_HEAD : _HEAD + _length(each)]) for each in found]


def _length(filled: bytes) -> int:
    return int.from_bytes(filled[:_HEAD], "little")


def _round(group: Group, device: torch.device, mine: bytes, nbytes: int, name: str) -> list[bytes]:
    """The first @nbytes of each rank's."""

    def write(_layer: int, addresses: list[int]) -> None:
        filled = bytearray(mine[:nbytes].ljust(nbytes))
        bytes_at(addresses[0], nbytes, device).copy_(torch.frombuffer(filled, dtype=torch.uint8))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    tensors = [Tensor("record", nbytes)]
    with group.series(name, first_layer=0, layer_count=group.size, tensors=tensors, resident_bytes=ALL) as records:
        records.commit(write)
        found = [bytes_at(records.address(rank, 0), nbytes, device).cpu() for rank in range(group.size)]
        return [bytes(each.tolist()) for each in found]


def _cut(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value[:_LONGEST_TEXT] if isinstance(value, str) else value for key, value in record.items()}

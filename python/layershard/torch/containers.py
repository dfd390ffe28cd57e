# SPDX-License-Identifier: Apache-2.0
"""Tensors in what modules take and give: nested containers. Dynamo traces this."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers. An older dynamo knows no dataclasses.is_dataclass."""
    if isinstance(value, torch.Tensor):
        yield value
    elif value is None or isinstance(value, (bool, int, float, str)):
        return
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from tensors_in(each)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))

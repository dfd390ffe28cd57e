# SPDX-License-Identifier: Apache-2.0
"""What one tensor of a layer looks like in memory, and views of bytes that look like it.

Knows shapes, strides and dtypes; nothing of modules, ranks or series.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

NAME_LIMIT = 63  # the library's longest name of a series or a tensor


def short(name: str) -> str:
    """The name itself where the library takes it; else its tail and a hash, so that it stays unique."""
    if len(name) <= NAME_LIMIT:
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:8] + "~" + name[-(NAME_LIMIT - 9) :]


@dataclass(frozen=True)
class Layout:
    """Shape, strides and dtype of a tensor: enough to see the same tensor in other memory, bit for bit."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    within: str = ""  # what it is a part of, if it is

    @classmethod
    def of(cls, tensor: torch.Tensor, within: str = "") -> Layout:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, within)

    @property
    def elements(self) -> int:
        """Elements from the first to the last one in memory, holes included."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def is_plain(self) -> bool:
        """Rows one after another without holes: what can be cut by rows and columns."""
        return self.nbytes == torch.Size(self.shape).numel() * self.dtype.itemsize and self.stride == tuple(
            torch.empty(self.shape, device="meta").stride()
        )

    def view(self, raw: torch.Tensor) -> torch.Tensor:
        """The tensor in @raw, a flat uint8 tensor that begins where the tensor does."""
        return raw[: self.nbytes].view(self.dtype).as_strided(self.shape, self.stride)

    def empty(self, device: torch.device) -> torch.Tensor:
        """New memory of this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def ones(self, device: torch.device) -> torch.Tensor:
        """New memory of this layout, filled with ones where torch can: not with two packed into a byte."""
        tensor = self.empty(device)
        try:
            return tensor.fill_(1)
        except NotImplementedError:
            return tensor

    def __str__(self) -> str:
        text = f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"
        text = text if self.is_plain else f"{text} strides {list(self.stride)}"
        return f"{text} in {self.within}" if self.within else text

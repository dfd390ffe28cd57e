# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint by name, read from safetensors files. A file is opened when something in it is first needed.

Knows files; nothing of models. What is wrong is said by the file and the tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .hub_files import find, read_index
from .refusals import Refused


def _is_integer(dtype: str) -> bool:
    """Of a dtype as safetensors writes it: I8, U8, BOOL; F32, BF16, F8_E4M3, C64 are none."""
    return dtype.startswith(("I", "U", "BOOL"))


class Checkpoint:
    """What the files at a path hold, by name."""

    def __init__(self, path: Path, variant: str | None = None, files: str | Sequence[str] | None = None) -> None:
        self._open = ExitStack()
        self._files: dict[Path, tuple[Any, set[str]]] = {}
        found = find(path, variant, files)
        self.stem = found.stem
        self.variant = variant
        self.directory = found.files[0].parent
        self._said_by = f"{found.files[0]} says so" if found.is_index else ""
        self._where = read_index(found.files[0]) if found.is_index else self._list(found.files)

    def _list(self, files: Sequence[Path]) -> dict[str, Path]:
        where: dict[str, Path] = {}
        for file in files:
            for name in self._file(file)[1]:
                if where.setdefault(name, file) != file:
                    raise Refused(f"{name} is in both {where[name]} and {file}: say which files are meant by files=")
        return where

    def _file(self, path: Path) -> tuple[Any, set[str]]:
        """The open file, and what it holds."""
        from safetensors import SafetensorError, safe_open

        if path not in self._files:
            try:
                opened = self._open.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                size = f" ({path.stat().st_size} bytes)" if path.is_file() else ""
                raise Refused(f"{path}{size} is no whole safetensors file: {error}") from error
            self._files[path] = opened, set(opened.keys())
        return self._files[path]

    def names(self) -> Collection[str]:
        return self._where.keys()

    def _holding(self, name: str) -> Any:
        path = self._where[name]
        if not path.is_file():
            raise Refused(f"{name} is in {path}, {self._said_by}; there is no such file")
        opened, names = self._file(path)
        if name not in names:
            raise Refused(f"{name} is in {path}, {self._said_by}; the file has no such tensor")
        return opened

    def empty(self, name: str) -> torch.Tensor:
        """One of the tensor's shape, without memory: by the file's header alone."""
        return torch.empty(self._header(name)[1], device="meta")

    def refuse_unlike(self, name: str, like: torch.Tensor, *, shape_too: bool) -> None:
        """By the file's header alone. Values are converted to the model's dtype, but integers are no weights."""
        dtype, shape = self._header(name)
        holds_integers = not (like.dtype.is_floating_point or like.dtype.is_complex)
        is_other_kind = isinstance(like, nn.Parameter) and _is_integer(dtype) != holds_integers
        if is_other_kind or (shape_too and shape != list(like.shape)):
            raise Refused(
                f"{name} is {dtype} {shape} in {self._where[name]}, and {like.dtype} {list(like.shape)} in the model"
            )

    def is_byte_float(self, name: str) -> bool:
        """F8_E4M3 and the like: most of them are weights once they have been multiplied by a scale."""
        return self._header(name)[0].startswith(("F8", "F6", "F4"))

    def _header(self, name: str) -> tuple[str, list[int]]:
        header = self._holding(name).get_slice(name)
        return str(header.get_dtype()), list(header.get_shape())

    def read(self, name: str) -> torch.Tensor:
        """The tensor; only its own bytes of the file are touched."""
        opened = self._holding(name)
        try:
            tensor: torch.Tensor = opened.get_tensor(name)
        except Exception as error:  # dtypes that this torch does not have are told by whatever it raises
            raise Refused(f"{name} of {self._where[name]} cannot be read: {error}") from error
        return tensor

    def close(self) -> None:
        self._files.clear()
        self._open.close()

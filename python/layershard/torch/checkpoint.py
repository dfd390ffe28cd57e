# SPDX-License-Identifier: Apache-2.0
"""Weights from safetensors files: each rank reads the layers that it is source of, and what is not shared.

Knows names in a checkpoint and in a model; how bytes get to other ranks is the library's.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .filling import Filling, Give, refuse_lost, unshared
from .handle import Handle, of
from .hub_files import find, read_index
from .memory import release_freed_memory
from .refusals import Refused


@contextmanager
def empty_weights() -> Iterator[None]:
    """Models built inside have their parameters on the meta device, which costs no memory; buffers are computed."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Checkpoint:
    """What files hold, by name. They are opened when something in them is first needed."""

    def __init__(
        self, path: str | os.PathLike[str], variant: str | None = None, files: str | Sequence[str] | None = None
    ) -> None:
        self._open = ExitStack()
        self._files: dict[Path, tuple[Any, set[str]]] = {}
        found = find(Path(path), variant, files)
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

    def names(self) -> Iterable[str]:
        return self._where

    def _holding(self, name: str) -> Any:
        path = self._where[name]
        if not path.is_file():
            raise Refused(f"{name} is in {path}, {self._said_by}; there is no such file")
        opened, names = self._file(path)
        if name not in names:
            raise Refused(f"{name} is in {path}, {self._said_by}; the file has no such tensor")
        return opened

    def refuse_unlike(self, name: str, like: torch.Tensor) -> None:
        """By the file's header alone. Values are converted to the model's dtype, but integers are no weights."""
        header = self._holding(name).get_slice(name)
        shape, dtype = list(header.get_shape()), str(header.get_dtype())
        holds_integers = not (like.dtype.is_floating_point or like.dtype.is_complex)
        is_other_kind = isinstance(like, nn.Parameter) and _is_integer(dtype) != holds_integers
        if shape != list(like.shape) or is_other_kind:
            raise Refused(
                f"{name} is {dtype} {shape} in {self._where[name]}, and {like.dtype} {list(like.shape)} in the model"
            )

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


def _is_integer(dtype: str) -> bool:
    """Of a dtype as safetensors writes it: I8, U8, BOOL; F32, BF16, F8_E4M3, C64 are none."""
    return dtype.startswith(("I", "U", "BOOL"))


class _Names:
    """The checkpoint's name of each of the model's: the same, or with the base model's prefix more or less."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self._known = set(checkpoint.names())
        self._prefix = getattr(model, "base_model_prefix", "") + "."

    def find(self, name: str) -> str | None:
        candidates = (name, self._prefix + name, name.removeprefix(self._prefix))
        return next((each for each in candidates if each in self._known), None)

    def find_any(self, names: Iterable[str]) -> str:
        """Of a tied tensor the checkpoint may have any name."""
        names = list(names)
        return next(filter(None, map(self.find, names)), None) or self.must_find(names[0])

    def must_find(self, name: str) -> str:
        found = self.find(name)
        if found is None:
            near = difflib.get_close_matches(name, self._known, n=3)
            raise Refused(f"the checkpoint has no {name}" + (f"; near it: {', '.join(near)}" if near else ""))
        return found


def _where_all_are(model: nn.Module, handle: Handle, names: _Names) -> dict[str, str]:
    """The checkpoint's name of every tensor that a load may ask for."""
    where = {place.name: names.must_find(place.name) for place in handle.all_places()}
    for _, places in unshared(model, handle):
        where[places[0].name] = names.find_any(place.name for place in places)
    return where


def _own(model: nn.Module, handle: Handle) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank will ask for."""
    yield from ((place.name, place.tensor) for place in handle.own_places())
    yield from ((places[0].name, tensor) for tensor, places in unshared(model, handle))


def load(
    model: nn.Module,
    checkpoint_dir: str | os.PathLike[str],
    *,
    variant: str | None = None,
    files: str | Sequence[str] | None = None,
) -> nn.Module:
    """Fill a sharded model from safetensors files: exactly this rank's layers, and what is not shared. Collective.

    checkpoint_dir  a directory, one of the Hub's cache (models--ORGANISATION--NAME), an index, or a file
    variant         which of several in the directory: "fp16" is model.fp16.safetensors, or the index of that name
    files           which files of the directory: an index, or files that together are the checkpoint

    Values are converted to the model's dtypes. On a model that has weights they are replaced, in place. All names,
    and the shapes of what this rank reads, are compared before anything is written. What fails on one rank is an error
    on all; it may be called again then. Returns the model.
    """
    handle = of(model)
    with ExitStack() as ends:
        ends.callback(release_freed_memory)

        def open_checkpoint() -> Give:
            refuse_lost(model)
            found = Checkpoint(checkpoint_dir, variant, files)
            ends.callback(found.close)
            where = _where_all_are(model, handle, _Names(model, found))
            for name, tensor in _own(model, handle):
                found.refuse_unlike(where[name], tensor)
            return lambda name, like: found.read(where[name])

        Filling(model, handle, open_checkpoint, everything=True).run()
    return model

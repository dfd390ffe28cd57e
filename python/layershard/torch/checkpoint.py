# SPDX-License-Identifier: Apache-2.0
"""Weights from safetensors files: each rank reads the layers that it is source of, and what is not shared.

Knows names in a checkpoint and in a model; how bytes get to other ranks is the library's.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .filling import Filling, Give, refuse_lost, unshared
from .handle import Handle, of
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
    """A directory of safetensors files, with an index or without, or one file. Files are opened when first needed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._open = ExitStack()
        self._files: dict[Path, Any] = {}
        self._where = dict(self._find())
        if not self._where:
            raise Refused(f"there are no safetensors files in {self._path}")

    def _find(self) -> Iterator[tuple[str, Path]]:
        if self._path.is_file():
            return ((name, self._path) for name in self._file(self._path).keys())  # noqa: SIM118
        index = sorted(self._path.glob("*.safetensors.index.json"))
        if index:
            places = json.loads(index[0].read_text(encoding="utf-8"))["weight_map"]
            return ((name, self._path / file) for name, file in places.items())
        return (
            (name, file)
            for file in sorted(self._path.glob("*.safetensors"))
            for name in self._file(file).keys()  # noqa: SIM118
        )

    def _file(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._files:
            try:
                self._files[path] = self._open.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise Refused(f"{path} is no whole safetensors file ({path.stat().st_size} bytes): {error}") from error
        return self._files[path]

    def names(self) -> Iterable[str]:
        return self._where

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The tensor; only its own bytes of the file are touched."""
        tensor: torch.Tensor = self._file(self._where[name]).get_tensor(name)
        if tensor.shape != shape:
            raise Refused(f"{name} is {list(tensor.shape)} in {self._where[name]} and {list(shape)} in the model")
        return tensor

    def close(self) -> None:
        self._files.clear()
        self._open.close()


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


def load(model: nn.Module, checkpoint_dir: str | os.PathLike[str]) -> nn.Module:
    """Fill a sharded model from safetensors files: exactly this rank's layers, and what is not shared. Collective.

    Values are converted to the model's dtypes. On a model that has weights they are replaced, in place. All names are
    found before the first byte is read. What fails on one rank is an error on all; it may be called again then. Returns
    the model.
    """
    handle = of(model)
    with ExitStack() as ends:
        ends.callback(release_freed_memory)

        def open_checkpoint() -> Give:
            refuse_lost(model)
            checkpoint = Checkpoint(checkpoint_dir)
            ends.callback(checkpoint.close)
            where = _where_all_are(model, handle, _Names(model, checkpoint))
            return lambda name, like: checkpoint.read(where[name], like.shape)

        Filling(model, handle, open_checkpoint, everything=True).run()
    return model

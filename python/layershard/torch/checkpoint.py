# SPDX-License-Identifier: Apache-2.0
"""Weights from safetensors files: each rank reads the layers that it is source of, and what is not shared.

Knows names in a checkpoint and in a model; how bytes get to other ranks is the library's.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from .filling import Filling, Prepared, refuse_lost, saved, unshared
from .handle import Handle, of
from .leftover import Leftover
from .memory import release_freed_memory
from .recipes import Recipe, is_of_transformers, lines_of_fill, recipes
from .refusals import Refused
from .tensor_files import Checkpoint


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


class _Recipes:
    """How every tensor of the model is made of the checkpoint's: as transformers says, else under the same name, or
    with the base model's prefix more or less."""

    def __init__(self, model: nn.Module, handle: Handle, checkpoint: Checkpoint) -> None:
        self._model = model
        self._handle = handle
        self._checkpoint = checkpoint
        self._names = {place.name for _, places in saved(model).values() for place in places}
        self._names |= {place.name for place in handle.all_places()}  # an adapter has changed the model's, not these
        self._made = recipes(model, self._names, checkpoint.names())
        self._add_same(set(checkpoint.names()).difference(self._used()))
        self.leftover = Leftover(model, checkpoint.names(), self._used(), checkpoint.directory)
        self.leftover.refuse_quantised()

    def _used(self) -> set[str]:
        return {key for recipe in self._made.values() for key in recipe.keys}

    def _add_same(self, keys: set[str]) -> None:
        prefix = getattr(self._model, "base_model_prefix", "") + "."
        for name in self._names.difference(self._made):
            key = next((each for each in (name, prefix + name, name.removeprefix(prefix)) if each in keys), None)
            if key is not None:
                self._made[name] = Recipe(name, sources=[(key, None)])

    def make(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return self._made[name].make(self._model, name, like, self._checkpoint.read)

    def digest(self) -> str:
        """Words that are the same on ranks that read the same checkpoint, wherever each of them has it."""
        made = sorted((name, recipe.keys) for name, recipe in self._made.items())
        names = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:8]
        return f"{self._checkpoint.stem or 'a checkpoint'} of {len(made)} tensors, their names {names}"

    def refuse_missing(self) -> None:
        """Of what a load may ask for."""
        for place in self._handle.all_places():
            self._must_have([place.name])
        for _, places in unshared(self._model, self._handle):
            self._must_have([place.name for place in places])

    def refuse_unlike(self, name: str, like: torch.Tensor) -> None:
        """By the headers of the files that hold it."""
        recipe = self._made[name]
        for key in recipe.keys:
            if self._checkpoint.is_byte_float(key) and like.dtype.itemsize > 1:
                self.leftover.refuse_scaled(key)
            self._checkpoint.refuse_unlike(key, like, shape_too=recipe.converter is None)
        if recipe.converter is not None:
            recipe.refuse_unlike(self._model, name, like, self._checkpoint.empty)

    def _must_have(self, names: list[str]) -> None:
        """Of a tied tensor the checkpoint may have any name."""
        found = next((self._made[name] for name in names if name in self._made), None)
        if found is None:
            raise Refused(self._missing(names[0]))
        self._made[names[0]] = found  # which it is asked for by

    def _missing(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._checkpoint.names(), n=3)
        text = f"the checkpoint has no {name}" + (f"; near it: {', '.join(near)}" if near else "")
        if name in (getattr(self._model, "all_tied_weights_keys", None) or {}):
            return f"{text}. transformers ties it to another weight: call model.tie_weights() before shard"
        hint = self.leftover.hint()
        if not hint and is_of_transformers(self._model):
            variant = f", variant={self._checkpoint.variant!r}" if self._checkpoint.variant else ""
            hint = lines_of_fill(f"from_pretrained({str(self._checkpoint.directory)!r}{variant})")
        return text + hint


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
    inner = handle.model
    with ExitStack() as ends:
        ends.callback(release_freed_memory)

        def open_checkpoint() -> Prepared:
            refuse_lost(inner)
            found = Checkpoint(Path(checkpoint_dir), variant, files)
            ends.callback(found.close)
            made = _Recipes(inner, handle, found)
            made.refuse_missing()
            for name, tensor in _own(inner, handle):
                made.refuse_unlike(name, tensor)
            if handle.group.rank == 0:
                made.leftover.tell()
            return Prepared(made.make, made.digest())

        Filling(inner, handle, open_checkpoint, everything=True).run()
    return model

# SPDX-License-Identifier: Apache-2.0
"""Weights from safetensors files: each rank reads the layers that it is source of, and what is not shared.

Knows names in a checkpoint and in a model; how bytes get to other ranks is the library's.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from .filling import Filling, Give, refuse_lost, saved, unshared
from .handle import Handle, of
from .memory import release_freed_memory
from .recipes import Recipe, by_from_pretrained, is_of_transformers, recipes
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
    """How every tensor that a load may ask for is made of the checkpoint's: as transformers says, else under the same
    name, or with the base model's prefix more or less."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._prefix = getattr(model, "base_model_prefix", "") + "."
        names = {place.name for _, places in saved(model).values() for place in places}
        self._made = recipes(model, names, checkpoint.names())
        self._known = set(checkpoint.names()).difference(*(each.keys for each in self._made.values()))

    def of_all(self, handle: Handle) -> dict[str, Recipe]:
        found = {place.name: self._find([place.name]) for place in handle.all_places()}
        for _, places in unshared(self._model, handle):
            found[places[0].name] = self._find([place.name for place in places])
        return found

    def _find(self, names: list[str]) -> Recipe:
        """Of a tied tensor the checkpoint may have any name."""
        for name in names:
            if name in self._made:
                return self._made[name]
            for key in (name, self._prefix + name, name.removeprefix(self._prefix)):
                if key in self._known:
                    return Recipe(name, sources=[(key, None)])
        raise Refused(self._missing(names[0]))

    def _missing(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._known, n=3)
        text = f"the checkpoint has no {name}" + (f"; near it: {', '.join(near)}" if near else "")
        if name in (getattr(self._model, "all_tied_weights_keys", None) or {}):
            return f"{text}. transformers ties it to another weight: call model.tie_weights() before shard"
        if is_of_transformers(self._model):
            text += by_from_pretrained(self._model, self._checkpoint.directory, self._checkpoint.variant)
        return text


def _own(model: nn.Module, handle: Handle) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank will ask for."""
    yield from ((place.name, place.tensor) for place in handle.own_places())
    yield from ((places[0].name, tensor) for tensor, places in unshared(model, handle))


def _refuse_unlike(model: nn.Module, checkpoint: Checkpoint, recipe: Recipe, name: str, like: torch.Tensor) -> None:
    for key in recipe.keys:
        checkpoint.refuse_unlike(key, like, shape_too=recipe.converter is None)
    if recipe.converter is not None:
        recipe.refuse_unlike(model, name, like, checkpoint.empty)


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

        def open_checkpoint() -> Give:
            refuse_lost(inner)
            found = Checkpoint(Path(checkpoint_dir), variant, files)
            ends.callback(found.close)
            made = _Recipes(inner, found).of_all(handle)
            for name, tensor in _own(inner, handle):
                _refuse_unlike(inner, found, made[name], name, tensor)
            return lambda name, like: made[name].make(inner, name, like, found.read)

        Filling(inner, handle, open_checkpoint, everything=True).run()
    return model

# SPDX-License-Identifier: Apache-2.0
"""A model and a checkpoint put side by side, before anything is read: what each tensor is made of, what is missing, of
another shape or kind, or left.

Knows names and the headers of files; how tensors are made is the recipes'.
"""

from __future__ import annotations

import difflib
import hashlib
import json

import torch
from torch import nn

from .filling import saved, unshared
from .handle import Handle
from .leftover import Leftover
from .recipes import Recipe, is_of_transformers, lines_of_fill, recipes
from .refusals import Refused
from .tensor_files import Checkpoint


class Matching:
    """How every tensor of the model is made of the checkpoint's: as transformers says, else under the same name, or
    with the base model's prefix more or less."""

    def __init__(self, model: nn.Module, handle: Handle, checkpoint: Checkpoint) -> None:
        self._model = model
        self._handle = handle
        self._checkpoint = checkpoint
        self._also_stored: dict[str, list[str]] = {}
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
        value = self._made[name].make(self._model, name, like, self._checkpoint.read)
        for other in self._also_stored.get(name, ()):
            again = self._made[other].make(self._model, other, like, self._checkpoint.read)
            if not torch.equal(again.to(value.dtype), value):
                raise Refused(
                    f"{name} and {other} are one tensor in the model and two in the checkpoint, which differ: build "
                    f"the model with weights of its own for each (tie_word_embeddings=False, no tie_weights())"
                )
        return value

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
        """Of a tied tensor the checkpoint may have any name, or several. It is asked for by the first."""
        stored = [name for name in names if name in self._made]
        if not stored:
            raise Refused(self._missing(names[0]))
        used = self._made.setdefault(names[0], self._made[stored[0]])
        if self._handle.group.rank == 0:  # one rank is enough to see whether they are the same
            self._also_stored[names[0]] = [name for name in stored if self._made[name].keys != used.keys]

    def _missing(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._checkpoint.names(), n=3)
        text = f"the checkpoint has no {name}" + (f"; near it: {', '.join(near)}" if near else "")
        if name in (getattr(self._model, "all_tied_weights_keys", None) or {}):
            return f"{text}. transformers ties it to another weight: call model.tie_weights() before shard"
        takes_scales = getattr(self._model, "hf_quantizer", None) is not None
        hint = "" if takes_scales else self.leftover.hint(name)
        if not hint and is_of_transformers(self._model):
            variant = f", variant={self._checkpoint.variant!r}" if self._checkpoint.variant else ""
            hint = lines_of_fill(f"from_pretrained({str(self._checkpoint.directory)!r}{variant})")
        return text + hint

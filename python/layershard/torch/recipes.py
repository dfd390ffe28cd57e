# SPDX-License-Identifier: Apache-2.0
"""How each tensor of a model is made of a checkpoint's: renamed, or by transformers' conversion also fused or split, as
Mixtral's experts.0.w1.weight, experts.1.w1.weight ... are to experts.gate_up_proj.

Knows names, and of transformers the functions that peft calls too; reads nothing itself.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .refusals import Refused

_log = logging.getLogger("layershard")
Read = Callable[[str], torch.Tensor]


@dataclass
class Recipe:
    """One tensor of the checkpoint as it is or, where there is a @converter, several by what transformers does with
    them for the model's tensor @target, and others beside it."""

    target: str
    converter: Any = None
    sources: list[tuple[str, str | None]] = field(default_factory=list)  # the checkpoint's name, the pattern it matches

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.sources]

    def make(self, model: nn.Module, name: str, like: torch.Tensor, read: Read) -> torch.Tensor:
        """The values for @name. Each call reads anew: nothing is kept for a tensor that nobody here asks for."""
        if self.converter is None:
            return read(self.keys[0])
        try:
            value = self._convert(model, name, like, read)
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"{self._what(name)}, which fails: {type(error).__name__}: {error}") from error
        return self._like(name, value, like)

    def refuse_unlike(self, model: nn.Module, name: str, like: torch.Tensor, empty: Read) -> None:
        """Look at shapes alone, by tensors without memory. What cannot be made of such is told when it is made."""
        try:
            value = self._convert(model, name, like, empty)
        except Refused:  # of a file
            raise
        except Exception:
            return
        self._like(name, value, like)

    def _convert(self, model: nn.Module, name: str, like: torch.Tensor, read: Read) -> torch.Tensor:
        converter = deepcopy(self.converter)
        for key, pattern in self.sources:
            converter.add_tensor(self.target, key, pattern, _Later(read, key, like.dtype))
        made = converter.convert(self.target, model=model, config=model.config)
        made = made[0] if isinstance(made, tuple) else made  # transformers 5.0 gives errors as well
        value: torch.Tensor = made[name][0] if isinstance(made[name], list) else made[name]
        return value

    def _like(self, name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if value.shape != like.shape:
            raise Refused(f"{self._what(name)}, which gives {list(value.shape)}; it is {list(like.shape)} in the model")
        return value

    def _what(self, name: str) -> str:
        return f"{name} is made by transformers of {len(self.keys)} tensors of the checkpoint, {self.keys[0]} the first"


class _Later:
    """Read when the conversion asks for it, in the model's dtype before anything is computed, as transformers does."""

    def __init__(self, read: Read, key: str, dtype: torch.dtype) -> None:
        self._read, self._key, self._dtype = read, key, dtype

    def __call__(self) -> torch.Tensor:
        return self._read(self._key).to(self._dtype)


def is_of_transformers(model: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")  # there, if the model's class is made of it
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def recipes(model: nn.Module, names: Collection[str], keys: Collection[str]) -> dict[str, Recipe]:
    """What transformers makes of the checkpoint's @keys for the model's @names. Nothing where it has no say: of models
    of other libraries, before transformers 5, and of models that it has quantised, whose conversion goes by the rank's
    device."""
    if not is_of_transformers(model) or getattr(model, "hf_quantizer", None) is not None:
        return {}
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        core = importlib.import_module("transformers.core_model_loading")
        made = _Sorter(model, names, mapping.get_model_conversion_mapping(model), core).sort(keys)
    except ImportError:
        return {}
    except (AttributeError, TypeError) as error:  # of a version that has changed it, or of a model's own code
        _log.warning("load takes names as they are, as transformers' conversion fails: %r", error)
        return {}
    return _with_split(made, names)


class _Sorter:
    """The checkpoint's names sorted to the model's, as transformers.core_model_loading does it when it loads."""

    def __init__(self, model: nn.Module, names: Collection[str], conversions: list[Any], core: Any) -> None:
        self._core = core
        self._prefix: Any = model.base_model_prefix
        self._names = dict.fromkeys(names, True)
        self._renamings = [each for each in conversions if isinstance(each, core.WeightRenaming)]
        self._converters = [each for each in conversions if isinstance(each, core.WeightConverter)]
        self._of_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}

    def sort(self, keys: Collection[str]) -> dict[str, Recipe]:
        made: dict[str, Recipe] = {}
        for key in sorted(keys, key=self._core.dot_natural_key):
            name, pattern = self._rename(key, keys)
            if name not in self._names:
                continue
            converter = self._of_pattern.get(pattern)
            recipe = made.setdefault(name, Recipe(name, converter))
            if recipe.converter is converter and (converter is not None or not recipe.sources):  # else the first counts
                recipe.sources.append((key, pattern))
        return made

    def _rename(self, key: str, keys: Collection[str]) -> tuple[str, str | None]:
        rename = self._core.rename_source_key
        name, pattern = rename(key, self._renamings, self._converters, self._prefix, self._names)
        if name not in self._names and key in self._names:
            name, pattern = rename(key, [], [], self._prefix, self._names)
        return name, pattern


def _with_split(made: dict[str, Recipe], names: Collection[str]) -> dict[str, Recipe]:
    """One tensor may become several of the model's, which transformers knows by the first."""
    others = {}
    for name, recipe in made.items():
        first, *rest = recipe.converter.target_patterns if recipe.converter is not None else [""]
        others.update({name.replace(first, each): recipe for each in rest if name.replace(first, each) in names})
    return others | made


def lines_of_fill(call: str) -> str:
    """What a person may type where transformers alone knows how a checkpoint becomes the model's: @call it."""
    return (
        f". If transformers can do it, let each rank load all of the checkpoint, and take its own from that:\n"
        f"    whole = type(model).{call}.state_dict()\n"
        f"    layershard.torch.fill(model, lambda name, like: whole[name])\n"
        f"    del whole"
    )

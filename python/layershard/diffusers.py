# SPDX-License-Identifier: Apache-2.0
"""layershard for diffusers: apply_layer_sharding(transformer, LayerShardingConfig(...)), as diffusers' own apply_*.

Knows how diffusers names the repeated blocks of a model; everything else is layershard.torch. diffusers itself need not
be imported: any module with _repeated_blocks, or a pattern, will do.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .torch import Handle, Refused, of, shard
from .torch.numbering import layer_number

_log = logging.getLogger("layershard")


@dataclass
class LayerShardingConfig:
    """What layershard.torch.shard takes, by the same names.

    modules  None: the model's repeated blocks, whole, as it names them itself, else those of its lists
    """

    modules: str | Sequence[str] | None = None
    group: Any = None
    prefetch: int = 1
    placement: str = "auto"
    transport: str = "auto"
    scope: str = "block"
    resident: int | float | str = 0
    layer: str | Sequence[str] = ()
    timeout_ms: int | None = None


def _listed(module: nn.Module) -> list[str]:
    """What the model itself lists, as repeated or as not to be split."""
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        kinds = getattr(module, attribute, None) or ()
        names = [name for name, each in module.named_modules() if type(each).__name__ in kinds]
        if any(map(layer_number, names)):
            return names
    return []


def _in_lists(module: nn.Module) -> list[str]:
    """The modules of lists that hold several of their kind."""
    names = []
    for path, each in module.named_modules():
        if isinstance(each, nn.ModuleList):
            counts = Counter(map(type, each))
            names += [f"{path}.{key}" for key, member in each.named_children() if counts[type(member)] > 1]
    return names


def repeated_blocks(module: nn.Module) -> list[str]:
    """Names of the blocks that are repeated ("blocks.0", "blocks.1", ...), as the model says itself; else those of its
    lists. What is listed without a number is no layer, and is left as it is: told."""
    names = _listed(module) or _in_lists(module)
    if not names:
        raise Refused(
            f"{type(module).__name__} does not say which blocks are repeated, and has no list of several of a kind: "
            f"give the configuration modules"
        )
    alone = [name for name in names if not layer_number(name)]
    if alone:
        _log.warning(
            "%s stay replicated: %s lists them, but without a number in their names they are no layers",
            ", ".join(alone[:4]),
            type(module).__name__,
        )
    return [name for name in names if name not in alone]


def apply_layer_sharding(module: nn.Module, config: LayerShardingConfig | None = None) -> Handle:
    """Share the layers of one model of a pipeline, in place. Collective. Returns the handle (report, update, ...)."""
    config = config or LayerShardingConfig()
    options = dict(vars(config))
    modules = options.pop("modules") or repeated_blocks(module)
    shard(module, modules, **options)
    return of(module)

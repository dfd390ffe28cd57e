# SPDX-License-Identifier: Apache-2.0
"""layershard for diffusers: apply_layer_sharding(transformer, LayerShardingConfig(...)), as diffusers' own apply_*.

Knows how diffusers names the repeated blocks of a model; everything else is layershard.torch. diffusers itself need not
be imported: any module with _repeated_blocks, or a pattern, will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .torch import Handle, Refused, of, shard


@dataclass
class LayerShardingConfig:
    """What layershard.torch.shard takes, by the same names.

    modules  None: the model's repeated blocks, whole, as it names them itself
    """

    modules: str | Sequence[str] | None = None
    group: Any = None
    prefetch: int = 1
    placement: str = "auto"
    transport: str = "auto"
    scope: str = "block"
    resident: int | float | str = 0
    timeout_ms: int | None = None


def repeated_blocks(module: nn.Module) -> list[str]:
    """Names of the blocks that the model says are repeated ("blocks.0", "blocks.1", ...)."""
    kinds = getattr(module, "_repeated_blocks", None) or getattr(module, "_no_split_modules", None) or ()
    names = [name for name, each in module.named_modules() if type(each).__name__ in kinds]
    if not names:
        raise Refused(f"{type(module).__name__} does not say which blocks are repeated: give the configuration modules")
    return names


def apply_layer_sharding(module: nn.Module, config: LayerShardingConfig | None = None) -> Handle:
    """Share the layers of one model of a pipeline, in place. Collective. Returns the handle (report, update, ...)."""
    config = config or LayerShardingConfig()
    options = dict(vars(config))
    modules = options.pop("modules") or repeated_blocks(module)
    shard(module, modules, **options)
    return of(module)

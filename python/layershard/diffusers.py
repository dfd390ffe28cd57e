# SPDX-License-Identifier: Apache-2.0
"""layershard for diffusers: apply_layer_sharding(transformer, LayerShardingConfig(...)), as diffusers' own apply_*.

Knows how diffusers names the repeated blocks of a model; everything else is layershard.torch. diffusers itself need not
be imported: any module with _repeated_blocks, or a pattern, will do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .torch import Handle, Refused, of, shard
from .torch.numbering import layer_number

_log = logging.getLogger("layershard")

_KNOWN = {  # where the blocks are of models that list none, each compared with itself unsharded
    "AceStepTransformer1DModel": ("layers",),
    "AllegroTransformer3DModel": ("transformer_blocks",),
    "BriaTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "ConsisIDTransformer3DModel": ("transformer_blocks",),
    "DiTTransformer2DModel": ("transformer_blocks",),
    "HunyuanDiT2DModel": ("blocks",),
    "LatteTransformer3DModel": ("transformer_blocks", "temporal_transformer_blocks"),
    "LuminaNextDiT2DModel": ("layers",),
    "MiniMaxMusic3RVQDepthDecoder": ("layers",),
    "PRXTransformer2DModel": ("blocks",),
    "PriorTransformer": ("transformer_blocks",),
    "StableAudioDiTModel": ("transformer_blocks",),
    "T5FilmDecoder": ("decoders",),
    "TransformerTemporalModel": ("transformer_blocks",),
}


@dataclass
class LayerShardingConfig:
    """What layershard.torch.shard takes, by the same names.

    modules  None: the model's repeated blocks, whole, as it names them itself or as is known of it
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
    memory: str = "library"
    reserve: int | None = None


def _listed(module: nn.Module) -> list[str]:
    """What the model itself lists, as repeated or as not to be split."""
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        kinds = getattr(module, attribute, None) or ()
        names = [name for name, each in module.named_modules() if type(each).__name__ in kinds]
        if any(map(layer_number, names)):
            return names
    return []


def _reads_first_by_itself(block: nn.Module) -> bool:
    """Whether the model is one that embeds the time by its first block's norm1.emb without calling the block, as DiT
    is, and so would not wait."""
    return getattr(getattr(block, "norm1", None), "emb", None) is not None


def _why_left(module: nn.Module, name: str) -> str | None:
    found = layer_number(name)
    if found is None:
        return "without a number in its name it is no layer"
    if found[0] == 0 and _reads_first_by_itself(module.get_submodule(name)):
        return "the model reads its norm1.emb without calling it"
    return None


def repeated_blocks(module: nn.Module) -> list[str]:
    """Names of the blocks that are repeated ("blocks.0", "blocks.1", ...), as the model says itself, or as is known of
    it. What is among them but cannot be shared as a layer is left as it is: told."""
    kind = type(module).__name__
    known = [f"{path}.{key}" for path in _KNOWN.get(kind, ()) for key, _ in module.get_submodule(path).named_children()]
    names = _listed(module) or known
    if not names:
        raise Refused(f"{kind} does not say which blocks are repeated: give the configuration modules")
    left = {name: why for name in names if (why := _why_left(module, name))}
    for why in dict.fromkeys(left.values()):
        alone = [name for name in left if left[name] == why]
        _log.warning("%s (%s) stays replicated: %s", ", ".join(alone[:4]), kind, why)
    return [name for name in names if name not in left]


def apply_layer_sharding(module: nn.Module, config: LayerShardingConfig | None = None) -> Handle:
    """Share the layers of one model of a pipeline, in place. Collective. Returns the handle (report, update, ...)."""
    config = config or LayerShardingConfig()
    options = dict(vars(config))
    modules = options.pop("modules") or repeated_blocks(module)
    shard(module, modules, **options)
    return of(module)

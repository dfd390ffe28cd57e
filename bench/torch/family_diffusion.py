# SPDX-License-Identifier: Apache-2.0
"""Every transformer of diffusers, made tiny: its own class with the fields of family_images and family_videos, which
say what a pass is given, too.

Knows diffusers' classes; nothing of ranks or layershard, but for the call that shards one.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import family_images
import family_videos
import torch
from family_images import Draw

LAYERS = 6
_COUNTS = (
    "num_layers num_single_layers num_mmdit_layers num_single_dit_layers mmdit_layers num_hidden_layers n_layers "
    "nlayers depth dit_depth num_visual_blocks"
).split()
FAMILIES = {**family_images.FAMILIES, **family_videos.FAMILIES}


def families() -> dict[str, type]:
    """What diffusers exports of its transformers, those without an entry here too: then they cannot be made."""
    found = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None)
        if inspect.isclass(kind) and kind.__module__.startswith("diffusers.models.transformers."):
            if issubclass(kind, torch.nn.Module):
                found[name] = kind
    return found


def build(name: str) -> torch.nn.Module:
    kind = getattr(diffusers, name)
    if name not in FAMILIES:
        raise LookupError("there is no entry for it in family_images.py or family_videos.py")
    fields, _ = FAMILIES[name]
    layers = {each: LAYERS for each in _COUNTS if each in inspect.signature(kind.__init__).parameters}
    return kind(**{**layers, **fields})


def inputs(name: str, model: torch.nn.Module, seed: int) -> dict[str, Any]:
    _, given = FAMILIES[name]
    return given(Draw(seed))


def shard(model: torch.nn.Module) -> str:
    """As a user would: with what apply_layer_sharding chooses."""
    from layershard.diffusers import LayerShardingConfig, apply_layer_sharding

    handle = apply_layer_sharding(model, LayerShardingConfig(transport="shm:copy"))
    return ", ".join(each.plan.name for each in handle.shared)

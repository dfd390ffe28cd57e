# SPDX-License-Identifier: Apache-2.0
"""layershard for PyTorch: one call shards any model's layers.

    model = layershard.torch.shard(model, "model.layers.*", scope="block")
    print(layershard.torch.of(model).report())

sharding puts the steps of shard in order: patterns and grouping choose, refusals and its like look first, membership
says which ranks, joining connects them, shared holds a series, wiring and hooks make the calls of a pass. handle is
what a sharded model can be asked; checks and updates are packages of their own. vllm_ascend has the calls of another
library over the same parts; engine has the parts that are for engines.
"""

from __future__ import annotations

from .checkpoint import empty_weights, load
from .checks.checking import Checked, CheckFailed, check
from .dual import DualLinear, Regime, dual
from .engine import Arrivals, describe, view, without_storage
from .filling import fill
from .handle import Handle, of
from .layout import Layout
from .refusals import Guarded, Refused
from .sharding import shard

__all__ = [
    "Arrivals",
    "CheckFailed",
    "Checked",
    "DualLinear",
    "Guarded",
    "Handle",
    "Layout",
    "Refused",
    "Regime",
    "check",
    "describe",
    "dual",
    "empty_weights",
    "fill",
    "load",
    "of",
    "shard",
    "view",
    "without_storage",
]

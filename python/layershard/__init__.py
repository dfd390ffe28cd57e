# SPDX-License-Identifier: Apache-2.0
"""layershard: data-parallel speed with 1/n of the weights.

n ranks run the same model on different data. The layers of a series are stored once, spread over the ranks, and fetched
by the others just in time, while the layers before them compute.

    with layershard.Group() as group:
        series = group.series("o_proj", first_layer=0, layer_count=32, tensors=[layershard.Tensor("weight", nbytes)])
        series.commit(load)                         # load(layer, addresses): once per layer, on its source
        for layer in series.layers:
            series.reach(layer)
            series.wait(layer)
            compute(series.address(layer, 0))

This is the C library's interface in Python's words; it needs the standard library alone. layershard.torch shards a
PyTorch model: layershard.shard and layershard.of are its functions, for which torch is imported when they are used.
"""

from typing import TYPE_CHECKING

from ._declarations import VERSION as _VERSION
from ._library import get_include, version
from .callbacks import Collectives, Device
from .dlpack import View
from .errors import (
    Aborted,
    Busy,
    CallbackFailed,
    Corrupt,
    Error,
    Invalid,
    LibraryError,
    Mismatch,
    NoMemory,
    NotPeriodic,
    NotSupported,
    OutOfRange,
    OutOfStep,
    PeerFailed,
    SystemFailed,
    Timeout,
    TransportFailed,
    WrongState,
)
from .group import Group
from .memory_source import MemorySource
from .planning import Discovered, Node, Plan, Transport, Variable, discover, nodes, plan, transports, variables
from .series import ALL, Series, Stats, Stripe, Tensor

if TYPE_CHECKING:
    from .torch import of as of
    from .torch import shard as shard
else:

    def __getattr__(name: str) -> object:
        if name not in ("of", "shard"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        try:
            return getattr(import_module(".torch", __name__), name)
        except ModuleNotFoundError as missing:
            if missing.name != "torch":
                raise
            raise ImportError(f"layershard.{name} needs PyTorch: pip install 'layershard[torch]'") from missing


__version__ = ".".join(map(str, _VERSION))
__all__ = [
    "ALL",
    "Aborted",
    "Busy",
    "CallbackFailed",
    "Collectives",
    "Corrupt",
    "Device",
    "Discovered",
    "Error",
    "Group",
    "Invalid",
    "LibraryError",
    "MemorySource",
    "Mismatch",
    "NoMemory",
    "Node",
    "NotPeriodic",
    "NotSupported",
    "OutOfRange",
    "OutOfStep",
    "PeerFailed",
    "Plan",
    "Series",
    "Stats",
    "Stripe",
    "SystemFailed",
    "Tensor",
    "Timeout",
    "Transport",
    "TransportFailed",
    "Variable",
    "View",
    "WrongState",
    "discover",
    "get_include",
    "nodes",
    "plan",
    "transports",
    "variables",
    "version",
]

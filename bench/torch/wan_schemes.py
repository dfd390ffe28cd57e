# SPDX-License-Identifier: Apache-2.0
"""The schemes that wan.py compares, ways to store the blocks: their models, and the device memory that each takes.

Knows the models and what layershard and a driver say of memory; nothing of rounds.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_launch
import wan_model
from torch import nn

CONTROL = "replicated"


# ---- Schemes -------------------------------------------------------------------------------------------------------


@dataclass
class Scheme:
    """One model, or one an expert, stored in one way."""

    name: str
    kind: str  # replicated, layershard, fsdp2
    details: dict[str, Any] = field(default_factory=dict)
    ahead: int = 0  # of FSDP2
    experts: list[nn.Module] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def moves(self) -> bool:
        """Whether layershard fetches any layer: ranks of one GPU can read each other's in place."""
        return any(series.windows for handle in self.handles for series in handle.stats().values())

    @property
    def fetched_bytes(self) -> int:
        """Since it was made, by this rank."""
        return sum(series.fetched_bytes for handle in self.handles for series in handle.stats().values())

    def begin(self) -> None:
        if self.kind == "fsdp2":
            for model in self.experts:
                wan_model.prefetch_by_fsdp(model, self.ahead)

    def rest(self) -> None:
        if self.moves:
            for handle in self.handles:
                handle.prepare()


def paced(transport: str, pace: float) -> str:
    return f"{transport}{'+' if ':' in transport else ':'}pace={pace:g}"


def default_transport(ranks: torch_launch.Ranks) -> str:
    """Copies, also where ranks could read each other's layers in place: it is copies that are to be measured."""
    return "shm:copy" if not ranks.on_gpus else "cuda:copy" if ranks.shares_device else "cuda"


def schemes_of(options: argparse.Namespace, ranks: torch_launch.Ranks) -> list[Scheme]:
    transport = options.transport or default_transport(ranks)
    shared = {"transport": transport, "prefetch": options.prefetch}
    schemes = [Scheme(CONTROL, "replicated"), Scheme("layershard", "layershard", dict(shared))]
    if options.control:
        schemes.append(Scheme("layershard, all resident", "layershard", shared | {"resident": "all"}))
    for pace in options.pace:
        schemes.append(
            Scheme(f"layershard, {pace:g} GB/s", "layershard", shared | {"transport": paced(transport, pace)})
        )
    for ahead in options.fsdp_prefetch:
        schemes.append(Scheme(f"FSDP2, prefetch {ahead}", "fsdp2", {"prefetch": ahead}, ahead))
    return schemes


# ---- Building them, and what memory they take ---------------------------------------------------------------------


def used_bytes(ranks: torch_launch.Ranks) -> int | None:
    """Of the device, by all that run on it, as the driver sees it."""
    if not ranks.on_gpus:
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    ranks.barrier()
    free, total = torch.cuda.mem_get_info(ranks.device)
    ranks.barrier()
    return total - free


class Builder:
    """Makes the models of a scheme. All ranks make the same ones in the same order."""

    def __init__(self, options: argparse.Namespace, ranks: torch_launch.Ranks) -> None:
        self._options = options
        self._ranks = ranks
        self.shape = wan_model.SHAPES[options.shape]
        self.layers = options.layers or self.shape["num_layers"]
        cp_mesh, self._fsdp_mesh = wan_model.make_meshes(ranks.size, ranks.device)
        self._parallel = wan_model.ulysses(ranks, cp_mesh)
        self._by_fsdp: list[nn.Module] = []

    def _keep(self, scheme: Scheme, model: nn.Module, prefix: str) -> None:
        if scheme.kind == "replicated":
            wan_model.replicate(model, prefix, self._ranks.device)
        elif scheme.kind == "fsdp2":
            wan_model.shard_by_fsdp(model, prefix, self._ranks.device, self._fsdp_mesh)
        else:
            scheme.handles.append(wan_model.shard(model, prefix, self._ranks.device, **scheme.details))

    def _make(self, scheme: Scheme) -> None:
        if scheme.kind == "fsdp2" and self._by_fsdp:  # one model for all prefetch settings
            scheme.experts = self._by_fsdp
            return
        for expert in range(self._options.experts):
            model = wan_model.empty(self.shape, self.layers, self._ranks.device)
            if self._options.attention != "native":
                model.set_attention_backend(self._options.attention)
            self._keep(scheme, model, f"{expert}.")
            wan_model.split_tokens(model, self._parallel)
            scheme.experts.append(model)
        if scheme.kind == "fsdp2":
            self._by_fsdp = scheme.experts

    def build(self, scheme: Scheme) -> str | None:
        """The reason why it cannot be built, on all ranks the same."""
        if scheme.kind == "fsdp2" and self._ranks.shares_device:
            return "NCCL refuses two ranks on one GPU"
        before, trouble = used_bytes(self._ranks), None
        try:
            self._make(scheme)
        except Exception as error:
            trouble = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        trouble = self._ranks.agree(trouble)
        if trouble is None:
            scheme.memory = self._memory_of(scheme, before, used_bytes(self._ranks))
        return trouble

    def _memory_of(self, scheme: Scheme, before: int | None, after: int | None) -> dict[str, Any]:
        """Bytes a rank. What is wanted: what the schemes say of themselves, 1/n and windows of whole blocks."""
        meta = wan_model.empty(self.shape, self.layers, torch.device("cpu"))
        blocks = self._options.experts * wan_model.bytes_of(meta.blocks.parameters())
        outside = self._options.experts * wan_model.bytes_of(meta.get_parameter(n) for n in wan_model.outside(meta))
        own, windows = float(blocks), 0
        if scheme.kind == "fsdp2":
            own = blocks / self._ranks.size
        for handle in scheme.handles:
            windows += sum(series.windows for series in handle.stats().values())
        if scheme.kind == "layershard":
            sources = sum(1 for handle in scheme.handles for shared in handle.shared for _ in shared.own_layers())
            kept = sum(series.residents for handle in scheme.handles for series in handle.stats().values())
            own = blocks / (self.layers * self._options.experts) * (sources + kept)
        wanted = own + windows * blocks / (self.layers * self._options.experts)
        memory: dict[str, Any] = {"blocks_bytes": blocks, "outside_bytes": outside, "windows": windows}
        memory["wanted_bytes"] = statistics.mean(self._ranks.gather(wanted)) if self._shares() else wanted
        if before is not None and after is not None:
            taken = (after - before) / (self._ranks.size if self._shares() else 1)
            memory["device_bytes"] = taken
            memory["of_blocks"] = (taken - outside) / blocks
            memory["off_wanted"] = (taken - outside) / memory["wanted_bytes"] - 1
        return self._of_the_worst(memory)

    def _shares(self) -> bool:
        return self._ranks.shares_device

    def _of_the_worst(self, memory: dict[str, Any]) -> dict[str, Any]:
        """The rank that takes most: with an odd number of blocks one stores one more."""
        return max(self._ranks.gather(memory), key=lambda each: each.get("device_bytes", each["wanted_bytes"]))

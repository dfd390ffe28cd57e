# SPDX-License-Identifier: Apache-2.0
"""FSDP2 for e2e.py, with several settings of its prefetch, and with copy engines.

Knows torch's fully_shard; nothing of layershard.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from e2e_model import empty_stack, values
from e2e_schemes import Scheme, has_nccl
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch_table import Variant


class Fsdp(Scheme):
    """fully_shard layer by layer, resharded after each; 1 or 2 layers prefetched explicitly, also across passes."""

    title = "FSDP2"
    suffixes = (" p=1", " p=2", " p=1 across passes", " p=2 across passes")
    symmetric = False

    def needs(self) -> int:
        return self.shape.bytes // self.ranks.size

    def passing(self) -> int:
        """What is gathered: a layer in use, two under way, and the gather's own buffers."""
        return 5 * self.shape.layer_bytes

    def refusal(self) -> str | None:
        return has_nccl(self.ranks)

    def mesh(self) -> DeviceMesh:
        return init_device_mesh(self.ranks.device.type, (self.ranks.size,))

    def open(self) -> None:
        self.model: Any = empty_stack(self.shape, self.bench.layer)
        mesh = self.mesh()
        for layer in self.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False)  # no parameters of its own
        self.model.to_empty(device=self.ranks.device)
        if self.symmetric:
            for layer in self.model.layers:
                layer.set_symm_mem_for_comm("NCCL")
        for name, parameter in self.model.named_parameters():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            parts = values(name, whole, self.ranks.device).chunk(self.ranks.size)
            if self.ranks.rank < len(parts):
                parameter.to_local().copy_(parts[self.ranks.rank])

    def prefetch(self, ahead: int, across: bool) -> None:
        layers = list(self.model.layers)
        circle = layers + (layers if across else [])
        for number, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(circle[number + 1 : number + 1 + ahead])

    def _rest(self) -> None:
        """What was gathered for a next pass is dropped."""
        self.ranks.synchronize()
        for layer in self.model.layers:
            layer.unshard()  # waits for what is under way; where nothing is, it is gathered and dropped
            layer.reshard()

    def variants(self, tokens: int) -> list[Variant]:
        x = self.input(tokens)
        made = []
        for suffix in self.suffixes:
            ahead, across = int(suffix.partition("p=")[2][0]), suffix.endswith("across passes")
            made.append(
                Variant(
                    self.title + suffix,
                    lambda: self.model(x),
                    begin=lambda ahead=ahead, across=across: self.prefetch(ahead, across),
                    rest=self._rest if across else lambda: None,
                    check="close",  # what is gathered is elsewhere in each pass: cuBLAS may choose by alignment
                    details={"mode": "eager", "prefetch": ahead},
                )
            )
        return made


class FsdpCopyEngines(Fsdp):
    """The gathers by copy engines: staging in NCCL's symmetric memory, a communicator that uses no multiprocessor."""

    title = "FSDP2 copy engines"
    symmetric = True

    def refusal(self) -> str | None:
        if not self.ranks.on_gpus:
            return "there are no copy engines on a processor"
        if not hasattr(torch.distributed.fsdp.FSDPModule, "set_symm_mem_for_comm"):
            return f"torch {torch.__version__} has no set_symm_mem_for_comm"
        if not hasattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO"):
            return f"torch {torch.__version__} has no NCCL_CTA_POLICY_ZERO"
        return super().refusal()

    def mesh(self) -> DeviceMesh:
        options = dist.ProcessGroupNCCL.Options()
        options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
        group = dist.new_group(backend="nccl", pg_options=options, device_id=self.ranks.device)
        return DeviceMesh.from_group(group, "cuda")

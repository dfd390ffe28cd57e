# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism for e2e.py: with NCCL and with torch's symmetric memory, also from a graph, and with products that
overlap what they send.

Knows torch.distributed; nothing of layershard.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from e2e_model import Layer, Stack, borrow, empty_stack, part_of, values
from e2e_schemes import UNDIVIDED, Bench, Captured, Scheme, all_tokens, has_nccl, no_graphs, tolerance_of
from torch import nn
from torch_table import Variant


class TensorParallel(Scheme):
    """Heads and hidden columns divided; two sums a layer; one pass computes the tokens of all ranks."""

    suffixes = ("", ", graph")

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.title = f"TP{self.ranks.size}"

    def needs(self) -> int:
        return self.shape.bytes // self.ranks.size

    def refusal(self) -> str | None:
        if not self.shape.divides_by(self.ranks.size):
            return UNDIVIDED
        return has_nccl(self.ranks)

    def refusal_of(self, suffix: str) -> str | None:
        return no_graphs(self.ranks) if suffix.endswith("graph") else None

    def combine(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def layer(self) -> nn.Module:
        """An empty one."""
        return Layer(self.shape.part(self.ranks.size), self.shape.head, self.combine)

    def open(self) -> None:
        with torch.device("meta"):
            layers = [self.layer().to(self.shape.dtype) for _ in range(self.shape.layers)]
        self.model = Stack(layers).eval().requires_grad_(False)
        self.model.to_empty(device=self.ranks.device)
        shapes = dict(empty_stack(self.shape).named_parameters())
        for name, parameter in self.model.named_parameters():
            full = values(name, shapes[name], self.ranks.device)
            parameter.copy_(part_of(name, full, self.ranks.rank, self.ranks.size))

    def variants(self, tokens: int) -> list[Variant]:
        x = all_tokens(self, tokens)
        mine = slice(self.ranks.rank, self.ranks.rank + 1)
        captured = Captured(self.bench, self.model, x)
        runs = [("", lambda: self.model(x))]
        runs += [(", graph", captured)] if self.ranks.on_gpus else []
        return [
            Variant(
                self.title + suffix,
                lambda run=run: run()[mine],
                check="close",
                tolerance=tolerance_of(self.shape),
                baseline="replicated" + suffix,
                details={"mode": suffix.removeprefix(", ") or "eager"},
            )
            for suffix, run in runs
        ]

    def close(self) -> None:
        title = self.title
        super().close()
        self.title = title


class _Borrowed(TensorParallel):
    """The same weights as the plain scheme's, in other modules."""

    def __init__(self, bench: Bench, plain: TensorParallel) -> None:
        super().__init__(bench)
        self.title = f"{plain.title}{self.addition}"
        self.plain = plain

    addition = ""

    def needs(self) -> int:
        return 0

    def refusal(self) -> str | None:
        if not self.ranks.on_gpus:
            return "there is no symmetric memory of a processor"
        return super().refusal()

    def open(self) -> None:
        if not self.plain.built:
            raise RuntimeError(f"it takes its weights from {self.plain.title}, which was not built")
        layers = []
        for source in self.plain.model.layers:
            with torch.device("meta"):
                layer = self.layer().to(self.shape.dtype)
            layers.append(borrow(layer, source))
        self.model = Stack(layers).eval()
        self.group_name = dist.group.WORLD.group_name

    def close(self) -> None:
        plain = self.plain
        super().close()
        self.plain = plain


class TensorParallelSymmetric(_Borrowed):
    """The sums by torch's symmetric memory instead of NCCL: one step for few bytes, two for many. No multicast."""

    addition = " symmetric"
    ONE_STEP_BYTES = 1 << 20

    def variants(self, tokens: int) -> list[Variant]:
        import torch.distributed._symmetric_memory as symmetric

        size = self.ranks.size * tokens * self.shape.width
        self.buffer = symmetric.empty(size, dtype=self.shape.dtype, device=self.ranks.device)
        symmetric.rendezvous(self.buffer, self.group_name)
        return super().variants(tokens)

    def combine(self, x: torch.Tensor) -> torch.Tensor:
        self.buffer.copy_(x.flatten())
        if x.nbytes <= self.ONE_STEP_BYTES:
            return torch.ops.symm_mem.one_shot_all_reduce(self.buffer, "sum", self.group_name).view_as(x)
        return torch.ops.symm_mem.two_shot_all_reduce_(self.buffer, "sum", self.group_name).view_as(x)


class OverlappedLayer(Layer):
    """Between its products each rank has the tokens of its own sequence only; gathering them and summing up for them is
    done in pieces beside the products, as torch's asynchronous tensor parallelism does."""

    group_name = ""

    def sequences(self) -> int:
        """How many the tokens of all ranks are."""
        return dist.get_world_size()

    def _gathered(self, x: torch.Tensor, *linears: nn.Linear) -> list[torch.Tensor]:
        weights = [linear.weight.t() for linear in linears]
        return torch.ops.symm_mem.fused_all_gather_matmul(x, weights, 0, self.group_name)[1]

    def _scattered(self, x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, linear.weight.t(), "sum", 0, self.group_name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention, sequences = self.attention, self.sequences()
        x = x.flatten(0, 1)
        everyones = self._gathered(self.input_norm(x), attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (part.view(sequences, -1, part.shape[-1] // attention.head, attention.head) for part in everyones)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        x = x + self._scattered(mixed.transpose(1, 2).flatten(2).flatten(0, 1), attention.o_proj)
        gate, up = self._gathered(self.post_norm(x), self.gate_proj, self.up_proj)
        return (x + self._scattered(F.silu(gate) * up, self.down_proj)).unsqueeze(0)


class TensorParallelOverlapped(_Borrowed):
    """Sequence parallel beside it, with torch's fused gather-and-multiply and multiply-and-scatter."""

    addition = " overlapped"
    suffixes = ("",)

    def layer(self) -> nn.Module:
        layer = OverlappedLayer(self.shape.part(self.ranks.size), self.shape.head)
        layer.group_name = dist.group.WORLD.group_name
        return layer

    def open(self) -> None:
        import torch.distributed._symmetric_memory  # noqa: F401  # the operators

        super().open()

    def variants(self, tokens: int) -> list[Variant]:
        x = self.input(tokens)
        return [
            Variant(
                self.title,
                lambda: self.model(x),
                check="close",
                tolerance=tolerance_of(self.shape),
                details={"mode": "eager"},
            )
        ]

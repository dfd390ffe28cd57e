# SPDX-License-Identifier: Apache-2.0
"""The model of e2e.py sharded by layershard: whole layers, and one striped store for prefill and decode.

Knows layershard.torch; nothing of rounds or of what a good result would be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from e2e_model import empty_stack, values
from e2e_schemes import UNDIVIDED, Bench, Captured, StackScheme, all_tokens, tolerance_of
from torch_table import Variant

import layershard.torch

LINEARS = "layers.*_proj"
BY_COLUMNS = {"*": "rows", "*o_proj.weight": "columns", "*down_proj.weight": "columns"}


class Layershard(StackScheme):
    """Layers stored once; k ahead; @share of the remote layers resident, or "auto": as many as there is memory for."""

    def __init__(self, bench: Bench, prefetch: int, share: float | str, title: str) -> None:
        super().__init__(bench)
        self.prefetch = prefetch
        self.title = title
        self.resident: int | str = share if isinstance(share, str) else "all"
        if not isinstance(share, str) and share < 1:
            remote = self.shape.layers - bench.most_own
            self.resident = int(remote * share + 1e-6) * self.shape.layer_bytes

    def needs(self) -> int:
        if self.resident == "all":
            return self.shape.bytes
        residents = self.resident if isinstance(self.resident, int) else 0
        return (self.bench.most_own + self.prefetch + 1) * self.shape.layer_bytes + residents

    def shard(self) -> None:
        layershard.torch.shard(
            self.model,
            "layers.*" if self.bench.scope == "block" else LINEARS,
            scope=self.bench.scope,
            prefetch=self.prefetch,
            placement="whole",
            resident=self.resident,
            transport=self.bench.transport,
            device=self.ranks.device,
            **({"reserve": self.bench.passing_bytes} if self.resident == "auto" else {}),
        )

    def open(self) -> None:
        self.model = empty_stack(self.shape, self.bench.layer)
        with measured_memory(self):
            self.shard()
            layershard.torch.fill(self.model, lambda name, like: values(name, like, self.ranks.device))
        self.handle = layershard.torch.of(self.model)
        series = list(self.handle.stats().values())
        self.memory = {
            "variant": self.title,
            "windows": max(each.windows for each in series),
            "residents": max(each.residents for each in series),
            "layers_bytes": self.shape.bytes,
            "counted_bytes": sum(each.shard_bytes + each.window_bytes + each.resident_bytes for each in series),
            "expected_bytes": self._expected_bytes(
                max(each.windows for each in series), sum(each.resident_bytes for each in series)
            ),
            "driver_bytes": self.taken_bytes,
        }

    def _expected_bytes(self, windows: int, residents: int) -> int:
        """(1/n + windows) of the layers, and residents: as many as were asked for, where a number was."""
        if self.resident != "auto":
            residents = self.shape.bytes if self.resident == "all" else int(self.resident)
        own = self.bench.shape.layers // self.ranks.size
        own += self.ranks.rank < self.bench.shape.layers % self.ranks.size
        return min((own + windows) * self.shape.layer_bytes + residents, self.shape.bytes)

    def details(self) -> dict[str, Any]:
        memory = self.memory or {}
        return {"prefetch": self.prefetch, "windows": memory["windows"], "residents": memory["residents"]}

    def prepare(self) -> None:
        self.handle.prepare()

    def join(self) -> None:
        self.handle.join()

    def close(self) -> None:
        self.ranks.synchronize()
        self.ranks.barrier()  # nobody reads what another closes
        self.handle.close()
        for name in ("model", "handle", "taken_bytes"):
            delattr(self, name)
        self.ranks.barrier()


@contextlib.contextmanager
def measured_memory(scheme: Any) -> Iterator[None]:
    """Puts into scheme.taken_bytes what its device has less of afterwards, by the driver; a rank's part of it."""
    before = scheme.bench.free_for_all()
    yield
    after = scheme.bench.free_for_all()
    scheme.taken_bytes = None if before is None else (before - after) // scheme.bench.ranks_here


class TwoRegimes(Layershard):
    """One striped store: gathered layers for prefill, tensor-parallel products from the stripes for decode."""

    suffixes = (" gathered", " parallel", " parallel, graph")

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, 1, 0, "two regimes")

    def needs(self) -> int:
        return self.shape.bytes // self.ranks.size + 2 * self.shape.layer_bytes

    def refusal(self) -> str | None:
        return None if self.shape.divides_by(self.ranks.size) else UNDIVIDED

    def shard(self) -> None:
        how = {"scope": "block", "prefetch": self.prefetch, "placement": "striped", "stripe": BY_COLUMNS}
        layershard.torch.shard(self.model, LINEARS, transport=self.bench.transport, device=self.ranks.device, **how)

    def _expected_bytes(self, windows: int, residents: int) -> int:
        return self.shape.bytes // self.ranks.size + windows * self.shape.layer_bytes

    def open(self) -> None:
        super().open()
        self.regime = layershard.torch.dual(self.model)

    def refusal_of(self, suffix: str) -> str | None:
        if suffix and self.ranks.shares_device:
            return "its sums need NCCL, which refuses two ranks on one GPU"
        return super().refusal_of(suffix)

    def variants(self, tokens: int) -> list[Variant]:
        x, details = self.input(tokens), self.details()
        everyones = all_tokens(self, tokens)

        def parallel(x: torch.Tensor) -> torch.Tensor:
            with self.regime.parallel():
                return self.model(x)

        mine = slice(self.ranks.rank, self.ranks.rank + 1)
        captured = Captured(self.bench, parallel, everyones)
        made = [Variant(f"{self.title} gathered", lambda: self.model(x), rest=self.prepare, details=details)]
        runs = [(" parallel", lambda: parallel(everyones)), (" parallel, graph", captured)]
        made += [
            Variant(self.title + suffix, lambda run=run: run()[mine], check="close", tolerance=tolerance_of(self.shape))
            for suffix, run in runs
            if self.refusal_of(suffix) is None
        ]
        return made

    def close(self) -> None:
        if hasattr(self, "regime"):
            del self.regime
        super().close()

# SPDX-License-Identifier: Apache-2.0
"""Passes of e2e.py in which ranks do not do the same: the last one begins late, or it alone makes passes.

Where ranks need not go in step a late one costs the others nothing. How much faster a rank is when no other one reads
the same sources is what reading at once costs it. Knows the schemes whose passes they are; nothing of how those work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from e2e_layershard import Layershard
from e2e_schemes import Bench, Replicated, Scheme
from torch_table import Variant


class Uneven(Scheme):
    """The eager passes of another scheme; its ratio is to those."""

    counted = slice(None)

    def __init__(self, bench: Bench, scheme: Scheme, title: str) -> None:
        super().__init__(bench)
        self.scheme = scheme
        self.title = title

    def needs(self) -> int:
        return 0

    def refusal(self) -> str | None:
        if self.ranks.size < 2:
            return "there is no other rank"
        if self.ranks.shares_device:
            return "on a GPU that ranks share the others have as much of it as one of them leaves"
        return None

    def open(self) -> None:
        if not self.scheme.built:
            raise RuntimeError(f"its passes are those of {self.scheme.title}, which was not built")

    @property
    def is_last(self) -> bool:
        return self.ranks.rank == self.ranks.size - 1

    def passes(self, even: Variant, tokens: int) -> Callable[[], torch.Tensor | None]:
        raise NotImplementedError

    def details(self) -> dict[str, Any]:
        return {}

    def variants(self, tokens: int) -> list[Variant]:
        even = self.scheme.variants(tokens)[0]
        details = even.details | self.details()
        run = self.passes(even, tokens)
        return [dataclasses.replace(even, name=self.title, run=run, baseline=even.name, details=details,
                                    counted=self.counted)]  # fmt: skip

    def close(self) -> None:
        """What it holds is the other scheme's."""


class LastLate(Uneven):
    """The last rank computes more before each pass, from the replicated variant's layers: the others' times count."""

    counted = slice(None, -1)

    def __init__(self, bench: Bench, scheme: Scheme, replicated: Replicated) -> None:
        super().__init__(bench, scheme, f"{scheme.title}, last rank late")
        self.replicated = replicated

    def open(self) -> None:
        super().open()
        if not self.replicated.built:
            raise RuntimeError("it computes from the replicated variant's layers, which were not built")

    def details(self) -> dict[str, Any]:
        return {"late_percent": self.bench.late_percent}

    def passes(self, even: Variant, tokens: int) -> Callable[[], torch.Tensor | None]:
        x, layers = self.input(tokens), self.replicated.model.layers
        more = round(self.shape.layers * self.bench.late_percent / 100)

        def late() -> torch.Tensor | None:
            for number in range(more):
                layers[number % len(layers)](x)
            return even.run()

        return late if self.is_last else even.run


class LastAlone(Uneven):
    """The last rank makes passes, nobody else reads: its times count."""

    counted = slice(-1, None)

    def __init__(self, bench: Bench, scheme: Layershard) -> None:
        super().__init__(bench, scheme, f"{scheme.title}, last rank alone")

    def refusal(self) -> str | None:
        if "callback" in self.bench.transport or "lockstep" in self.bench.transport:
            return f"by {self.bench.transport} no rank makes a pass without the others"
        return super().refusal()

    def passes(self, even: Variant, tokens: int) -> Callable[[], torch.Tensor | None]:
        return even.run if self.is_last else lambda: None

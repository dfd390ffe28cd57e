# SPDX-License-Identifier: Apache-2.0
"""Passes of e2e.py in which ranks do not do the same: the last one begins late, or it alone makes passes.

Where ranks need not go in step a late one costs the others nothing. How much faster a rank is when no other one reads
the same sources is what reading at once costs it. Knows the ways whose passes they are; nothing of how those work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from e2e_arms import Bench, Replicated, Way
from e2e_layershard import Layershard
from torch_table import Arm


class Uneven(Way):
    """The eager passes of another way; its ratio is to those."""

    counted = slice(None)

    def __init__(self, bench: Bench, way: Way, title: str) -> None:
        super().__init__(bench)
        self.way = way
        self.title = title

    def needs(self) -> int:
        return 0

    def refusal(self) -> str | None:
        if self.meeting.size < 2:
            return "there is no other rank"
        if self.meeting.shares_device:
            return "on a GPU that ranks share the others have as much of it as one of them leaves"
        return None

    def open(self) -> None:
        if not self.way.built:
            raise RuntimeError(f"its passes are those of {self.way.title}, which was not built")

    @property
    def is_last(self) -> bool:
        return self.meeting.rank == self.meeting.size - 1

    def passes(self, even: Arm, tokens: int) -> Callable[[], torch.Tensor | None]:
        raise NotImplementedError

    def details(self) -> dict[str, Any]:
        return {}

    def arms(self, tokens: int) -> list[Arm]:
        even = self.way.arms(tokens)[0]
        details = even.details | self.details()
        run = self.passes(even, tokens)
        return [dataclasses.replace(even, name=self.title, run=run, baseline=even.name, details=details,
                                    counted=self.counted)]  # fmt: skip

    def close(self) -> None:
        """What it holds is the other way's."""


class LastLate(Uneven):
    """The last rank computes more before each pass, from the replicated arm's layers: the others' times count."""

    counted = slice(None, -1)

    def __init__(self, bench: Bench, way: Way, replicated: Replicated) -> None:
        super().__init__(bench, way, f"{way.title}, last rank late")
        self.replicated = replicated

    def open(self) -> None:
        super().open()
        if not self.replicated.built:
            raise RuntimeError("it computes from the replicated arm's layers, which were not built")

    def details(self) -> dict[str, Any]:
        return {"late_percent": self.bench.late_percent}

    def passes(self, even: Arm, tokens: int) -> Callable[[], torch.Tensor | None]:
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

    def __init__(self, bench: Bench, way: Layershard) -> None:
        super().__init__(bench, way, f"{way.title}, last rank alone")

    def refusal(self) -> str | None:
        if "callback" in self.bench.transport or "lockstep" in self.bench.transport:
            return f"by {self.bench.transport} no rank makes a pass without the others"
        return super().refusal()

    def passes(self, even: Arm, tokens: int) -> Callable[[], torch.Tensor | None]:
        return even.run if self.is_last else lambda: None

# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism for the benches: each rank has the layers of one stage, and activations go from stage to stage.

On GPUs by torch's symmetric memory: a stage writes what it has made into the memory of the next one, on its own stream,
both signal on their streams, so that no host waits and nothing spins but one small kernel. Beside it by NCCL's send and
recv, as engines do it; on processors by gloo's.

Knows torch.distributed and the replicated scheme, from whose layers stages compute; nothing of layershard or of rounds.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from e2e_model import borrow
from e2e_schemes import Bench, Replicated, Scheme, has_nccl
from sequence_model import ChunkLayer
from torch import nn

Compute = Callable[[int, torch.Tensor], torch.Tensor]  # of a micro-batch, by its number


# ---- How activations travel ---------------------------------------------------------------------------------------


class Messages:
    """By send and recv of the default group, which is asked for a micro-batch when the one before is computed: a recv
    that waits takes multiprocessors from the compute."""

    def __init__(self, bench: Bench) -> None:
        self.ranks, self.shape = bench.ranks, bench.shape
        self.sent: collections.deque[tuple[torch.Tensor, Any]] = collections.deque()

    def arrivals(self, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
        for tokens in lengths:
            buffer = torch.empty(1, tokens, self.shape.width, dtype=self.shape.dtype, device=self.ranks.device)
            dist.recv(buffer, src=self.ranks.rank - 1)
            yield buffer

    def send(self, x: torch.Tensor) -> None:
        x = x.contiguous()
        self.sent.append((x, dist.isend(x, dst=self.ranks.rank + 1)))
        if len(self.sent) > 2:
            self.sent.popleft()[1].wait()

    def end(self) -> None:
        while self.sent:
            self.sent.popleft()[1].wait()

    def told(self) -> None:
        """The first stage: goes on when the last one has ended."""
        dist.recv(torch.empty(1, device=self.ranks.device), src=self.ranks.size - 1)

    def tell(self) -> None:
        dist.send(torch.ones(1, device=self.ranks.device), dst=0)


class Signals:
    """By symmetric memory: @slots places on each rank, into which the stage before writes. A signal is taken by who
    waits for it, and one that was not taken holds up the next: a place is written again when it was given back."""

    SLOTS = 4
    END = 2 * SLOTS  # channels: arrivals, places given back, the end

    def __init__(self, bench: Bench, most_tokens: int) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.ranks, self.shape = bench.ranks, bench.shape
        shape = (self.SLOTS, most_tokens, self.shape.width)
        self.memory = symmetric.empty(*shape, dtype=self.shape.dtype, device=self.ranks.device)
        self.handle = symmetric.rendezvous(self.memory, dist.group.WORLD.group_name)
        after = self.ranks.rank + 1
        self.next = self.handle.get_buffer(after, shape, self.shape.dtype) if after < self.ranks.size else None
        self.written = self.read = 0

    def arrivals(self, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
        before = self.ranks.rank - 1
        for tokens in lengths:
            slot = self.read % self.SLOTS
            self.read += 1
            self.handle.wait_signal(before, channel=slot)
            yield self.memory[slot, :tokens].unsqueeze(0)
            self.handle.put_signal(before, channel=self.SLOTS + slot)

    def send(self, x: torch.Tensor) -> None:
        after, slot = self.ranks.rank + 1, self.written % self.SLOTS
        if self.written >= self.SLOTS:
            self.handle.wait_signal(after, channel=self.SLOTS + slot)
        self.written += 1
        self.next[slot, : x.shape[1]].copy_(x.squeeze(0))
        self.handle.put_signal(after, channel=slot)

    def end(self) -> None:
        pass

    def told(self) -> None:
        self.handle.wait_signal(self.ranks.size - 1, channel=self.END)

    def tell(self) -> None:
        self.handle.put_signal(0, channel=self.END)


# ---- The scheme ---------------------------------------------------------------------------------------------------


class Pipeline(Scheme):
    """Stages of the replicated model's layers: a rank of an engine would have no others."""

    def __init__(self, bench: Bench, replicated: Replicated, most_tokens: int, signals: bool) -> None:
        super().__init__(bench)
        self.replicated, self.most_tokens, self.signals = replicated, most_tokens, signals
        self.title = f"PP{self.ranks.size}" + ("" if signals else " by send and recv")

    @property
    def is_first(self) -> bool:
        return self.ranks.rank == 0

    @property
    def is_last(self) -> bool:
        return self.ranks.rank == self.ranks.size - 1

    def needs(self) -> int:
        """The places; layers are the replicated scheme's."""
        size = torch.empty(0, dtype=self.shape.dtype).element_size()
        return Signals.SLOTS * self.most_tokens * self.shape.width * size if self.signals else 0

    @property
    def weight_bytes(self) -> int:
        return len(self.stage) * self.shape.layer_bytes

    def refusal(self) -> str | None:
        if self.shape.layers < self.ranks.size:
            return "there are fewer layers than ranks"
        if self.signals:
            return None if self.ranks.on_gpus else "there is no symmetric memory of a processor"
        return has_nccl(self.ranks)

    def open(self) -> None:
        if not self.replicated.built:
            raise RuntimeError("it takes its layers from the replicated variant, which was not built")
        bounds = [self.shape.layers * each // self.ranks.size for each in (self.ranks.rank, self.ranks.rank + 1)]
        self.stage: list[nn.Module] = list(self.replicated.model.layers)[slice(*bounds)]
        with torch.device("meta"):
            chunked = [ChunkLayer(self.shape, self.shape.head).to(self.shape.dtype) for _ in self.stage]
        self.chunked = [borrow(layer, source) for layer, source in zip(chunked, self.stage, strict=True)]
        self.way: Any = Signals(self.bench, self.most_tokens) if self.signals else Messages(self.bench)

    def run(self, lengths: Sequence[int], inputs: Callable[[int], torch.Tensor], compute: Compute) -> None:
        """@lengths of micro-batches; @inputs are asked on the first stage, and what @compute gives goes on."""
        arriving = map(inputs, range(len(lengths))) if self.is_first else self.way.arrivals(lengths)
        for number, x in enumerate(arriving):
            made = compute(number, x)
            if not self.is_last:
                self.way.send(made)
        self.way.end()

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """A sequence through this stage."""
        for layer in self.stage:
            x = layer(x)
        return x

    def begin_chunks(self, tokens: int) -> None:
        """Of one sequence: its keys and values are kept."""
        size = (2, 1, self.shape.kv_heads, tokens, self.shape.head)
        for layer in self.chunked:
            layer.attention.cache = torch.empty(*size, dtype=self.shape.dtype, device=self.ranks.device)

    def chunk(self, x: torch.Tensor, begin: int) -> torch.Tensor:
        for layer in self.chunked:
            layer.attention.begin = begin
            x = layer(x)
        return x

    def end_chunks(self) -> None:
        for layer in self.chunked:
            del layer.attention.cache

    def close(self) -> None:
        self.ranks.synchronize()
        self.ranks.barrier()
        for name in ("stage", "chunked", "way"):
            delattr(self, name)
        self.ranks.barrier()


def chunk_lengths(tokens: int, most: int) -> list[int]:
    """Of @most tokens, and what is left."""
    return [min(most, tokens - begin) for begin in range(0, tokens, most)]

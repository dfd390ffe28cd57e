# SPDX-License-Identifier: Apache-2.0
"""Layers fetched into windows without layershard, for e2e.py: by broadcasts, as the original does it, and by copies of
a peer's tensors.

Each is used as its makers would: a layer's tensors in one piece, a stream of its own, the next layers fetched across
passes. Knows torch.distributed and CUDA IPC; nothing of layershard.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from e2e_model import Layer, use_memory
from e2e_schemes import Bench, Replicated, Scheme, has_nccl
from torch.multiprocessing.reductions import reduce_tensor
from torch_table import Variant

WINDOWS = 2


class Windowed(Scheme):
    """Two windows, always kept full: one is filled again as soon as its layer is done with, with the layer that
    travels next. Layers are read from the replicated variant's memory."""

    def __init__(self, bench: Bench, replicated: Replicated) -> None:
        super().__init__(bench)
        self.replicated = replicated

    def needs(self) -> int:
        return WINDOWS * self.shape.layer_bytes

    def source_of(self, layer: int) -> int:
        return layer % self.ranks.size

    def travellers(self) -> list[int]:
        raise NotImplementedError

    def move(self, layer: int, window: torch.Tensor) -> Any:
        """Enqueue the bytes' transfer on the current stream; something to wait for, or None."""
        raise NotImplementedError

    def open(self) -> None:
        if not self.replicated.built:
            raise RuntimeError("it takes its layers from the replicated variant, which was not built")
        device = self.ranks.device
        self.windows = [torch.empty(self.shape.layer_bytes, dtype=torch.uint8, device=device) for _ in range(WINDOWS)]
        with torch.device("meta"):
            made = [Layer(self.shape, self.shape.head).to(self.shape.dtype).eval() for _ in range(WINDOWS)]
        self.through = [use_memory(layer, window) for layer, window in zip(made, self.windows)]
        self.path = self.travellers()
        self.started = self.done = 0
        self.under_way: list[Any] = [None] * WINDOWS
        if self.ranks.on_gpus:
            self.stream = torch.cuda.Stream()
            self.freed = torch.cuda.Event()
            self.ready = [torch.cuda.Event() for _ in range(WINDOWS)]
            self.freed.record()

    def _start(self) -> None:
        window, layer = self.started % WINDOWS, self.path[self.started % len(self.path)]
        self.started += 1
        if not self.ranks.on_gpus:
            self.under_way[window] = self.move(layer, self.windows[window])
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.freed)
            work = self.move(layer, self.windows[window])
            if work is not None:
                work.wait()  # this stream's, not the host's
            self.ready[window].record(self.stream)

    def _refill(self) -> None:
        while self.path and self.started < self.done + WINDOWS:
            self._start()

    def _await(self, window: int) -> None:
        if self.ranks.on_gpus:
            torch.cuda.current_stream().wait_event(self.ready[window])
        elif self.under_way[window] is not None:
            self.under_way[window].wait()
            self.under_way[window] = None

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in range(self.shape.layers):
            self._refill()
            if not self.path or self.path[self.done % len(self.path)] != layer:
                x = self.replicated.model.layers[layer](x)
                continue
            window = self.done % WINDOWS
            own = self.source_of(layer) == self.ranks.rank
            if not own:
                self._await(window)
            x = (self.replicated.model.layers[layer] if own else self.through[window])(x)
            if own and not self.ranks.on_gpus:
                self._await(window)
            if self.ranks.on_gpus:
                self.freed.record()
            self.done += 1
        self._refill()
        return x

    def rest(self) -> None:
        """What is under way is the beginning of the next pass, and is kept."""
        for window in range(WINDOWS):
            self._await(window)

    def variants(self, tokens: int) -> list[Variant]:
        x = self.input(tokens)
        details = {"mode": "eager", "prefetch": 1, "windows": WINDOWS}
        return [Variant(self.title, lambda: self.run(x), rest=self.rest, details=details)]

    def close(self) -> None:
        self.ranks.synchronize()
        self.ranks.barrier()
        kept = {"bench", "ranks", "shape", "memory", "replicated"}
        for name in set(vars(self)) - kept:
            delattr(self, name)
        self.ranks.barrier()


class Broadcast(Windowed):
    """The original's scheme: every layer by torch.distributed's broadcast from its source, all ranks in step, in a
    group and on a stream of its own, one layer ahead. The source computes from its own memory."""

    title = "broadcast"

    def refusal(self) -> str | None:
        return has_nccl(self.ranks)

    def travellers(self) -> list[int]:
        return list(range(self.shape.layers))

    def open(self) -> None:
        super().open()
        self.group = dist.new_group(backend="nccl" if self.ranks.on_gpus else "gloo")

    def move(self, layer: int, window: torch.Tensor) -> Any:
        source = self.source_of(layer)
        memory = self.replicated.layers[layer] if source == self.ranks.rank else window
        return dist.broadcast(memory, src=source, group=self.group, async_op=True)


class PeerCopy(Windowed):
    """copy_ from the source's tensor, mapped by CUDA IPC as torch does it: the copy is then a stream's of the GPU it
    comes from."""

    title = "peer copy"

    def refusal(self) -> str | None:
        return None if self.ranks.on_gpus else "there is no CUDA IPC on a processor"

    def travellers(self) -> list[int]:
        return [layer for layer in range(self.shape.layers) if self.source_of(layer) != self.ranks.rank]

    def open(self) -> None:
        super().open()
        offered = {
            layer: reduce_tensor(memory)
            for layer, memory in enumerate(self.replicated.layers)
            if self.source_of(layer) == self.ranks.rank
        }
        everyones = self.ranks.gather(offered)
        self.remote: dict[int, torch.Tensor] = {}
        for layer in self.path:
            rebuild, arguments = everyones[self.source_of(layer)][layer]
            self.remote[layer] = rebuild(*arguments)

    def move(self, layer: int, window: torch.Tensor) -> None:
        window.copy_(self.remote[layer], non_blocking=True)

# SPDX-License-Identifier: Apache-2.0
"""What the schemes of e2e.py have in common: a scheme is one way to store the model, with a variant for each mode of
running it (eager, from a CUDA graph, compiled, compiled to graphs). And the replicated model.

A scheme says what memory it needs before it takes any, and why it cannot be run where it cannot. Knows the model;
nothing of rounds or of what a good result would be.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from e2e_model import Layer, Shape, Stack, empty_stack, tokens_of, use_memory, values
from torch_launch import Ranks
from torch_table import Variant

UNDIVIDED = "heads or hidden columns do not divide by the number of ranks"
Pass = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class Bench:
    """What all schemes have in common."""

    ranks: Ranks
    shape: Shape
    transport: str = "auto"
    scope: str = "block"
    late_percent: float = 50  # of a pass, by which the last rank is late where one is
    # Memory of all captured graphs: one replays at a time, and nothing lives from one to another.
    graph_memory: Any = None
    layer: type[Layer] = Layer
    passing_bytes: int = 0  # what passes need on this rank beside weights and windows

    @property
    def most_own(self) -> int:
        """Layers that the rank with the most of its own is source of."""
        return -(-self.shape.layers // self.ranks.size)

    @property
    def ranks_here(self) -> int:
        """On this rank's device."""
        return self.ranks.devices.count(self.ranks.device)

    def free_bytes(self) -> int | None:
        """Of this rank's device, by the driver; None on a processor."""
        if not self.ranks.on_gpus:
            return None
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.ranks.device)[0]

    def forget(self) -> None:
        """What only finished passes needed: the memory of graphs that are gone, compiled programs, workspaces."""
        self.graph_memory = None
        torch._dynamo.reset()
        gc.collect()
        if self.ranks.on_gpus:
            torch._C._cuda_clearCublasWorkspaces()  # one for each stream that something was captured on
            torch.cuda.empty_cache()

    def free_for_all(self) -> int | None:
        """Read when every rank on the device has given back what its allocator keeps, and before one takes more.
        Collective."""
        self.ranks.synchronize()
        self.free_bytes()
        self.ranks.barrier()
        free = self.free_bytes()
        self.ranks.barrier()
        return free


class Scheme:
    """One way to store the model: opened, asked for the variants of one number of tokens, closed."""

    title = ""
    suffixes: tuple[str, ...] = ("",)
    built = False

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.ranks = bench.ranks
        self.shape = bench.shape
        self.memory: dict[str, Any] | None = None

    def names(self) -> list[str]:
        """Of the variants it has."""
        return [self.title + suffix for suffix in self.suffixes]

    def needs(self) -> int:
        """Bytes on this rank, roughly, that it has while it is open."""
        raise NotImplementedError

    def passing(self) -> int:
        """Those that only a pass has, beside activations."""
        return 0

    def refusal(self) -> str | None:
        """Why it cannot be run here, apart from memory."""
        return None

    def refusal_of(self, suffix: str) -> str | None:
        """Why one of its variants cannot be run where the others can."""
        return None

    def open(self) -> None:
        raise NotImplementedError

    def variants(self, tokens: int) -> list[Variant]:
        raise NotImplementedError

    def close(self) -> None:
        """Drop what it holds. Collective."""
        for name in set(vars(self)) - {"bench", "ranks", "shape", "memory"}:
            delattr(self, name)

    def input(self, tokens: int) -> torch.Tensor:
        return tokens_of(self.ranks.rank, tokens, self.shape, self.ranks.device)


def no_graphs(ranks: Ranks) -> str | None:
    return None if ranks.on_gpus else "there are no CUDA graphs on a processor"


# ---- Eager, captured, compiled ------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


class Captured:
    """A pass as a CUDA graph, captured at the first call."""

    def __init__(
        self,
        bench: Bench,
        run: Pass,
        x: torch.Tensor,
        prepare: Callable[[], None] = _nothing,
        join: Callable[[], None] = _nothing,
    ) -> None:
        self._bench, self._run, self._x, self._prepare, self._join = bench, run, x, prepare, join
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: torch.Tensor | None = None

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(self._x)
            self._prepare()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            self._bench.graph_memory = self._bench.graph_memory or torch.cuda.graph_pool_handle()
            how = {"stream": stream, "pool": self._bench.graph_memory, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, **how):
                self._output = self._run(self._x)
                self._join()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = graph

    def __call__(self) -> torch.Tensor:
        if self._graph is None:
            self._capture()
        self._prepare()
        self._graph.replay()  # type: ignore[union-attr]
        return self._output  # type: ignore[return-value]


def compiled(model: Stack) -> Pass:
    """Layer by layer: they share what is compiled, and hooks are compiled with them. Every model of the run is a new
    variant of the same code: dynamo must neither give up after a few of them nor go on uncompiled."""
    torch._dynamo.config.recompile_limit = 64
    layers = [torch.compile(layer, dynamic=False, fullgraph=True) for layer in model.layers]

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run


def compiled_to_graphs(model: Stack) -> Pass:
    """The whole model, by the graphs that torch.compile makes of it: one, or what lies between the library's calls."""
    fast = torch.compile(model, dynamic=False, fullgraph=True, mode="reduce-overhead")

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        output: torch.Tensor = fast(x)
        return output

    return run


class StackScheme(Scheme):
    """A scheme whose model is a Stack that does all by itself."""

    suffixes = ("", ", graph", ", compiled", ", compiled graphs")
    model: Stack

    def refusal_of(self, suffix: str) -> str | None:
        return no_graphs(self.ranks) if suffix.endswith(("graph", "graphs")) else None

    def details(self) -> dict[str, Any]:
        return {}

    def prepare(self) -> None:
        pass

    def join(self) -> None:
        pass

    def variants(self, tokens: int) -> list[Variant]:
        x = self.input(tokens)
        details = self.details()
        captured = Captured(self.bench, self.model, x, self.prepare, self.join)
        fast, fast_graphs = compiled(self.model), compiled_to_graphs(self.model)
        runs: list[tuple[str, Callable[[], torch.Tensor], str]] = [
            ("", lambda: self.model(x), "bits"),
            (", graph", captured, "bits"),
            (", compiled", lambda: fast(x), "close"),  # what is fused is rounded less often
            (", compiled graphs", lambda: fast_graphs(x), "close"),
        ]
        return [
            Variant(
                self.title + suffix,
                run,
                rest=self.prepare,
                baseline="replicated" + suffix,
                check=check,
                details=details | {"mode": suffix.removeprefix(", ") or "eager"},
            )
            for suffix, run, check in runs
            if self.refusal_of(suffix) is None
        ]


# ---- Replicated ---------------------------------------------------------------------------------------------------


class Replicated(StackScheme):
    """All layers on every rank, each in one piece of memory: broadcasts and peer copies take them from there."""

    title = "replicated"

    def needs(self) -> int:
        return self.shape.bytes

    def open(self) -> None:
        self.model = empty_stack(self.shape, self.bench.layer)
        self.layers: list[torch.Tensor] = []
        for number, layer in enumerate(self.model.layers):
            memory = torch.empty(self.shape.layer_bytes, dtype=torch.uint8, device=self.ranks.device)
            use_memory(layer, memory)
            for name, parameter in layer.named_parameters(prefix=f"layers.{number}"):
                parameter.copy_(values(name, parameter, self.ranks.device))
            self.layers.append(memory)


def all_tokens(scheme: Scheme, tokens: int) -> torch.Tensor:
    """The sequences of all ranks: what a tensor-parallel pass computes in one."""
    device = scheme.ranks.device
    return torch.cat([tokens_of(rank, tokens, scheme.shape, device) for rank in range(scheme.ranks.size)])


def tolerance_of(shape: Shape) -> float:
    """Of sums in another order, through all layers."""
    return 1e-3 if shape.dtype == torch.float32 else 0.05


def has_nccl(ranks: Ranks) -> str | None:
    """Why collectives of the ranks' devices are not to be had."""
    if ranks.shares_device:
        return "NCCL refuses two ranks on one GPU, and gloo would carry it through the host"
    return None

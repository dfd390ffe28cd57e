#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One long prompt on several GPUs: the time to its first token by ways to divide it, in shuffled rounds.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so bench/torch/long_prompt.py --save long.json
    ... long_prompt.py --devices cpu,cpu --shape 32,88,4,2 --layers 4 --tokens 32 --chunk 8 --rounds 2 --margin 1000

Prefill by decoder layers of a 70B Llama's shape (e2e.py's), all ranks at work on one sequence:

context parallel        each rank has a piece of the first half and its mirror image in the second, so that all have as
                        much attention to compute; keys and values are gathered, layer by layer. All weights on each
                        rank; by layershard; by FSDP2
TP sequence parallel    tensor parallel, a sequence's tokens divided between the products; *overlapped*: asynchronous
PP in chunks            a stage of layers a rank, the prompt in chunks, each with the keys and values before it

Before the rounds each output is compared with that of the whole prompt on one device, and a pass's memory is read: peak
is what the weights take (with layershard's windows, the pipeline's places) and the most that tensors take beside them
and the input. Exit status: 0; 1 when something failed or an output was wrong; 3 when the result is inconclusive.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import e2e
import torch
import torch.distributed as dist
import torch_launch
import torch_save
from e2e_fsdp import Fsdp
from e2e_layershard import Layershard
from e2e_model import Layer, Shape, Stack, borrow, tokens_of
from e2e_schemes import Bench, Replicated, has_nccl, tolerance_of
from e2e_targets import Target, as_text, evaluate_tables
from e2e_tensor_parallel import OverlappedLayer, TensorParallel, TensorParallelOverlapped
from pipeline_schemes import Pipeline, chunk_lengths
from sequence_model import ContextLayer, SequenceParallelLayer, pieces_of
from torch import nn
from torch_launch import Ranks
from torch_rounds import LongRounds, WrongBits
from torch_table import Table, Variant, nothing

CONTEXT = "context parallel"
SHARDED = f"{CONTEXT}, layershard k=1"
TARGETS = (
    Target((SHARDED,), (CONTEXT,), 65536, 65536, 1.015),
    Target((SHARDED,), ("TP? sequence parallel*",), 65536, 65536, 0.95),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", help="GPU of each rank (0,1), or cpu,cpu; default all GPUs")
    add("--layers", type=e2e.positive, default=8, help="decoder layers (default %(default)s)")
    shape = "width, hidden, heads, key-value heads (default %(default)s)"
    add("--shape", type=e2e.shape_sizes, default="8192,28672,64,8", help=shape)
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default bfloat16; float32 on processors")
    add("--tokens", type=e2e.positives, default="32768,65536,131072", help="of the prompt, one table each")
    add("--chunk", type=e2e.positive, default=4096, help="tokens of a chunk (default %(default)s)")
    add("--variants", default="*", help="patterns of their names, separated by ';' (default all)")
    add("--rounds", type=e2e.positive, default=5, help="samples of each variant (default %(default)s)")
    margin = "a table is inconclusive where the control variant's first and last differ by more per cent"
    add("--margin", type=float, default=0.5, help=margin)
    minutes = "rounds end early, at least 3 are made, so that the last table is there in time"
    add("--minutes", type=float, help=minutes)
    add("--transport", help="of layershard (default auto; copies where ranks would compute in place)")
    add("--save", metavar="FILE", help="write the result as JSON after each length")
    options = parser.parse_args()
    try:
        options.devices = torch_launch.devices_of(options.devices)
    except ValueError as error:
        parser.error(f"--devices: {error}")
    whole = 2 * len(options.devices)
    if any(each % whole for each in options.tokens):
        parser.error(f"--tokens: {whole} pieces are needed, and not all of these numbers divide by {whole}")
    return options


# ---- Tensor parallel ----------------------------------------------------------------------------------------------


class SequenceParallel(TensorParallel):
    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.title += " sequence parallel"

    def layer(self) -> nn.Module:
        return SequenceParallelLayer(self.shape.part(self.ranks.size), self.shape.head)


class OneSequence(OverlappedLayer):
    def sequences(self) -> int:
        return 1


class SequenceParallelOverlapped(TensorParallelOverlapped):
    def layer(self) -> nn.Module:
        layer = OneSequence(self.shape.part(self.ranks.size), self.shape.head)
        layer.group_name = dist.group.WORLD.group_name
        return layer


# ---- Ways to compute one prompt -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Way:
    """run gives the output of the @positions, None where this rank has none of it."""

    name: str
    run: Callable[[], torch.Tensor | None]
    positions: list[slice]
    weight_bytes: int
    exact: bool = False  # equal to the control variant
    like_control: bool = False  # in what it gives, so that both can be compared
    begin: Callable[[], None] = nothing
    rest: Callable[[], None] = nothing
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def variant(self, token: torch.Tensor) -> Variant:
        def run() -> torch.Tensor:
            made = self.run()
            return token if made is None else made

        check = "none" if not self.like_control else "bits" if self.exact else "close"
        return Variant(self.name, run, self.begin, self.rest, check=check, details=self.details)


class Prompt:
    """The schemes, opened once."""

    def __init__(self, options: argparse.Namespace, bench: Bench) -> None:
        self.options, self.bench, self.ranks = options, bench, bench.ranks
        context = dataclasses.replace(bench, layer=ContextLayer)
        self.replicated, self.fsdp = Replicated(context), Fsdp(context)
        self.sharded = Layershard(context, 1, 0, "layershard k=1")
        self.parallel = SequenceParallel(bench)
        self.overlapped = SequenceParallelOverlapped(bench, self.parallel)
        self.pipelines = [Pipeline(bench, self.replicated, options.chunk, each) for each in (True, False)]
        self.schemes = e2e.Schemes(bench, ["*"], 0, activation_bytes=self._activation_bytes(max(options.tokens)))
        self.schemes.open([self.replicated, self.sharded, self.parallel, self.overlapped, *self.pipelines, self.fsdp])
        with torch.device("meta"):
            plain = [Layer(bench.shape, bench.shape.head).to(bench.shape.dtype) for _ in range(bench.shape.layers)]
        self.plain = Stack([borrow(*each) for each in zip(plain, self.replicated.model.layers, strict=True)])

    def _activation_bytes(self, tokens: int) -> int:
        """The whole prompt on one device, beside inputs and outputs, and what communicators take."""
        shape = self.bench.shape
        return torch.empty(0, dtype=shape.dtype).element_size() * tokens * (4 * shape.hidden + 8 * shape.width) + (
            4 << 30
        )

    def ways(self, x: torch.Tensor) -> list[Way]:
        tokens, rank, size = x.shape[1], self.ranks.rank, self.ranks.size
        pieces, part = pieces_of(rank, size, tokens), slice(rank * tokens // size, (rank + 1) * tokens // size)
        mine, divided = torch.cat([x[:, each] for each in pieces], dim=1), x[:, part].contiguous()
        whole, share = self.bench.shape.bytes, self.bench.shape.bytes // size
        found = [Way(CONTEXT, lambda: self.replicated.model(mine), pieces, whole, exact=True, like_control=True)]
        if self.sharded.built:
            counted = int((self.sharded.memory or {})["counted_bytes"])
            found.append(Way(SHARDED, lambda: self.sharded.model(mine), pieces, counted, exact=True,
                             like_control=True, rest=self.sharded.prepare))  # fmt: skip
        if self.fsdp.built:
            found.append(Way(f"{CONTEXT}, FSDP2 p=1", lambda: self.fsdp.model(mine), pieces, share,
                             like_control=True, begin=lambda: self.fsdp.prefetch(1, across=False)))  # fmt: skip
        for scheme in (self.parallel, self.overlapped):
            if scheme.built:
                found.append(Way(scheme.title, lambda scheme=scheme: scheme.model(divided), [part], share))
        for pipeline in self.pipelines:
            if pipeline.built:
                run = self._chunks_of(pipeline, x)
                places = [slice(0, tokens)] if pipeline.is_last else []
                weights = pipeline.weight_bytes + pipeline.needs()
                found.append(Way(f"{pipeline.title} in chunks", run, places, weights))
        patterns = e2e.Schemes(self.bench, self.options.variants.split(";"), 0)
        return [each for each in found if each.name == CONTEXT or patterns.chosen(each.name)]

    def _chunks_of(self, pipeline: Pipeline, x: torch.Tensor) -> Callable[[], torch.Tensor | None]:
        chunk = self.options.chunk
        lengths = chunk_lengths(x.shape[1], chunk)

        def run() -> torch.Tensor | None:
            made: list[torch.Tensor] = []

            def compute(number: int, x: torch.Tensor) -> torch.Tensor:
                x = pipeline.chunk(x, number * chunk)
                if pipeline.is_last:
                    made.append(x)
                return x

            pipeline.begin_chunks(x.shape[1])
            pipeline.run(lengths, lambda number: x[:, number * chunk : (number + 1) * chunk], compute)
            pipeline.end_chunks()
            if pipeline.is_last:
                pipeline.way.tell()
            if pipeline.is_first:
                pipeline.way.told()
            return torch.cat(made, dim=1) if made else None

        return run

    def _compare(self, way: Way, right: torch.Tensor) -> None:
        """Its first pass: what it takes of memory, and whether it is right."""
        on_gpus, device = self.ranks.on_gpus, self.ranks.device
        self.ranks.note(f"comparing {way.name}")
        self.ranks.synchronize()
        before = 0
        if on_gpus:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        way.begin()
        made = way.run()
        way.rest()
        self.ranks.synchronize()
        activations = torch.cuda.max_memory_allocated(device) - before if on_gpus else None
        far, trouble = 0.0, None
        if made is not None:
            wanted = torch.cat([right[:, each] for each in way.positions], dim=1)
            far = float((made - wanted).float().norm() / wanted.float().norm())
            if not far <= tolerance_of(self.bench.shape):
                trouble = f"{way.name} differs from the whole prompt on one device by {far:.3g} of its norm"
        trouble = self.ranks.agree(trouble)
        if trouble is not None:
            raise WrongBits(trouble)
        everyones = self.ranks.gather((way.weight_bytes, activations, far))
        way.details["distance"] = max(far for _, _, far in everyones)
        way.details["weight_bytes"] = max(weights for weights, _, _ in everyones)
        if on_gpus:
            way.details["activation_bytes"] = max(activations for _, activations, _ in everyones)
            way.details["peak_bytes"] = max(weights + activations for weights, activations, _ in everyones)

    def table(self, tokens: int, minutes: float | None) -> Table:
        x = tokens_of(0, tokens, self.bench.shape, self.ranks.device)
        ways = self.ways(x)
        right = self.plain(x)
        for way in ways:
            self._compare(way, right)
        del right
        self.bench.forget()
        token = torch.ones(1, device=self.ranks.device)
        rounds = LongRounds(self.ranks, passes=1, rounds=self.options.rounds, warm_ms=0,
                            margin_percent=self.options.margin, minutes=minutes)  # fmt: skip
        table = rounds.run([way.variant(token) for way in ways], f"{tokens} tokens, ")
        table.not_run.update(self.schemes.not_run)
        return table

    def close(self) -> None:
        del self.plain
        self.schemes.close()


def text_of(table: Table) -> str:
    lines = [table.as_text(), f"{'variant':<40}{'first token ms':>15}{'weights GB':>12}{'peak GB':>12}{'distance':>12}"]
    for row in table.rows():
        if not row["again"]:
            peak = f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "-"
            lines.append(f"{row['variant']:<40}{row['pass_ns']['median'] / 1e6:>15.1f}"
                         f"{row['weight_bytes'] / 1e9:>12.1f}{peak:>12}{row['distance']:>12.2g}")  # fmt: skip
    return "\n".join(lines)


def run_rank(options: argparse.Namespace, ranks: Ranks) -> int:
    trouble = has_nccl(ranks)
    if trouble is not None:
        ranks.say(f"long_prompt.py: {trouble}")
        return 1
    dtype = options.dtype or ("bfloat16" if ranks.on_gpus else "float32")
    shape = Shape(options.layers, *options.shape, dtype=getattr(torch, dtype))
    bench = Bench(ranks, shape, e2e.transport_of(options.transport, ranks))
    prompt = Prompt(options, bench)
    config = {name: value for name, value in vars(options).items() if name not in ("devices", "save")}
    config |= {"devices": [str(each) for each in ranks.devices], "dtype": dtype, "layer_bytes": shape.layer_bytes}
    tables: dict[int, Table] = {}
    for tokens in options.tokens:
        minutes = ranks.minutes_each(options.minutes, len(options.tokens) - len(tables))
        tables[tokens] = table = prompt.table(tokens, minutes)
        bench.forget()
        ranks.note("")
        ranks.say(f"\n{tokens} tokens\n{text_of(table)}")
        saved = [each.as_json(tokens=tokens) for tokens, each in tables.items()]
        targets = evaluate_tables(tables, ranks.on_gpus, TARGETS)
        result = {"bench": "long_prompt", "config": config, "tables": saved, "targets": targets}
        torch_save.save(options.save, ranks, result)
    ranks.say("\n" + as_text(targets))
    prompt.close()
    return 0 if all(table.conclusive for table in tables.values()) else e2e.INCONCLUSIVE


def main() -> int:
    options = arguments()
    for name, value in e2e.SWITCHES.items():
        os.environ.setdefault(name, value)
    return torch_launch.run(options.devices, lambda ranks: run_rank(options, ranks))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Requests on several GPUs: pipeline parallel beside replicas, layershard and tensor parallel, in shuffled rounds.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so bench/torch/pipeline.py --save pipeline.json
    ... pipeline.py --devices cpu,cpu --shape 32,88,4,2 --layers 4 --tokens 16 --requests 4 --rounds 2 --margin 1000

Prefill of requests by decoder layers of a 70B Llama's shape (e2e.py's). Three loads, one table each:

equal     a backlog of requests of one length, all there at the beginning
mixed     a backlog, lengths drawn from a lognormal distribution of the same mean, sigma 1
one       one request at a time: the next one comes when the one before has its first token

Replicas and layershard give each request to the rank that has had the fewest tokens, and compute it there; of one at a
time the other ranks are idle. TP computes each request on all ranks. PP has a stage a rank; *in chunks* a request is
several micro-batches, whose stages overlap. A pass is the whole load, and ends when its last request has: what filling
and draining a pipeline takes is in it, and not in the steady tokens/s, which are those between the first request's
end and the last one's. First token: from a request's arrival to the end of its last layer.

Outputs of all requests are compared with the replicated model's, before the rounds: bit for bit where the arithmetic is
the same. Exit status: 0; 1 when something failed or an output was wrong; 3 when the result is inconclusive.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import e2e
import torch
import torch_launch
import torch_save
from e2e_layershard import Layershard
from e2e_model import Shape, tokens_of
from e2e_schemes import Bench, Replicated, Scheme, tolerance_of
from e2e_tensor_parallel import TensorParallel
from pipeline_schemes import Pipeline, chunk_lengths
from torch_launch import Ranks
from torch_rounds import LongRounds, WrongBits
from torch_table import Table, Variant

LOADS = ("equal", "mixed", "one")
STEP = 16  # lengths are its multiples


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", help="GPU of each rank (0,1), or cpu,cpu; default all GPUs")
    add("--layers", type=e2e.positive, default=12, help="decoder layers (default %(default)s)")
    shape = "width, hidden, heads, key-value heads (default %(default)s)"
    add("--shape", type=e2e.shape_sizes, default="8192,28672,64,8", help=shape)
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default bfloat16; float32 on processors")
    add("--loads", default=",".join(LOADS), help="which (default %(default)s)")
    add("--tokens", type=e2e.positive, default=2048, help="of a request, or their mean (default %(default)s)")
    add("--sigma", type=float, default=1.0, help="of the mixed lengths' logarithm (default %(default)s)")
    add("--most-tokens", type=e2e.positive, default=16384, help="of a mixed request (default %(default)s)")
    add("--requests", type=e2e.positive, default=24, help="of a backlog; a third of it one at a time")
    add("--chunk", type=e2e.positive, help="tokens of a chunk (default: half of --tokens)")
    add("--variants", default="*", help="patterns of their names, separated by ';' (default all)")
    add("--rounds", type=e2e.positive, default=7, help="samples of each variant (default %(default)s)")
    margin = "a table is inconclusive where the control variant's first and last differ by more per cent"
    add("--margin", type=float, default=0.5, help=margin)
    add("--transport", help="of layershard (default auto; copies where ranks would compute in place)")
    add("--save", metavar="FILE", help="write the result as JSON after each load")
    options = parser.parse_args()
    try:
        options.devices = torch_launch.devices_of(options.devices)
    except ValueError as error:
        parser.error(f"--devices: {error}")
    unknown = set(options.loads.split(",")) - set(LOADS)
    if unknown:
        parser.error(f"--loads: there is no '{min(unknown)}'; there are: {', '.join(LOADS)}")
    options.chunk = options.chunk or max(1, options.tokens // 2)
    return options


# ---- Loads --------------------------------------------------------------------------------------------------------


def lognormal(count: int, mean: int, sigma: float, most: int, seed: int = 1) -> list[int]:
    """Lengths whose distribution has this mean; none above @most."""
    draw = random.Random(seed)
    drawn = [draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma) for _ in range(count)]
    return [min(most // STEP, max(1, round(each / STEP))) * STEP for each in drawn]


def lengths_of(load: str, options: argparse.Namespace) -> list[int]:
    if load == "mixed":
        return lognormal(options.requests, options.tokens, options.sigma, options.most_tokens)
    return [options.tokens] * (options.requests if load == "equal" else -(-options.requests // 3))


def share(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Numbers of the requests that each rank computes: as they come, to who has had the fewest tokens."""
    had, given = [0] * ranks, [[] for _ in range(ranks)]  # type: list[int], list[list[int]]
    for number, tokens in enumerate(lengths):
        rank = had.index(min(had))
        had[rank] += tokens
        given[rank].append(number)
    return given


# ---- When requests have their first tokens --------------------------------------------------------------------------


class Clock:
    """Of this rank, on the stream of the compute where there is one."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._begin: Any = None
        self._ends: dict[int, Any] = {}

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        self._begin, self._ends = self._now(), {}

    def end(self, request: int) -> None:
        self._ends[request] = self._now()

    def read(self) -> dict[int, float]:
        """Seconds from the beginning of the last pass to each request's end here. The device has finished."""
        if self._on_gpu:
            torch.cuda.synchronize()
            return {number: self._begin.elapsed_time(each) / 1e3 for number, each in self._ends.items()}
        return {number: each - self._begin for number, each in self._ends.items()}


def first_tokens(ends: Sequence[dict[int, float]], one_at_a_time: bool) -> list[float]:
    """Seconds that each request waited, from what all ranks read of one pass."""
    found = {number: seconds for each in ends for number, seconds in each.items()}
    ordered = [found[number] for number in sorted(found)]
    if not one_at_a_time:
        return ordered
    return [end - begin for begin, end in zip([0.0, *ordered], ordered)]


def steady(ends: Sequence[dict[int, float]], lengths: Sequence[int]) -> float | None:
    """Tokens a second between each rank's first end and its last."""
    total = 0.0
    for each in ends:
        by_time = sorted(each, key=lambda number: each[number])
        if len(by_time) > 1 and each[by_time[-1]] > each[by_time[0]]:
            total += sum(lengths[number] for number in by_time[1:]) / (each[by_time[-1]] - each[by_time[0]])
    return total or None


def spread(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)) - 1)]
    named = {"mean": statistics.mean(ordered), "median": statistics.median(ordered), "p90": at, "most": ordered[-1]}
    return {name: 1e3 * each for name, each in named.items()}


# ---- What a variant does with a load --------------------------------------------------------------------------------


class Load:
    """A load's requests, and what is found of them."""

    def __init__(self, bench: Bench, name: str, lengths: list[int], chunk: int) -> None:
        self.ranks, self.name, self.lengths, self.chunk_tokens = bench.ranks, name, lengths, chunk
        self.one = name == "one"
        self.inputs = [tokens_of(each, tokens, bench.shape, self.ranks.device) for each, tokens in enumerate(lengths)]
        self.clock = Clock(self.ranks.on_gpus)
        self.kept: dict[int, torch.Tensor] | None = None
        self.token = torch.ones(1, device=self.ranks.device)

    def ended(self, request: int, output: torch.Tensor) -> None:
        self.clock.end(request)
        if self.kept is not None:
            self.kept[request] = output

    def by_replicas(self, model: Callable[[torch.Tensor], torch.Tensor]) -> None:
        given = share(self.lengths, 1 if self.one else self.ranks.size)
        for number in given[self.ranks.rank] if self.ranks.rank < len(given) else ():
            self.ended(number, model(self.inputs[number]))

    def by_tensors(self, model: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for number, x in enumerate(self.inputs):
            output = model(x)
            if self.ranks.rank == 0:
                self.ended(number, output)

    def by_stages(self, pipeline: Pipeline, in_chunks: bool) -> None:
        """One at a time the first stage waits for the last one's end, and also at a pass's end."""
        every = range(len(self.lengths))
        groups = [[number] for number in every] if self.one else [list(every)]
        for group in groups:
            (self._chunks if in_chunks else self._stages)(pipeline, group)
            if pipeline.is_last:
                pipeline.way.tell()
            if pipeline.is_first:
                pipeline.way.told()

    def _stages(self, pipeline: Pipeline, numbers: list[int]) -> None:
        def compute(at: int, x: torch.Tensor) -> torch.Tensor:
            made = pipeline.whole(x)
            if pipeline.is_last:
                self.ended(numbers[at], made)
            return made

        lengths = [self.lengths[number] for number in numbers]
        pipeline.run(lengths, lambda at: self.inputs[numbers[at]], compute)

    def _chunks(self, pipeline: Pipeline, numbers: list[int]) -> None:
        pieces = [
            (number, begin, length)
            for number in numbers
            for begin, length in zip(
                range(0, self.lengths[number], self.chunk_tokens),
                chunk_lengths(self.lengths[number], self.chunk_tokens),
            )
        ]
        made: list[torch.Tensor] = []

        def compute(at: int, x: torch.Tensor) -> torch.Tensor:
            number, begin, length = pieces[at]
            if begin == 0:
                pipeline.begin_chunks(self.lengths[number])
            x = pipeline.chunk(x, begin)
            if pipeline.is_last:
                made.append(x)
                if begin + length == self.lengths[number]:
                    self.ended(number, torch.cat(made, dim=1) if self.kept is not None else x)
                    made.clear()
            return x

        def piece(at: int) -> torch.Tensor:
            number, begin, length = pieces[at]
            return self.inputs[number][:, begin : begin + length]

        pipeline.run([length for _, _, length in pieces], piece, compute)
        pipeline.end_chunks()

    def pass_of(self, run: Callable[[], None]) -> Callable[[], torch.Tensor]:
        def whole() -> torch.Tensor:
            self.clock.begin()
            run()
            return self.token

        return whole


class Way:
    """A variant's run of one load, and when its requests ended in each sample."""

    def __init__(self, load: Load, name: str, run: Callable[[], None], exact: bool, weight_bytes: int) -> None:
        self.load, self.name, self.exact = load, name, exact
        self.samples: list[dict[int, float]] = []
        self.details: dict[str, Any] = {"load": load.name, "weight_bytes": weight_bytes}
        self.run = load.pass_of(run)

    def variant(self, rest: Callable[[], None]) -> Variant:
        def after() -> None:
            rest()
            self.samples.append(self.load.clock.read())

        return Variant(self.name, self.run, rest=after, check="none", details=self.details)

    def check(self, model: Callable[[torch.Tensor], torch.Tensor], tolerance: float) -> tuple[bool, str | None]:
        """One pass; whether all outputs on this rank are the replicated model's bits, and what is wrong with them."""
        self.load.kept = {}
        self.run()
        equal, trouble = True, None
        for number, output in self.load.kept.items():
            right = model(self.load.inputs[number])
            same = torch.equal(output, right)
            equal = equal and same
            far = 0.0 if same else float((output.float() - right.float()).norm() / right.float().norm())
            if not (same or (not self.exact and far <= tolerance)):
                trouble = f"{self.name}: request {number} differs from replicated by {far:.3g} of its norm"
        self.load.kept = None
        return equal, trouble

    def note(self, everyones: Sequence[Sequence[dict[int, float]]], rounds: int, pass_s: float) -> None:
        """@everyones: of each rank its samples; those of the rounds are the last ones but what was read apart."""
        taken = [list(each) for each in zip(*everyones)][1 : 1 + rounds]  # the first was tried
        waited = [first_tokens(each, self.load.one) for each in taken]
        self.details["first_token_ms"] = spread([statistics.median(each) for each in zip(*waited)])
        self.details["tokens_per_second"] = sum(self.load.lengths) / pass_s
        steadily = [each for each in (steady(ends, self.load.lengths) for ends in taken) if each]
        self.details["steady_tokens_per_second"] = statistics.median(steadily) if steadily else None


# ---- A run --------------------------------------------------------------------------------------------------------


class Requests:
    """The schemes, opened once."""

    def __init__(self, options: argparse.Namespace, bench: Bench, most_tokens: int) -> None:
        self.options, self.bench = options, bench
        self.replicated, self.sharded = Replicated(bench), Layershard(bench, 1, 0, "layershard k=1")
        self.parallel = TensorParallel(bench)
        self.pipelines = [Pipeline(bench, self.replicated, most_tokens, each) for each in (True, False)]
        self.schemes = e2e.Schemes(bench, ["*"], most_tokens)
        self.schemes.open([self.replicated, self.sharded, self.parallel, *self.pipelines])

    def ways(self, load: Load) -> list[tuple[Way, Scheme]]:
        shape, size = self.bench.shape, self.bench.ranks.size
        replicated, sharded, parallel = self.replicated, self.sharded, self.parallel
        found = [(Way(load, "replicated", lambda: load.by_replicas(replicated.model), True, shape.bytes), replicated)]
        if sharded.built:
            weights = int((sharded.memory or {})["counted_bytes"])
            run = Way(load, sharded.title, lambda: load.by_replicas(sharded.model), True, weights)
            found.append((run, sharded))
        if parallel.built:
            run = Way(load, parallel.title, lambda: load.by_tensors(parallel.model), False, shape.bytes // size)
            found.append((run, parallel))
        for each in self.pipelines:
            for suffix, in_chunks in (("", False), (" in chunks", True)) if each.built else ():
                run = Way(load, each.title + suffix, lambda p=each, c=in_chunks: load.by_stages(p, c), False,
                          each.weight_bytes)  # fmt: skip
                found.append((run, each))
        chosen = e2e.Schemes(self.bench, self.options.variants.split(";"), load.lengths[0]).chosen
        return [found[0], *[each for each in found[1:] if chosen(each[0].name)]]

    def table(self, load: Load) -> Table:
        ranks, options = self.bench.ranks, self.options
        ways = self.ways(load)
        equal: dict[str, bool] = {}
        for way, scheme in ways:
            ranks.note(f"{load.name}: comparing {way.name}")
            same, trouble = way.check(self.replicated.model, tolerance_of(self.bench.shape))
            trouble = ranks.agree(trouble)
            if trouble is not None:
                raise WrongBits(trouble)
            equal[way.name] = all(ranks.gather(same))
            self._rest(scheme)
            ranks.synchronize()
        rounds = LongRounds(ranks, passes=1, rounds=options.rounds, warm_ms=0, margin_percent=options.margin)
        table = rounds.run([way.variant(lambda s=scheme: self._rest(s)) for way, scheme in ways], f"{load.name}, ")
        table.equal.update(equal)
        table.not_run.update(self.schemes.not_run)
        for way, _ in ways:
            taken = ranks.gather(way.samples)
            if table.times[way.name]:
                way.note(taken, options.rounds, statistics.median(table.rounds_of(way.name)))
        return table

    def _rest(self, scheme: Scheme) -> None:
        if isinstance(scheme, Layershard):
            scheme.prepare()

    def close(self) -> None:
        self.schemes.close()


def as_text(table: Table) -> str:
    lines = [table.as_text(), f"{'variant':<40}{'tokens/s':>11}{'steady':>11}{'first token: median, p90, most ms':>36}"]
    for row in table.rows():
        if row["again"] or "first_token_ms" not in row:
            continue
        first = "".join(f"{row['first_token_ms'][name]:>12.2f}" for name in ("median", "p90", "most"))
        steadily = f"{row['steady_tokens_per_second']:.0f}" if row["steady_tokens_per_second"] else "-"
        lines.append(f"{row['variant']:<40}{row['tokens_per_second']:>11.0f}{steadily:>11}{first}")
    return "\n".join(lines)


def run_rank(options: argparse.Namespace, ranks: Ranks) -> int:
    dtype = options.dtype or ("bfloat16" if ranks.on_gpus else "float32")
    shape = Shape(options.layers, *options.shape, dtype=getattr(torch, dtype))
    bench = Bench(ranks, shape, e2e.transport_of(options.transport, ranks))
    loads = {name: lengths_of(name, options) for name in options.loads.split(",")}
    requests = Requests(options, bench, max(max(lengths) for lengths in loads.values()))
    config = {name: value for name, value in vars(options).items() if name not in ("devices", "save")}
    config |= {"devices": [str(each) for each in ranks.devices], "dtype": dtype, "layer_bytes": shape.layer_bytes}
    tables: list[dict[str, Any]] = []
    conclusive = True
    for name, lengths in loads.items():
        table = requests.table(Load(bench, name, lengths, options.chunk))
        bench.forget()
        conclusive = conclusive and table.conclusive
        total = f"{len(lengths)} requests of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all"
        ranks.note("")
        ranks.say(f"\n{name}: {total}\n{as_text(table)}")
        tables.append(table.as_json(load=name, lengths=lengths))
        torch_save.save(options.save, ranks, {"bench": "pipeline", "config": config, "tables": tables})
    requests.close()
    return 0 if conclusive else e2e.INCONCLUSIVE


def main() -> int:
    options = arguments()
    for name, value in e2e.SWITCHES.items():
        os.environ.setdefault(name, value)
    return torch_launch.run(options.devices, lambda ranks: run_rank(options, ranks))


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""e2e.py --whole: a model that is too large to be replicated, by layershard and tensor-parallel, each in turn:
one is freed before the next is built, and the second time the order is swapped.

Knows the two schemes and what to print of them; nothing of how they work.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import e2e_targets
import torch
import torch_save
from e2e_layershard import Layershard
from e2e_schemes import Bench, Scheme, tolerance_of
from e2e_tensor_parallel import TensorParallel, TensorParallelOverlapped
from torch_rounds import Rounds
from torch_table import Variant

SAMPLES = 5


def _sharded(bench: Bench) -> Scheme:
    return Layershard(bench, 1, 0, "layershard k=1")


class OverlappedAlone(TensorParallelOverlapped):
    """With weights of its own."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, TensorParallel(bench))

    def needs(self) -> int:
        return self.plain.needs()

    def open(self) -> None:
        self.plain.open()
        self.plain.built = True
        super().open()

    def close(self) -> None:
        super().close()
        self.plain.close()


class Stage:
    """One scheme, built, timed and freed."""

    def __init__(self, bench: Bench, rounds: Rounds, make: Any) -> None:
        self._bench = bench
        self._rounds = rounds
        self.scheme = make(bench)
        self.output: torch.Tensor | None = None

    def run(self, tokens: list[int]) -> list[dict[str, Any]]:
        ranks = self._bench.ranks
        ranks.note(f"building {self.scheme.title}")
        trouble = self.scheme.refusal()
        free, needed = self._bench.free_bytes(), self.scheme.needs() * self._bench.ranks_here
        if trouble is None and free is not None and needed > free:
            trouble = f"no memory: it would need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        trouble = ranks.agree(trouble)
        if trouble is not None:
            return [{"variant": self.scheme.title, "not_run": trouble}]
        self.scheme.open()
        weights_free = self._least_free()
        rows = [self._row(count, weights_free) for count in tokens]
        self.scheme.close()
        return rows

    def _least_free(self) -> int | None:
        return min((each for each in self._bench.ranks.gather(self._bench.free_for_all()) if each), default=None)

    def _row(self, tokens: int, weights_free: int | None) -> dict[str, Any]:
        """The first number of tokens leaves its output to compare."""
        variant: Variant = next(
            variant for variant in self.scheme.variants(tokens) if variant.name == self.scheme.title
        )
        variant.baseline = None
        table = self._rounds.run([variant], f"{variant.name}, {tokens} tokens, ")
        if self.output is None:
            output = variant.run()
            assert output is not None
            self.output = output.cpu()
            variant.rest()
        times = table.times[variant.name] + table.again
        seconds = statistics.median(times)
        with_activations = None
        if self._bench.ranks.on_gpus:
            self._bench.ranks.synchronize()
            # What the allocator keeps is not free to others. Nobody is before its passes, and gather ends with all.
            self._bench.ranks.barrier()
            with_activations = min(self._bench.ranks.gather(torch.cuda.mem_get_info(self._bench.ranks.device)[0]))
        return {
            "variant": variant.name,
            "tokens": tokens,
            "tokens_per_second_per_gpu": tokens / seconds,
            "pass_ns": {"median": 1e9 * seconds, "min": 1e9 * min(times), "max": 1e9 * max(times)},
            "free_bytes": weights_free,
            "free_bytes_with_activations": with_activations,
            "sm_mhz": table.metered.get(variant.name, {}).get("sm_mhz"),
            "watts": table.metered.get(variant.name, {}).get("watts"),
        }


def _text(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return f"not run: {row['variant']}: {row['not_run']}"
    free = ", ".join(
        f"{row[key] / 1e9:.1f} GB free {when}"
        for key, when in (("free_bytes", "beside weights"), ("free_bytes_with_activations", "with activations"))
        if row[key] is not None
    )
    speed = f"{row['tokens_per_second_per_gpu']:.0f} tokens/s a GPU, {row['pass_ns']['median'] / 1e6:.2f} ms a pass"
    return f"{row['variant']:<20}{row['tokens']:>7} tokens: {speed}{', ' + free if free else ''}"


def _differences(stages: list[Stage], tolerance: float) -> list[str]:
    """Layershard's two passes must be equal, TP's near to them."""
    outputs = [(stage.scheme.title, stage.output) for stage in stages if stage.output is not None]
    wrong = []
    for title, output in outputs[1:]:
        first = outputs[0][1].float()
        far = float((output.float() - first).norm() / first.norm())
        if far > (0 if title == outputs[0][0] else tolerance):
            wrong.append(f"{title} differs from {outputs[0][0]} by {far:.3g} of its norm")
    return wrong


def _speeds(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each variant, at the first number of tokens."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if "not_run" not in row and row["tokens"] == rows[0].get("tokens"):
            found.setdefault(row["variant"], []).append(row["tokens_per_second_per_gpu"])
    return {name: statistics.mean(each) for name, each in found.items()}


def _evaluate(rows: list[dict[str, Any]], own_gpus: bool, model_bytes: int) -> list[dict[str, Any]]:
    mine = [row for row in rows if row["variant"].startswith("layershard") and "not_run" not in row]
    found: list[dict[str, Any]] = []

    def add(what: str, limit: str, value: str, good: bool) -> None:
        result = "met" if good else "MISSED"
        result = result if model_bytes >= e2e_targets.WHOLE_BYTES else e2e_targets.NOT_WHOLE
        found.append({"what": f"{what} (at least)", "limit": limit, "found": value,
                      "result": result if own_gpus else e2e_targets.NO_GPUS})  # fmt: skip

    if mine and mine[0]["free_bytes"] is not None:
        least, limit = min(row["free_bytes_with_activations"] for row in mine), e2e_targets.WHOLE_FREE_BYTES
        what = "free memory of each GPU, layershard, with activations"
        add(what, f"{limit / 1e9:.0f} GB", f"{least / 1e9:.1f} GB", least >= limit)
    speeds = _speeds(rows) if mine else {}
    for other, least in e2e_targets.WHOLE_SPEED.items():
        if other in speeds:
            ratio = speeds[mine[0]["variant"]] / speeds[other]
            what = f"all layers, {mine[0]['variant']} : {other}, tokens a second, {mine[0]['tokens']} tokens"
            add(what, f"{least:.2f}", f"{ratio:.3f}", ratio >= least)
    return found


def run(options: argparse.Namespace, bench: Bench, tokens: list[int], config: dict[str, Any]) -> int:
    ranks = bench.ranks
    rounds = Rounds(ranks, passes=options.passes, rounds=SAMPLES, warm_ms=options.warm_ms)
    size = f"{bench.shape.bytes / 1e9:.1f} GB in {bench.shape.layers} layers"
    ranks.say(f"{size}: replicated it would be {bench.ranks_here * bench.shape.bytes / 1e9:.1f} GB a device")
    stages, rows = [], []
    for make in (_sharded, TensorParallel, OverlappedAlone, TensorParallel, _sharded):
        stage = Stage(bench, rounds, make)
        for row in stage.run(tokens):
            rows.append(row)
            ranks.say(_text(row))
        stages.append(stage)
        bench.forget()
        torch_save.save(options.save, ranks, {"bench": "e2e --whole", "config": config, "rows": rows})
    trouble = ranks.agree("; ".join(_differences(stages, tolerance_of(bench.shape))) or None)
    if trouble is not None:
        ranks.say(f"wrong output: {trouble}")
        return 1
    targets = _evaluate(rows, ranks.on_gpus and not ranks.shares_device, bench.shape.bytes)
    if targets:
        ranks.say(e2e_targets.as_text(targets))
    result = {"bench": "e2e --whole", "config": config, "rows": rows, "targets": targets}
    torch_save.save(options.save, ranks, result)
    return 0

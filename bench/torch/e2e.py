#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A whole prefill pass of a stack of a 70B Llama's shape, by layershard and by other ways, in shuffled rounds.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so bench/torch/e2e.py --save bench/results/e2e.json
    ... e2e.py --devices 0,0 --layers 4 --tokens 1024          # two ranks on one GPU, which copy inside it
    ... e2e.py --devices cpu,cpu --shape 256,704,8,2 --layers 4 --tokens 64 --rounds 5 --passes 1
    ... e2e.py --whole --layers 80                             # the whole model, one variant after the other

It starts its own ranks, or runs under torchrun. All linears of all layers are sharded. Every rank has a sequence of its
own; a tensor-parallel pass computes those of all ranks. Variants that cannot be run here, or find no memory, are named
with the reason; --variants chooses. Outputs are compared in the run: bit for bit with the replicated model's where the
arithmetic is the same, within a tolerance where sums are made in another order or compiled.
Exit status: 0; 1 when something failed or an output was wrong; 3 when the result is inconclusive: the control variant's
time drifted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch_launch
import torch_save
from torch_launch import Ranks
from torch_rounds import Rounds
from torch_table import Table, Variant

INCONCLUSIVE = 3
NO_SUCH_VARIANT = "no variant has a name that fits --variants: --list names all of them"
# What NCCL and torch may use: what the other ways had, and had not, belongs to a result.
SWITCHES = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def shape_sizes(text: str) -> list[int]:
    width, _hidden, heads, kv_heads = sizes = positives(text)
    if width % heads or heads % kv_heads:
        raise ValueError
    return sizes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", help="GPU of each rank (0,1), or cpu,cpu; default all GPUs, or the only one twice")
    add("--layers", type=positive, default=12, help="decoder layers (default %(default)s)")
    shape = "width, hidden, heads, key-value heads (default %(default)s)"
    add("--shape", type=shape_sizes, default="8192,28672,64,8", help=shape)
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default bfloat16; float32 on processors")
    tokens = "lengths of a rank's sequence, one table each (default %(default)s)"
    add("--tokens", type=positives, default="16,1024,2048,4096", help=tokens)
    add("--variants", default="*", help="patterns of their names, separated by ';' (default all); --list names them")
    add("--without", default="", help="patterns of those that are not run ('*compiled')")
    add("--list", action="store_true", help="print the names of all variants and exit")
    add("--passes", type=positive, default=4, help="timed passes of a sample (default %(default)s)")
    add("--rounds", type=positive, default=31, help="samples of each variant (default %(default)s)")
    add("--warm-ms", type=float, default=200, help="time of untimed passes before each sample (default %(default)s)")
    margin = "a table is inconclusive where the control variant's first and last differ by more per cent"
    add("--margin", type=float, default=0.5, help=margin)
    minutes = "rounds end early, at least 3 are made, so that the last table is there in time"
    add("--minutes", type=float, help=minutes)
    add("--transport", help="of layershard (default auto; copies where ranks would compute in place)")
    add("--scope", choices=("block", "linear"), default="block", help="of shard (default %(default)s)")
    late = "how late the last rank begins in variants with a late rank, of a pass (default %(default)s)"
    add("--late-percent", type=positive, default=50, help=late)
    add("--whole", action="store_true", help="layershard and TP in turn, twice, in swapped order: each alone in memory")
    add("--save", metavar="FILE", help="write the result as JSON, with machine, date, command and versions")
    options = parser.parse_args()
    try:
        options.devices = torch_launch.devices_of(options.devices)
    except ValueError as error:
        parser.error(f"--devices: {error}")
    return options


def transport_of(asked: str | None, ranks: Ranks) -> str:
    """Ranks of one device would read each other's layers in place, and no byte would move."""
    if asked is not None:
        return asked
    return "shm:copy" if not ranks.on_gpus else "cuda:copy" if ranks.shares_device else "auto"


def all_schemes(bench: Any) -> list[Any]:
    """The most telling first: they are opened while there is memory."""
    from e2e_fsdp import Fsdp, FsdpCopyEngines
    from e2e_layershard import Layershard, TwoRegimes
    from e2e_schemes import Replicated
    from e2e_tensor_parallel import TensorParallel, TensorParallelOverlapped, TensorParallelSymmetric
    from e2e_uneven import LastAlone, LastLate
    from e2e_windows import Broadcast, PeerCopy

    replicated, parallel = Replicated(bench), TensorParallel(bench)
    sharded, broadcast = Layershard(bench, 1, 0, "layershard k=1"), Broadcast(bench, replicated)
    third = 1 / 3
    return [
        replicated,
        sharded,
        parallel,
        TensorParallelSymmetric(bench, parallel),
        TensorParallelOverlapped(bench, parallel),
        broadcast,
        PeerCopy(bench, replicated),
        Fsdp(bench),
        LastLate(bench, sharded, replicated),
        LastLate(bench, broadcast, replicated),
        LastAlone(bench, sharded),
        TwoRegimes(bench),
        Layershard(bench, 1, third, "layershard k=1, a third resident"),
        Layershard(bench, 1, 1 / 2, "layershard k=1, half resident"),
        Layershard(bench, 2, 0, "layershard k=2"),
        FsdpCopyEngines(bench),
        Layershard(bench, 2, third, "layershard k=2, a third resident"),
        Layershard(bench, 0, 1, "layershard all resident"),
        Layershard(bench, 1, "auto", "layershard k=1, auto resident"),  # it takes what memory is left
    ]


class Schemes:
    """Those that were asked for and can be had, and why the others cannot."""

    def __init__(
        self,
        bench: Any,
        patterns: Sequence[str],
        most_tokens: int,
        without: Sequence[str] = (),
        activation_bytes: int | None = None,
    ) -> None:
        self._bench = bench
        self._patterns, self._without = patterns, without
        self._activations = bench.passing_bytes = activation_bytes or self._activation_bytes(most_tokens)
        self.opened: list[Any] = []
        self.not_run: dict[str, str] = {}

    def _activation_bytes(self, tokens: int) -> int:
        """What passes of all schemes and the graphs need beside weights, on one rank, generously; communicators and
        workspaces too."""
        shape, size = self._bench.shape, self._bench.ranks.size
        element = torch.empty(0, dtype=shape.dtype).element_size()
        return 2 * element * tokens * (3 * shape.hidden + 8 * size * shape.width) + (3 << 30)

    def chosen(self, name: str) -> bool:
        chosen, without = (
            any(fnmatchcase(name, pattern) for pattern in patterns) for patterns in (self._patterns, self._without)
        )
        return chosen and not without

    def _no_memory(self, scheme: Any) -> str | None:
        """What a pass has for a while is there once: passes are made one after the other."""
        free = self._bench.free_bytes()
        passing = max(each.passing() for each in [*self.opened, scheme])
        self._bench.passing_bytes = self._activations + passing
        needed = (scheme.needs() + self._bench.passing_bytes) * self._bench.ranks_here
        if free is None or needed <= free:
            return None
        return f"no memory: with passes it would need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"

    def _open(self, scheme: Any) -> str | None:
        trouble = scheme.refusal()
        trouble = self._bench.ranks.agree(trouble or self._no_memory(scheme))
        if trouble is not None:
            return trouble
        try:
            scheme.open()
        except (RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return self._bench.ranks.agree(trouble)

    def open(self, schemes: Sequence[Any]) -> None:
        for scheme in schemes:
            names = [name for name in scheme.names() if self.chosen(name)]
            if not names:
                continue
            self._bench.ranks.note(f"building {scheme.title}")
            trouble = self._open(scheme)
            scheme.built = trouble is None
            if scheme.built:
                self.opened.append(scheme)
            self.not_run.update({name: trouble for name in names if trouble is not None})

    def variants(self, tokens: int, not_run: dict[str, str]) -> list[Variant]:
        """Their baselines are the replicated model run in the same mode, where it is."""
        found = [variant for scheme in self.opened for variant in self._variants_of(scheme, tokens, not_run)]
        names = {variant.name for variant in found}
        for variant in found:
            if variant.baseline is not None and variant.baseline not in names:
                variant.baseline, variant.check = None, variant.check if "replicated" in names else "close"
        return found

    def _variants_of(self, scheme: Any, tokens: int, not_run: dict[str, str]) -> Iterator[Variant]:
        trouble, made = None, []
        try:
            made = scheme.variants(tokens)
        except (RuntimeError, AttributeError, ImportError) as error:
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        trouble = self._bench.ranks.agree(trouble)
        for name in filter(self.chosen, scheme.names()):
            variant = next((each for each in made if each.name == name), None)
            if trouble is None and variant is not None:
                yield variant
            else:
                suffix = name.removeprefix(scheme.title)
                not_run[name] = trouble or scheme.refusal_of(suffix) or "it is not available here"

    def memories(self) -> list[dict[str, Any]]:
        """Of the rank whose device is most off, for each scheme that knows."""
        found = []
        for scheme in self.opened:
            everyones = self._bench.ranks.gather(scheme.memory)
            if everyones[0] is not None:
                found.append(max(everyones, key=lambda each: (each["driver_bytes"] or 0) / each["expected_bytes"]))
        return found

    def close(self) -> None:
        for scheme in reversed(self.opened):
            scheme.close()
        self.opened.clear()


def run_table(rounds: Rounds, schemes: Schemes, tokens: int) -> Table:
    """Its variants, with their graphs and inputs, end with it."""
    not_run = dict(schemes.not_run)
    variants = schemes.variants(tokens, not_run)
    if not variants:
        why = "\n".join(f"{name}: {reason}" for name, reason in not_run.items())
        raise SystemExit(f"none of the variants can be run here:\n{why}" if why else NO_SUCH_VARIANT)
    table = rounds.run(variants, f"{tokens} tokens, ")
    table.not_run = not_run | table.not_run
    return table


def run_tables(options: argparse.Namespace, bench: Any, schemes: Schemes, tokens: Sequence[int]) -> dict[int, Table]:
    ranks = bench.ranks
    tables: dict[int, Table] = {}
    for count in tokens:
        rounds = Rounds(
            ranks,
            passes=options.passes,
            rounds=options.rounds,
            warm_ms=options.warm_ms,
            margin_percent=options.margin,
            minutes=ranks.minutes_each(options.minutes, len(tokens) - len(tables)),
        )
        tables[count] = table = run_table(rounds, schemes, count)
        bench.forget()
        ranks.note("")
        ranks.say(f"\n{count} tokens a rank\n{table.as_text()}")
        saved = [each.as_json(tokens=tokens) for tokens, each in tables.items()]
        torch_save.save(options.save, ranks, {"bench": "e2e", "config": config_of(options, bench), "tables": saved})
    return tables


def config_of(options: argparse.Namespace, bench: Any) -> dict[str, Any]:
    shape = bench.shape
    return {
        "devices": [str(device) for device in bench.ranks.devices],
        "layers": shape.layers,
        "width": shape.width,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "layer_bytes": shape.layer_bytes,
        "passes": options.passes,
        "rounds": options.rounds,
        "warm_ms": options.warm_ms,
        "margin_percent": options.margin,
        "minutes": options.minutes,
        "transport": bench.transport,
        "scope": bench.scope,
        "late_percent": bench.late_percent,
        "environment": {name: os.environ[name] for name in SWITCHES},
    }


def compare(options: argparse.Namespace, bench: Any, tokens: Sequence[int]) -> int:
    import e2e_targets

    ranks = bench.ranks
    schemes = Schemes(bench, options.variants.split(";"), max(tokens), options.without.split(";"))
    schemes.open(all_schemes(bench))
    tables = run_tables(options, bench, schemes, tokens)
    memories = schemes.memories()
    own_gpus = ranks.on_gpus and not ranks.shares_device
    targets = e2e_targets.evaluate_tables(tables, own_gpus) + e2e_targets.evaluate_memory(memories)
    ranks.say("\n" + e2e_targets.as_text(targets))
    result = {
        "bench": "e2e",
        "config": config_of(options, bench),
        "tables": [table.as_json(tokens=count) for count, table in tables.items()],
        "memory": memories,
        "targets": targets,
    }
    torch_save.save(options.save, ranks, result)
    schemes.close()
    return 0 if all(table.conclusive for table in tables.values()) else INCONCLUSIVE


def run_rank(options: argparse.Namespace, ranks: Ranks) -> int:
    from e2e_model import Shape
    from e2e_schemes import Bench

    dtype = options.dtype or ("bfloat16" if ranks.on_gpus else "float32")
    shape = Shape(options.layers, *options.shape, dtype=getattr(torch, dtype))
    bench = Bench(ranks, shape, transport_of(options.transport, ranks), options.scope, options.late_percent)
    tokens = options.tokens
    if options.list:
        ranks.say("\n".join(name for scheme in all_schemes(bench) for name in scheme.names()))
        return 0
    if options.whole:
        import e2e_whole

        return e2e_whole.run(options, bench, tokens, config_of(options, bench))
    return compare(options, bench, tokens)


def main() -> int:
    options = arguments()
    # Multicast is left alone: not every shared host allows it.
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    return torch_launch.run(options.devices, lambda ranks: run_rank(options, ranks))


if __name__ == "__main__":
    sys.exit(main())

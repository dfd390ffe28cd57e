#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A whole prefill pass of a stack of a 70B Llama's shape, by layershard and by its rivals, in shuffled rounds.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so bench/torch/e2e.py --save bench/results/e2e.json
    ... e2e.py --devices 0,0 --layers 4 --tokens 1024          # two ranks on one GPU, which copy inside it
    ... e2e.py --devices cpu,cpu --shape 256,704,8,2 --layers 4 --tokens 64 --rounds 5 --passes 1
    ... e2e.py --whole --layers 80                             # the whole model, one way after the other

It starts its own ranks, or runs under torchrun. All linears of all layers are sharded. Every rank has a sequence of its
own; a tensor-parallel pass computes those of all ranks. Ways that cannot be run here are named with the reason, and so
are those that find no memory: --arms chooses. Outputs are compared in the run: bit for bit with the replicated model's
where the arithmetic is the same, within a tolerance where sums are made in another order or compiled.
Exit status: 0, or 1 when something failed or computed something else, or 3 when the control arm drifted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch._dynamo
import torch_launch
import torch_save
from torch_launch import Meeting
from torch_rounds import Rounds
from torch_table import Arm, Table

VOID = 3
NO_SUCH_ARM = "no arm has a name that --arms gives: --list names them"
# What NCCL and torch may use: what rivals had, and had not, belongs to a result.
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
    add("--layers", type=positive, default=12)
    shape = "width, hidden, heads, key-value heads (default %(default)s)"
    add("--shape", type=shape_sizes, default="8192,28672,64,8", help=shape)
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default bfloat16; float32 on processors")
    tokens = "of each rank's sequence, a list (default %(default)s)"
    add("--tokens", type=positives, default="16,1024,2048,4096", help=tokens)
    add("--arms", default="*", help="patterns of arms, a list divided by ';' (default all); --list names them")
    add("--list", action="store_true", help="name the arms and end")
    add("--passes", type=positive, default=4, help="in a sample")
    add("--rounds", type=positive, default=31)
    add("--warm-ms", type=float, default=200, help="of the same arm before each sample")
    add("--margin", type=float, default=0.5, help="per cent between control arms beyond which a table is void")
    add("--transport", help="of layershard; default auto, and copies where ranks would share in place")
    add("--scope", choices=("block", "linear"), default="block")
    late = "of a pass, by which the last rank begins late where one does (default %(default)s)"
    add("--late-percent", type=positive, default=50, help=late)
    add("--whole", action="store_true", help="layershard and TP one after the other, twice in swapped order")
    add("--save", metavar="FILE", help="the result as JSON, with machine, date, command and versions")
    options = parser.parse_args()
    try:
        options.devices = torch_launch.devices_of(options.devices)
    except ValueError as error:
        parser.error(f"--devices: {error}")
    return options


def transport_of(asked: str | None, meeting: Meeting) -> str:
    """Ranks of one device would read each other's layers in place, and no byte would move."""
    if asked is not None:
        return asked
    return "shm:copy" if not meeting.on_gpus else "cuda:copy" if meeting.shares_device else "auto"


def all_ways(bench: Any) -> list[Any]:
    """The most telling first: they are opened while there is memory."""
    from e2e_arms import Replicated
    from e2e_fsdp import Fsdp, FsdpCopyEngines
    from e2e_layershard import Layershard, TwoRegimes
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
        Layershard(bench, 2, 0, "layershard k=2"),
        FsdpCopyEngines(bench),
        Layershard(bench, 2, third, "layershard k=2, a third resident"),
        Layershard(bench, 0, 1, "layershard all resident"),
    ]


class Ways:
    """Those that were asked for and can be had, and why the others cannot."""

    def __init__(self, bench: Any, patterns: Sequence[str], most_tokens: int) -> None:
        self._bench = bench
        self._patterns = patterns
        self._reserve = self._activation_bytes(most_tokens)
        self.opened: list[Any] = []
        self.not_run: dict[str, str] = {}

    def _activation_bytes(self, tokens: int) -> int:
        """What passes of all ways and the graphs need beside weights, on one rank, generously."""
        shape, size = self._bench.shape, self._bench.meeting.size
        element = torch.empty(0, dtype=shape.dtype).element_size()
        return 2 * element * tokens * (3 * shape.hidden + 8 * size * shape.width) + (1 << 30)

    def chosen(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def _no_memory(self, way: Any) -> str | None:
        free = self._bench.free_bytes()
        needed = (way.needs() + self._reserve) * self._bench.ranks_here
        if free is None or needed <= free:
            return None
        return f"no memory: it would need {needed / 1e9:.1f} GB with activations, {free / 1e9:.1f} GB are free"

    def _open(self, way: Any) -> str | None:
        trouble = way.refusal()
        trouble = self._bench.meeting.agree(trouble or self._no_memory(way))
        if trouble is not None:
            return trouble
        try:
            way.open()
        except (RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return self._bench.meeting.agree(trouble)

    def open(self, ways: Sequence[Any]) -> None:
        for way in ways:
            names = [name for name in way.names() if self.chosen(name)]
            if not names:
                continue
            self._bench.meeting.note(f"building {way.title}")
            trouble = self._open(way)
            way.built = trouble is None
            if way.built:
                self.opened.append(way)
            self.not_run.update({name: trouble for name in names if trouble is not None})

    def arms(self, tokens: int, not_run: dict[str, str]) -> list[Arm]:
        """Their baselines are the replicated model run the same way, where there is one."""
        found = [arm for way in self.opened for arm in self._arms_of(way, tokens, not_run)]
        names = {arm.name for arm in found}
        for arm in found:
            if arm.baseline is not None and arm.baseline not in names:
                arm.baseline, arm.check = None, arm.check if "replicated" in names else "close"
        return found

    def _arms_of(self, way: Any, tokens: int, not_run: dict[str, str]) -> Iterator[Arm]:
        trouble, made = None, []
        try:
            made = way.arms(tokens)
        except (RuntimeError, AttributeError, ImportError) as error:
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        trouble = self._bench.meeting.agree(trouble)
        for name in filter(self.chosen, way.names()):
            arm = next((each for each in made if each.name == name), None)
            if trouble is None and arm is not None:
                yield arm
            else:
                suffix = name.removeprefix(way.title)
                not_run[name] = trouble or way.refusal_of(suffix) or "it is not to be had here"

    def memories(self) -> list[dict[str, Any]]:
        """Of the rank whose device is most off, for each way that knows."""
        found = []
        for way in self.opened:
            everyones = self._bench.meeting.gather(way.memory)
            if everyones[0] is not None:
                found.append(max(everyones, key=lambda each: (each["driver_bytes"] or 0) / each["expected_bytes"]))
        return found

    def close(self) -> None:
        for way in reversed(self.opened):
            way.close()
        self.opened.clear()


def run_tables(options: argparse.Namespace, bench: Any, ways: Ways, tokens: Sequence[int]) -> dict[int, Table]:
    meeting = bench.meeting
    rounds = Rounds(
        meeting,
        passes=options.passes,
        rounds=options.rounds,
        warm_ms=options.warm_ms,
        margin_percent=options.margin,
    )
    tables: dict[int, Table] = {}
    for count in tokens:
        torch._dynamo.reset()
        bench.graph_memory = None
        not_run = dict(ways.not_run)
        arms = ways.arms(count, not_run)
        if not arms:
            why = "\n".join(f"{name}: {reason}" for name, reason in not_run.items())
            raise SystemExit(f"none of the arms can be run here:\n{why}" if why else NO_SUCH_ARM)
        table = rounds.run(arms, f"{count} tokens, ")
        table.not_run = not_run | table.not_run
        tables[count] = table
        meeting.note("")
        meeting.say(f"\n{count} tokens a rank\n{table.as_text()}")
        del arms
        saved = [each.as_json(tokens=tokens) for tokens, each in tables.items()]
        torch_save.save(options.save, meeting, {"bench": "e2e", "config": config_of(options, bench), "tables": saved})
    return tables


def config_of(options: argparse.Namespace, bench: Any) -> dict[str, Any]:
    shape = bench.shape
    return {
        "devices": [str(device) for device in bench.meeting.devices],
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
        "transport": bench.transport,
        "scope": bench.scope,
        "late_percent": bench.late_percent,
        "environment": {name: os.environ[name] for name in SWITCHES},
    }


def compare(options: argparse.Namespace, bench: Any, tokens: Sequence[int]) -> int:
    import e2e_judge as judge

    meeting = bench.meeting
    ways = Ways(bench, options.arms.split(";"), max(tokens))
    ways.open(all_ways(bench))
    tables = run_tables(options, bench, ways, tokens)
    memories = ways.memories()
    own_gpus = meeting.on_gpus and not meeting.shares_device
    targets = judge.judge_tables(tables, own_gpus) + judge.judge_memory(memories)
    meeting.say("\n" + judge.as_text(targets))
    result = {
        "bench": "e2e",
        "config": config_of(options, bench),
        "tables": [table.as_json(tokens=count) for count, table in tables.items()],
        "memory": memories,
        "targets": targets,
    }
    torch_save.save(options.save, meeting, result)
    ways.close()
    return 0 if all(table.conclusive for table in tables.values()) else VOID


def run_rank(options: argparse.Namespace, meeting: Meeting) -> int:
    from e2e_arms import Bench
    from e2e_model import Shape

    dtype = options.dtype or ("bfloat16" if meeting.on_gpus else "float32")
    shape = Shape(options.layers, *options.shape, dtype=getattr(torch, dtype))
    bench = Bench(meeting, shape, transport_of(options.transport, meeting), options.scope, options.late_percent)
    tokens = options.tokens
    if options.list:
        meeting.say("\n".join(name for way in all_ways(bench) for name in way.names()))
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
    devices = options.devices
    status = torch_launch.launch(len(devices))
    if status is not None:
        return status
    meeting = torch_launch.join(devices)
    with torch.no_grad():
        status = run_rank(options, meeting)
    torch_launch.leave(meeting)
    return status


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Decode of the example runner from shared layers against private ones: by one rank and by two, each on a core.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so \\
        bench/torch/runner_decode.py [--build build] [--rounds 5] [--min-ratio 0.98] [--save FILE]

A round starts layershard-llama with layers shared in place and with --replicated, one rank and two, in an order that
turns; all must say the same tokens. What counts of a variant is its fastest round, by the slowest of its ranks. Which
pages private memory gets is the system's to say (transparent_hugepage/enabled), which is saved beside the figures: set
it before, and put it back. Exit status 1 when shared layers are read at less than --min-ratio of the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import torch_save

SETTINGS = pathlib.Path("/sys/kernel/mm/transparent_hugepage")
VARIANTS = [(ranks, kept) for ranks in (1, 2) for kept in ("shared", "private")]


def chosen(setting: pathlib.Path) -> str:
    return setting.read_text().split("[")[1].split("]")[0]


def start(runner: pathlib.Path, options: list[str], rank: int, ranks: int) -> subprocess.Popen[str]:
    core = sorted(os.sched_getaffinity(0))[rank]
    environment = os.environ | {
        "LAYERSHARD_RANK": str(rank),
        "LAYERSHARD_SIZE": str(ranks),
        "LAYERSHARD_JOB": f"decode-{os.getpid()}",
    }
    return subprocess.Popen(
        [str(runner), "--json", *options],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )


def decode(runner: pathlib.Path, options: list[str], ranks: int) -> tuple[float, dict[str, Any], list[int]]:
    """Tokens/s of the slowest rank, what the first says of itself, and all tokens in the order of the prompts."""
    processes = [start(runner, options, rank, ranks) for rank in range(ranks)]
    texts = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"layershard-llama failed: {[process.returncode for process in processes]}")
    said = [json.loads(text) for text in texts]
    own = [one for document in said for one in document["ranks"] if one.get("tokens_per_s")]
    prompts = sorted((one for document in said for one in document["prompts"]), key=lambda one: one["index"])
    return min(one["tokens_per_s"] for one in own), own[0], [token for one in prompts for token in one["tokens"]]


def measure(runner: pathlib.Path, options: list[str], rounds: int) -> list[dict[str, Any]]:
    best: dict[tuple[int, str], dict[str, Any]] = {}
    expected = None
    for turn in range(rounds):
        for ranks, kept in VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]:
            private = ["--replicated"] if kept == "private" else []
            speed, own, tokens = decode(runner, [*options, *private], ranks)
            expected = expected or tokens
            if tokens != expected:
                raise SystemExit(f"{ranks} ranks with {kept} layers said other tokens than the first run")
            if speed > best.get((ranks, kept), {"tokens_per_s": 0})["tokens_per_s"]:
                best[ranks, kept] = {
                    "ranks": ranks,
                    "layers": kept,
                    "tokens_per_s": speed,
                    "large_bytes": own["large_bytes"],
                }
    for (ranks, _), row in best.items():
        row["to_private"] = row["tokens_per_s"] / best[ranks, "private"]["tokens_per_s"]
    return [best[variant] for variant in VARIANTS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--min-ratio", type=float, default=0.0)
    parser.add_argument("--save")
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two ranks need a core each, and this process may use one")
    rows = measure(arguments.build / "layershard-llama", ["--max-tokens", str(arguments.max_tokens)], arguments.rounds)
    settings = {name: chosen(SETTINGS / name) for name in ("enabled", "shmem_enabled")}
    for row in rows:
        print(
            "{ranks} ranks, {layers:7} {tokens_per_s:6.2f} tokens/s, {to_private:.3f} of private, "
            "{large_bytes} bytes in large pages".format(**row)
        )
    print("settings:", settings)
    if arguments.save:
        torch_save.write(arguments.save, {"settings": settings, "rounds": arguments.rounds, "rows": rows}, [])
    return int(any(row["to_private"] < arguments.min_ratio for row in rows if row["layers"] == "shared"))


if __name__ == "__main__":
    sys.exit(main())

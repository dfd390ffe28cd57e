#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a compiler loses at layershard's operators: models whose attention inductor finds a kernel for only where
nothing cuts the graph.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so bench/torch/compiled_speed.py --save FILE
    ... compiled_speed.py --devices cpu,cpu --models written-out --layers 6 --tokens 16 --rounds 2 --backend eager

megatron-bert, rembert and xmod of transformers, with the sizes that their configurations have by default but --layers
layers; and *written-out*, blocks whose attention is two products and a softmax. Each runs in shuffled rounds as it is,
compiled, sharded, sharded and compiled, and *cut*: not sharded, compiled with operators that do nothing where those of
the sharded model are (family_cut.py). So sharded to cut is what the transfers cost, and cut to replicated what the
borders do. *attention*: how many times the compiler put its kernel in.

Rank 0 computes, the others store their layers. Two ranks on one GPU fetch by copies.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from typing import Any

import e2e
import family_cut
import torch
import torch._dynamo
import torch_launch
import torch_save
from torch import nn
from torch_launch import Ranks
from torch_rounds import Rounds
from torch_table import Table, Variant

import layershard.torch

MODELS = "written-out,megatron-bert,rembert,xmod"
CLOSE = 0.05


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", help="GPU of each rank (0,1), or cpu,cpu; default all GPUs, or the only one twice")
    add("--models", default=MODELS, help="which (default %(default)s)")
    add("--layers", type=e2e.positive, default=8, help="of each model (default %(default)s)")
    add("--sizes", type=json.loads, default={}, help='of a configuration, as JSON ({"hidden_size": 64})')
    add("--batch", type=e2e.positive, default=8, help="sequences of a pass (default %(default)s)")
    add("--tokens", type=e2e.positive, default=512, help="of a sequence (default %(default)s)")
    add("--rounds", type=e2e.positive, default=9, help="samples of each variant (default %(default)s)")
    add("--passes", type=e2e.positive, default=4, help="timed passes of a sample (default %(default)s)")
    add("--warm-ms", type=float, default=100, help="untimed passes before each sample (default %(default)s)")
    margin = "a table is inconclusive where the control variant's first and last differ by more per cent"
    add("--margin", type=float, default=0.5, help=margin)
    add("--backend", default="inductor", help="of torch.compile (default %(default)s)")
    add("--transport", help="of layershard (default auto; copies where ranks would compute in place)")
    add("--save", metavar="FILE", help="write the result as JSON after each model")
    options = parser.parse_args()
    try:
        options.devices = torch_launch.devices_of(options.devices)
    except ValueError as error:
        parser.error(f"--devices: {error}")
    return options


# ---- Models -------------------------------------------------------------------------------------------------------


class WrittenOut(nn.Module):
    """A block as many models were written before there was an operator for attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Embedded(nn.Module):
    def __init__(self, layers: int, hidden_size: int = 1024, num_attention_heads: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1024, hidden_size)
        self.layer = nn.ModuleList(WrittenOut(hidden_size, num_attention_heads) for _ in range(layers))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layer:
            x = layer(x)
        return x


def build(name: str, options: argparse.Namespace) -> tuple[nn.Module, str]:
    """The model, and the pattern of its layers."""
    if name == "written-out":
        return Embedded(options.layers, **options.sizes), "layer.*"
    from transformers import CONFIG_MAPPING, AutoModel

    own = {"languages": ["en_XX"], "default_language": "en_XX"} if name == "xmod" else {}
    config = CONFIG_MAPPING[name](num_hidden_layers=options.layers, **own, **options.sizes)
    return AutoModel.from_config(config), "encoder.layer.*"


def output_of(made: Any) -> torch.Tensor:
    return made if isinstance(made, torch.Tensor) else made[0]


# ---- A run --------------------------------------------------------------------------------------------------------


class Bench:
    """One model in all its variants."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks, name: str) -> None:
        self.options, self.ranks = options, ranks
        torch.manual_seed(1)
        model, modules = build(name, options)
        dtype = torch.bfloat16 if ranks.on_gpus else torch.float32
        self.replicated = model.to(ranks.device, dtype).eval().requires_grad_(False)
        self.sharded = copy.deepcopy(self.replicated)
        transport = e2e.transport_of(options.transport, ranks)
        layershard.torch.shard(self.sharded, modules, scope="block", transport=transport, device=ranks.device)
        self.handle = layershard.torch.of(self.sharded)
        if ranks.rank == 0:
            self.cut = family_cut.cut(copy.deepcopy(self.replicated), *family_cut.borders(self.sharded))
        draw = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(8, 1000, (options.batch, options.tokens), generator=draw).to(ranks.device)

    def _variant(self, name: str, run: Callable[[], torch.Tensor], **more: Any) -> Variant:
        return Variant(name, run, counted=slice(0, 1), rest=self.handle.prepare, tolerance=CLOSE, **more)

    def _compiled(self, model: nn.Module) -> tuple[Callable[[], torch.Tensor], int]:
        """And how many times a kernel for attention was put into it."""
        counts = torch._dynamo.utils.counters["inductor"]
        counts.clear()
        fast = torch.compile(model, backend=self.options.backend, dynamic=False)
        fast(self.tokens)
        return lambda: output_of(fast(self.tokens)), counts["fuse_attention"]

    def variants(self) -> list[Variant]:
        made = []
        for name in ("replicated", "sharded", "cut"):
            run, found = self._compiled(getattr(self, name))
            details = {"mode": "compiled", "attention": found}
            made.append(self._variant(f"{name}, compiled", run, check="close", details=details))
        for name in ("replicated", "sharded"):
            model = getattr(self, name)
            eager = {"check": "close", "details": {"mode": "eager"}} | (
                {"check": "bits", "baseline": "replicated"} if name == "sharded" else {}
            )
            made.append(self._variant(name, lambda model=model: output_of(model(self.tokens)), **eager))
        return made

    def idle(self) -> list[Variant]:
        """Of the ranks that store layers only."""
        names = ["replicated, compiled", "sharded, compiled", "cut, compiled", "replicated", "sharded"]
        made = [self._variant(name, lambda: torch.ones(1)) for name in names]
        made[-1].baseline = "replicated"
        return made

    def table(self) -> Table:
        options = self.options
        how = {"passes": options.passes, "rounds": options.rounds, "warm_ms": options.warm_ms}
        rounds = Rounds(self.ranks, margin_percent=options.margin, **how)
        return rounds.run(self.variants() if self.ranks.rank == 0 else self.idle())

    def close(self) -> None:
        self.ranks.synchronize()
        self.ranks.barrier()
        self.handle.close()


def run_rank(options: argparse.Namespace, ranks: Ranks) -> int:
    torch._dynamo.config.recompile_limit = 64
    config = {name: value for name, value in vars(options).items() if name not in ("devices", "save")}
    config |= {"devices": [str(each) for each in ranks.devices]}
    tables: list[dict[str, Any]] = []
    not_run: list[dict[str, str]] = []
    result = {"bench": "compiled_speed", "config": config, "tables": tables, "not_run": not_run}
    for name in options.models.split(","):
        ranks.note(f"building {name}")
        torch._dynamo.reset()
        try:
            bench = Bench(options, ranks, name)
        except (ImportError, KeyError) as error:
            not_run.append({"model": name, "reason": f"{type(error).__name__}: {error}".splitlines()[0]})
            ranks.say(f"not run: {name}: {not_run[-1]['reason']}")
            torch_save.save(options.save, ranks, result)
            continue
        table = bench.table()
        bench.close()
        attention = {each.name: each.details["attention"] for each in table.variants if "attention" in each.details}
        said = ", ".join(f"{variant} {count}" for variant, count in attention.items())
        ranks.say(f"\n{name}\n{table.as_text()}\nkernels for attention: {said}")
        tables.append(table.as_json(model=name))
        torch_save.save(options.save, ranks, result)
    return 0


def main() -> int:
    options = arguments()
    return torch_launch.run(options.devices, lambda ranks: run_rank(options, ranks))


if __name__ == "__main__":
    sys.exit(main())

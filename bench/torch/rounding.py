#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whether a compiled sharded model is only rounded otherwise than a compiled replicated one, layer by layer.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so bench/torch/rounding.py --save rounding.json
    ... rounding.py --devices cpu,cpu --shape 64,128,4,2 --layers 4 --tokens 32 --vocabulary 96 --seeds 2

Layers of an 8B Llama's shape, a norm and a head, random weights and tokens from each seed, in bfloat16. Operators of
layershard are borders to a compiler, and what it fuses across a layer's end is rounded less often. The measure is the
same program in float32, from the same weights, not compiled: after each layer, and of the logits, the norm of the
difference from it to its norm. The sharded model's distance may be at most --limit of the replicated one's after every
layer, whatever the seed. A layer computed from wrong weights would be about as far off as the layer is large.
At the end the replicated model is compiled once more, with operators that do nothing at the same places (family_cut):
its bits should be the sharded model's.

Rank 0 computes, the others store their layers. Two ranks on one GPU fetch by copies. Exit status: 0; 1 when it is not
so, or something failed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import zlib
from typing import Any

import e2e
import family_cut
import torch
import torch_launch
import torch_save
from e2e_model import Layer, Shape
from torch import nn
from torch_launch import Ranks

import layershard.torch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", help="GPU of each rank (0,1), or cpu,cpu; default all GPUs, or the only one twice")
    add("--layers", type=e2e.positive, default=16, help="decoder layers (default %(default)s)")
    shape = "width, hidden, heads, key-value heads (default %(default)s)"
    add("--shape", type=e2e.shape_sizes, default="4096,14336,32,8", help=shape)
    add("--vocabulary", type=e2e.positive, default=32768, help="logits of a token (default %(default)s)")
    add("--tokens", type=e2e.positive, default=1024, help="of a pass (default %(default)s)")
    add("--seeds", type=e2e.positive, default=10, help="how many weights and inputs are tried (default %(default)s)")
    add("--limit", type=float, default=1.1, help="of the sharded distance to the replicated one (default %(default)s)")
    add("--backend", default="inductor", help="of torch.compile (default %(default)s)")
    add("--transport", help="of layershard (default auto; copies where ranks would compute in place)")
    add("--save", metavar="FILE", help="write the result as JSON after each seed")
    options = parser.parse_args()
    try:
        options.devices = torch_launch.devices_of(options.devices)
    except ValueError as error:
        parser.error(f"--devices: {error}")
    return options


# ---- The model ----------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Gives what each layer has made, and the logits."""

    def __init__(self, shape: Shape, vocabulary: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape, shape.head) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.head = nn.Linear(shape.width, vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        made = []
        for layer in self.layers:
            x = layer(x)
            made.append(x)
        return [*made, self.head(self.norm(x))]


def empty(shape: Shape, vocabulary: int) -> Deep:
    with torch.device("meta"):
        return Deep(shape, vocabulary).to(shape.dtype).eval().requires_grad_(False)


def drawn(seed: int, name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the whole tensor @name: a norm's are about one, a linear keeps the size of what goes through it."""
    draw = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    made = torch.empty(like.shape, dtype=like.dtype, device=device)
    spread = (1, 0.1) if made.dim() == 1 else (0, made.shape[1] ** -0.5)
    return made.normal_(*spread, generator=draw)


def in_float32(model: Deep, shape: Shape, x: torch.Tensor) -> list[torch.Tensor]:
    """The same program, a layer at a time, so that one layer lies in memory twice."""
    x = x.float()
    layer, made = Layer(shape, shape.head).to(x.device), []
    for source in model.layers:
        layer.load_state_dict(source.state_dict())
        x = layer(x)
        made.append(x)
    norm = nn.functional.rms_norm(x, (shape.width,), model.norm.weight.float(), model.norm.eps)
    return [*made, nn.functional.linear(norm, model.head.weight.float())]


def distances(outputs: list[torch.Tensor], right: list[torch.Tensor]) -> list[float]:
    return [float((mine.float() - its).norm() / its.norm()) for mine, its in zip(outputs, right, strict=True)]


# ---- A run --------------------------------------------------------------------------------------------------------


class Models:
    """The sharded one on all ranks, the replicated one on rank 0."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        self.ranks, self.backend = ranks, options.backend
        self.shape = Shape(options.layers, *options.shape, dtype=torch.bfloat16)
        self.tokens, self.transport = options.tokens, e2e.transport_of(options.transport, ranks)
        self.sharded = empty(self.shape, options.vocabulary)
        how = {"scope": "block", "placement": "whole", "transport": self.transport, "device": ranks.device}
        layershard.torch.shard(self.sharded, "layers.*", **how)
        layershard.torch.fill(self.sharded, lambda name, like: drawn(0, name, like, ranks.device))
        self.handle = layershard.torch.of(self.sharded)
        if not any(each.windows for each in self.handle.stats().values()):
            raise SystemExit("every layer is read where it lies: nothing moves, and no operator is a border")
        self.runs: dict[str, Any] = {}
        if ranks.rank == 0:
            self.replicated = empty(self.shape, options.vocabulary).to_empty(device=ranks.device)
            self.runs = {"replicated": self._compiled(self.replicated), "sharded": self._compiled(self.sharded)}

    def _compiled(self, model: Deep) -> Any:
        return torch.compile(model, backend=self.backend, dynamic=False, fullgraph=True)

    def draw(self, seed: int) -> None:
        """Other weights. Collective."""
        with self.handle.update():
            for name, parameter in self.sharded.named_parameters():
                parameter.copy_(drawn(seed, name, parameter, self.ranks.device))
        for name, parameter in self.replicated.named_parameters() if self.runs else ():
            parameter.copy_(drawn(seed, name, parameter, self.ranks.device))

    def input(self, seed: int) -> torch.Tensor:
        like = torch.empty(self.tokens, self.shape.width, dtype=self.shape.dtype, device="meta")
        return drawn(seed, "input", like, self.ranks.device).unsqueeze(0) * self.shape.width**0.5

    def compare(self, seed: int) -> dict[str, Any]:
        """Of one seed's weights, on rank 0."""
        x = self.input(seed)
        right = in_float32(self.replicated, self.shape, x)
        eager = self.replicated(x)
        outputs = {name: run(x) for name, run in self.runs.items()}
        # Not compiled, the bits must be the same: what differs then is the compiler's doing.
        same = all(map(torch.equal, self.sharded(x), eager))
        found = {name: distances(each, right) for name, each in {"eager": eager, **outputs}.items()}
        differs = outputs["sharded"][-1].float() - outputs["replicated"][-1].float()
        logits = {"largest_logit": float(right[-1].abs().max()), "largest_difference": float(differs.abs().max())}
        return {"seed": seed, "eager_bits_equal": same, **logits, "distances": found}

    def as_cut(self, seed: int) -> bool:
        """Whether the replicated model, compiled with operators at the same places, gives the sharded one's bits."""
        x = self.input(seed)
        sharded = [each.clone() for each in self.runs["sharded"](x)]
        self.runs.clear()
        torch.compiler.reset()
        cut = family_cut.cut(self.replicated, *family_cut.borders(self.sharded))
        return all(map(torch.equal, self._compiled(cut)(x), sharded))


def rows_of(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each layer: medians over the seeds, and the largest and smallest ratio of any seed."""
    rows = []
    layers = len(seeds[0]["distances"]["sharded"])
    for number in range(layers):
        of = {name: [each["distances"][name][number] for each in seeds] for name in seeds[0]["distances"]}
        ratios = [mine / its if its else float(mine == 0) or float("inf")
                  for mine, its in zip(of["sharded"], of["replicated"], strict=True)]  # fmt: skip
        row: dict[str, Any] = {"layer": "logits" if number == layers - 1 else str(number)}
        row |= {name: statistics.median(each) for name, each in of.items()}
        rows.append(row | {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)})
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    titles = ("eager", "replicated", "sharded", "ratio", "least", "most")
    lines = [f"{'layer':<8}" + "".join(f"{title:>12}" for title in titles)]
    lines += [f"{row['layer']:<8}" + "".join(f"{row[title]:>12.5f}" for title in titles) for row in rows]
    return "\n".join(lines)


def evaluate(result: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    most = max(row["most"] for row in result["rows"])
    equal = all(each["eager_bits_equal"] for each in result["seeds"])
    what = "compiled, distance from the float32 program: sharded : replicated, any layer, any seed"
    found = [{"what": what, "limit": f"{limit:.3f}", "found": f"{most:.3f}",
              "result": "met" if most <= limit else "MISSED"}]  # fmt: skip
    found.append({"what": "not compiled: sharded and replicated, any layer, any seed", "limit": "equal",
                  "found": "equal" if equal else "not equal", "result": "met" if equal else "MISSED"})  # fmt: skip
    return found


def run_rank(options: argparse.Namespace, ranks: Ranks) -> int:
    models = Models(options, ranks)
    config = {name: value for name, value in vars(options).items() if name not in ("devices", "save")}
    config |= {"devices": [str(each) for each in ranks.devices], "transport": models.transport}
    result: dict[str, Any] = {"bench": "rounding", "config": config, "as_cut": None, "rows": [], "seeds": []}

    def save() -> None:
        torch_save.save(options.save, ranks, result)

    for seed in range(options.seeds):
        ranks.note(f"seed {seed}")
        models.draw(seed)
        if ranks.rank == 0:
            result["seeds"].append(models.compare(seed))
            result["rows"] = rows_of(result["seeds"])
            result["targets"] = evaluate(result, options.limit)
        ranks.barrier()
        save()
    if ranks.rank == 0:
        ranks.say(as_text(result["rows"]))
        largest = max(each["largest_difference"] for each in result["seeds"])
        ranks.say(f"largest difference of a logit {largest:.4g}, largest logit "
                  f"{max(each['largest_logit'] for each in result['seeds']):.4g}")  # fmt: skip
        for row in result["targets"]:
            ranks.say(f"{row['what']}: at most {row['limit']}, {row['found']}: {row['result']}")
        result["as_cut"] = models.as_cut(options.seeds - 1)
        said = "the sharded model's bits" if result["as_cut"] else "NOT the sharded model's bits"
        ranks.say(f"replicated, compiled with operators that do nothing at the same places: {said}")
    ranks.barrier()
    save()
    good = ranks.first(all(row["result"] == "met" for row in result.get("targets", [])))
    models.handle.close()
    return 0 if good else 1


def main() -> int:
    options = arguments()
    return torch_launch.run(options.devices, lambda ranks: run_rank(options, ranks))


if __name__ == "__main__":
    sys.exit(main())

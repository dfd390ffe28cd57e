#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Wan2.2-A14B's transformer on ranks that split the tokens (Ulysses): its blocks replicated, by layershard, by FSDP2.

    bench/torch/wan.py --save wan.json                   # all GPUs, one rank each; else two ranks on one
    ... wan.py --devices 0,0 --layers 8 --rounds 9       # one GPU: bits, memory, the program; no NVLink
    ... wan.py --experts 2 --layers 8                    # both experts of Wan2.2, the second one takes over in the pass
    ... wan.py --shape tiny --video 64x32x9 --devices cpu,cpu --rounds 3 --warm-ms 1

A pass is the steps of a denoising, with diffusers' own model and context parallelism and with random weights. The
variants run in shuffled rounds (torch_rounds.py), each with the same all-to-alls; outputs are compared bit by bit. Then
the all-to-alls are timed by themselves: in passes, where layershard's fetches are under way beside them, and back to
back beside a link that is never idle. It needs diffusers.

Exit status: 0; 1 when something failed or bits were wrong; 3 when the result is inconclusive: replicated drifted.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_launch
import torch_rounds
import torch_save
import torch_table
import wan_alltoall
import wan_model
import wan_report
import wan_schemes
import wan_times

WARM_UP = (64, 64)


def largest_exchange(shape: dict[str, int], tokens: int, size: int) -> int:
    """Bytes that a rank gives to one: this rank's activations, or the output of all tokens, or what warms up."""
    activations = tokens // size * wan_model.width_of(shape)
    return 2 * max(activations, tokens * shape["out_channels"] * 4, WARM_UP[0] * WARM_UP[1])


def warm_up(ranks: torch_launch.Ranks, alltoalls: wan_alltoall.AllToAlls) -> None:
    """What allocates by itself once (NCCL, cuBLAS) must not count as any variant's memory."""
    x = torch.ones(WARM_UP, device=ranks.device, dtype=torch.bfloat16)
    torch.nn.functional.linear(x, x)
    alltoalls(x, torch.distributed.group.WORLD)
    ranks.synchronize()


def first_passes(ranks: torch_launch.Ranks, scheme: wan_schemes.Scheme, run: Callable[[], Any]) -> str | None:
    """What a pass takes for a while, by torch's allocator: activations, and what FSDP2 has gathered. What a steady pass
    fetches: nothing where the windows hold all that others have. Returns why there can be no pass, on all ranks the
    same."""
    trouble, fetched, before = None, 0, torch.cuda.memory_allocated() if ranks.on_gpus else 0
    try:
        scheme.begin()
        run()
        ranks.synchronize()
        if ranks.on_gpus:
            torch.cuda.reset_peak_memory_stats()
        fetched = scheme.fetched_bytes
        run()
        ranks.synchronize()
    except Exception as error:  # of whatever the scheme uses; also no memory
        trouble = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    trouble = ranks.agree(trouble)
    if trouble is not None:
        return trouble
    scheme.memory["fetched_bytes"] = max(ranks.gather(scheme.fetched_bytes - fetched))
    if ranks.on_gpus:
        scheme.memory["pass_bytes"] = max(ranks.gather(torch.cuda.max_memory_allocated() - before))
    scheme.rest()
    ranks.synchronize()
    return None


def build_all(
    options: argparse.Namespace, ranks: torch_launch.Ranks, builder: wan_schemes.Builder, denoiser: wan_model.Denoiser
) -> tuple[list[wan_schemes.Scheme], list[torch_table.Variant], dict[str, str]]:
    """The schemes that can be built, their variants, and why the others cannot."""
    schemes: list[wan_schemes.Scheme] = []
    variants: list[torch_table.Variant] = []
    not_built: dict[str, str] = {}
    for scheme in wan_schemes.schemes_of(options, ranks):
        ranks.note(f"building {scheme.name}")
        trouble = builder.build(scheme)
        run = functools.partial(denoiser.run, scheme.experts)
        if trouble is None:
            trouble = first_passes(ranks, scheme, run)
        if trouble is not None:
            if scheme.name == wan_schemes.CONTROL:
                raise ValueError(f"{scheme.name}, which all else is compared with, cannot be built: {trouble}")
            not_built[scheme.name] = trouble
            continue
        # FSDP2's weights are elsewhere in each pass, and cuBLAS may choose by alignment.
        check = "close" if scheme.kind == "fsdp2" else "bits"
        schemes.append(scheme)
        variants.append(
            torch_table.Variant(scheme.name, run, scheme.begin, scheme.rest, check=check, details=scheme.details)
        )
    return schemes, variants, not_built


def measure(options: argparse.Namespace, ranks: torch_launch.Ranks) -> int:
    from diffusers.utils import logging

    logging.set_verbosity_error()  # what it calls experimental is what is wanted
    carrier = wan_alltoall.carrier_of(options.all_to_all, ranks)
    builder = wan_schemes.Builder(options, ranks)
    tokens, steps = wan_model.tokens_of(options.video), options.steps or options.experts
    alltoalls = wan_alltoall.AllToAlls(ranks, carrier, largest_exchange(builder.shape, tokens, ranks.size))
    alltoalls.install()
    warm_up(ranks, alltoalls)
    ranks.say(
        f"Wan2.2 {options.shape}, {builder.layers} blocks, {options.experts} expert(s), {options.video}: {tokens} "
        f"tokens in all, {steps} step(s) a pass, {ranks.size} ranks on {', '.join(map(str, ranks.devices))}; "
        f"all-to-alls by {wan_alltoall.TEXTS[carrier]}"
    )
    denoiser = wan_model.Denoiser(builder.shape, options.video, steps, ranks.device, options.text_tokens)
    schemes, variants, not_built = build_all(options, ranks, builder, denoiser)
    rounds = torch_rounds.Rounds(
        ranks,
        passes=options.passes,
        rounds=options.rounds,
        warm_ms=options.warm_ms,
        minutes=ranks.minutes_each(options.minutes, 1),
    )
    table = rounds.run(variants)
    table.not_run.update(not_built)
    ranks.say(f"{table.as_text()}\n\n{wan_report.memory_text(schemes)}\n")
    found = wan_report.evaluate(ranks, table, schemes)
    result = {
        "shape": options.shape,
        "layers": builder.layers,
        "experts": options.experts,
        "video": options.video,
        "steps": steps,
        "ranks": ranks.size,
        "all_to_all": wan_alltoall.TEXTS[carrier],
        "tables": [table.as_json(tokens=tokens)],
        "memory": {"rows": [{"variant": scheme.name} | scheme.memory for scheme in schemes]},
        "targets": {"rows": found},
    }
    # Once now: what comes next may fail, and the table took the time.
    torch_save.save(options.save, ranks, result)
    ran = [name for name, times in table.times.items() if times]
    stand = wan_times.in_passes(
        ranks, alltoalls, [variant for variant in variants if variant.name in ran], options.alltoall_rounds
    )
    result["all_to_alls"] = {"rows": stand}
    ranks.say(wan_report.alltoall_text(stand, "all-to-alls in passes of"))
    result["all_to_alls_beside_fetches"] = {"rows": []}
    if ranks.on_gpus:
        shared = [scheme for scheme in schemes if scheme.handles and scheme.name in ran]
        by_themselves = wan_times.Beside(ranks, alltoalls, wan_model.width_of(builder.shape), tokens)
        result["all_to_alls_beside_fetches"]["rows"] = beside = by_themselves.run(shared, options.alltoall_rounds)
        ranks.say(wan_report.alltoall_text(beside, "back to back, beside fetches of"))
    alltoalls.remove()
    ranks.say(f"\n{wan_report.targets_text(found, ranks)}")
    torch_save.save(options.save, ranks, result)
    return 0 if table.conclusive else 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--devices", help="one a rank: 0,1 or 0,0 or cpu,cpu (default: all GPUs, or the only one twice)")
    add("--shape", choices=sorted(wan_model.SHAPES), default="a14b")
    add("--layers", type=int, default=0, help="blocks (default: the model's)")
    add("--experts", type=int, choices=(1, 2), default=1, help="2: high noise, then low noise, both in memory")
    add("--video", default="832x480x81", help="width x height x frames (default: %(default)s, 32760 tokens)")
    add("--steps", type=int, default=0, help="of the denoising, in a pass (default: one an expert)")
    add("--text-tokens", type=int, default=wan_model.TEXT_TOKENS, help="tokens of the prompt (default: %(default)s)")
    add("--attention", default="native", help="diffusers' attention backend (default: %(default)s)")
    add("--transport", help="layershard's (default: cuda; cuda:copy on one GPU, shm:copy on processors)")
    add("--prefetch", type=int, default=1, help="layershard's k (default: %(default)s)")
    add(
        "--pace",
        type=numbers,
        default=[],
        help="GB/s, such as 100,200: as many further variants, with fetches held back to it",
    )
    add("--control", action="store_true", help="one variant more: by layershard, every layer resident")
    add("--fsdp-prefetch", type=numbers, default=[1, 2], help="blocks ahead (default: 1,2; '' for no FSDP2)")
    add("--all-to-all", choices=wan_alltoall.CARRIERS, default="auto", help="what carries them (default: by device)")
    add("--passes", type=int, default=2, help="timed passes of a sample (default: %(default)s)")
    add("--rounds", type=int, default=31, help="samples of each variant (default: %(default)s)")
    add("--warm-ms", type=float, default=200, help="time of untimed passes before each sample (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        help="rounds end early, at least 3 are made, so that their table is there in time",
    )
    add(
        "--alltoall-rounds",
        type=int,
        default=5,
        help="in which the all-to-alls are timed by themselves (default: %(default)s)",
    )
    add("--save", help="write the result to this file as JSON, with machine, date, command and versions")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("diffusers") is None:
        parser.error("diffusers is not installed: pip install 'layershard[diffusers]'")
    try:
        n_ranks = len(torch_launch.devices_of(options.devices))
        heads = wan_model.SHAPES[options.shape]["num_attention_heads"]
        tokens = wan_model.tokens_of(options.video)
        if tokens % n_ranks or heads % n_ranks:
            raise ValueError(f"{tokens} tokens and {heads} heads do not divide by {n_ranks} ranks")
    except ValueError as error:
        parser.error(str(error))
    if options.rounds < 1 or options.passes < 1 or options.alltoall_rounds < 1:
        parser.error("--rounds, --passes and --alltoall-rounds must be at least 1")
    return options


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    options = parse()
    devices = torch_launch.devices_of(options.devices)
    status = torch_launch.launch(len(devices))
    if status is not None:
        sys.exit(status)
    ranks = torch_launch.join(devices)
    if not ranks.on_gpus:
        torch.set_num_threads(1)
    try:
        with torch.no_grad():
            status = measure(options, ranks)
    except (torch_rounds.WrongBits, ValueError) as error:
        ranks.say(f"{type(error).__name__}: {error}")
        status = 1
    torch_launch.leave(ranks)
    sys.exit(status)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Wan2.2-A14B's transformer on ranks that split the tokens (Ulysses): its blocks replicated, by layershard, by FSDP2.

    bench/torch/wan.py --save wan.json                   # all GPUs, one rank each; else two ranks on one
    ... wan.py --devices 0,0 --layers 8 --rounds 9       # one GPU: bits, memory, the program; no NVLink
    ... wan.py --experts 2 --layers 8                    # both experts of Wan2.2, the second one takes over in the pass
    ... wan.py --shape tiny --video 64x32x9 --devices cpu,cpu --rounds 3 --warm-ms 1

A pass is the steps of a denoising, with diffusers' own model and context parallelism and with random weights. The ways
run in shuffled rounds (torch_rounds.py), each with the same all-to-alls; what comes out is compared bit by bit. Then
the all-to-alls are timed by themselves: in passes, where layershard's pulls are under way beside them, and back to back
beside a link that is never idle. It needs diffusers.

Status: 1 wrong bits or another failure, 3 the table is void because the replicated way drifted.
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
import wan_times
import wan_ways

WARM_UP = (64, 64)


def largest_exchange(shape: dict[str, int], tokens: int, size: int) -> int:
    """Bytes that a rank gives to one: this rank's activations, or the output of all tokens, or what warms up."""
    activations = tokens // size * wan_model.width_of(shape)
    return 2 * max(activations, tokens * shape["out_channels"] * 4, WARM_UP[0] * WARM_UP[1])


def warm_up(meeting: torch_launch.Meeting, alltoalls: wan_alltoall.AllToAlls) -> None:
    """What allocates by itself once (NCCL, cuBLAS) must not count as any way's memory."""
    x = torch.ones(WARM_UP, device=meeting.device, dtype=torch.bfloat16)
    torch.nn.functional.linear(x, x)
    alltoalls(x, torch.distributed.group.WORLD)
    meeting.synchronize()


def first_passes(meeting: torch_launch.Meeting, way: wan_ways.Way, run: Callable[[], Any]) -> str | None:
    """What a pass takes for a while, by torch's allocator: activations, and what FSDP2 has gathered. What a steady pass
    pulls: nothing where the windows hold all that others have. Returns why there can be no pass, on all ranks the
    same."""
    trouble, pulled, before = None, 0, torch.cuda.memory_allocated() if meeting.on_gpus else 0
    try:
        way.begin()
        run()
        meeting.synchronize()
        if meeting.on_gpus:
            torch.cuda.reset_peak_memory_stats()
        pulled = way.pulled_bytes
        run()
        meeting.synchronize()
    except Exception as error:  # of whatever the way uses; also no memory
        trouble = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    trouble = meeting.agree(trouble)
    if trouble is not None:
        return trouble
    way.memory["fetched_bytes"] = max(meeting.gather(way.pulled_bytes - pulled))
    if meeting.on_gpus:
        way.memory["pass_bytes"] = max(meeting.gather(torch.cuda.max_memory_allocated() - before))
    way.rest()
    meeting.synchronize()
    return None


def build_all(
    options: argparse.Namespace, meeting: torch_launch.Meeting, builder: wan_ways.Builder, denoiser: wan_model.Denoiser
) -> tuple[list[wan_ways.Way], list[torch_table.Arm], dict[str, str]]:
    """The ways that can be built, their arms, and why the others cannot."""
    ways: list[wan_ways.Way] = []
    arms: list[torch_table.Arm] = []
    not_built: dict[str, str] = {}
    for way in wan_ways.ways_of(options, meeting):
        meeting.note(f"building {way.name}")
        trouble = builder.build(way)
        run = functools.partial(denoiser.run, way.experts)
        if trouble is None:
            trouble = first_passes(meeting, way, run)
        if trouble is not None:
            if way.name == wan_ways.CONTROL:
                raise ValueError(f"{way.name}, which all else is compared with, cannot be built: {trouble}")
            not_built[way.name] = trouble
            continue
        # FSDP2's weights are elsewhere in each pass, and cuBLAS may choose by alignment.
        check = "close" if way.kind == "fsdp2" else "bits"
        ways.append(way)
        arms.append(torch_table.Arm(way.name, run, way.begin, way.rest, check=check, details=way.details))
    return ways, arms, not_built


def measure(options: argparse.Namespace, meeting: torch_launch.Meeting) -> int:
    from diffusers.utils import logging

    logging.set_verbosity_error()  # what it calls experimental is what is wanted
    carrier = wan_alltoall.carrier_of(options.all_to_all, meeting)
    builder = wan_ways.Builder(options, meeting)
    tokens, steps = wan_model.tokens_of(options.video), options.steps or options.experts
    alltoalls = wan_alltoall.AllToAlls(meeting, carrier, largest_exchange(builder.shape, tokens, meeting.size))
    alltoalls.install()
    warm_up(meeting, alltoalls)
    meeting.say(
        f"Wan2.2 {options.shape}, {builder.layers} blocks, {options.experts} expert(s), {options.video}: {tokens} "
        f"tokens in all, {steps} step(s) a pass, {meeting.size} ranks on {', '.join(map(str, meeting.devices))}; "
        f"all-to-alls by {wan_alltoall.TEXTS[carrier]}"
    )
    denoiser = wan_model.Denoiser(builder.shape, options.video, steps, meeting.device, options.text_tokens)
    ways, arms, not_built = build_all(options, meeting, builder, denoiser)
    rounds = torch_rounds.Rounds(meeting, passes=options.passes, rounds=options.rounds, warm_ms=options.warm_ms)
    table = rounds.run(arms)
    table.not_run.update(not_built)
    meeting.say(f"{table.as_text()}\n\n{wan_report.memory_text(ways)}\n")
    found = wan_report.evaluate(meeting, table, ways)
    result = {
        "shape": options.shape,
        "layers": builder.layers,
        "experts": options.experts,
        "video": options.video,
        "steps": steps,
        "ranks": meeting.size,
        "all_to_all": wan_alltoall.TEXTS[carrier],
        "tables": [table.as_json(tokens=tokens)],
        "memory": {"rows": [{"variant": way.name} | way.memory for way in ways]},
        "targets": {"rows": found},
    }
    # Once now: what comes next may fail, and the table took the time.
    torch_save.save(options.save, meeting, result)
    ran = [name for name, times in table.times.items() if times]
    stand = wan_times.in_passes(meeting, alltoalls, [arm for arm in arms if arm.name in ran], options.alltoall_rounds)
    result["all_to_alls"] = {"rows": stand}
    meeting.say(wan_report.alltoall_text(stand, "all-to-alls in passes of"))
    result["all_to_alls_beside_fetches"] = {"rows": []}
    if meeting.on_gpus:
        shared = [way for way in ways if way.handles and way.name in ran]
        by_themselves = wan_times.Beside(meeting, alltoalls, wan_model.width_of(builder.shape), tokens)
        result["all_to_alls_beside_fetches"]["rows"] = beside = by_themselves.run(shared, options.alltoall_rounds)
        meeting.say(wan_report.alltoall_text(beside, "back to back, beside pulls of"))
    alltoalls.remove()
    meeting.say(f"\n{wan_report.targets_text(found, meeting)}")
    torch_save.save(options.save, meeting, result)
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
    add("--text-tokens", type=int, default=wan_model.TEXT_TOKENS, help="default: %(default)s")
    add("--attention", default="native", help="diffusers' attention backend (default: %(default)s)")
    add("--transport", help="layershard's (default: cuda; cuda:copy on one GPU, shm:copy on processors)")
    add("--prefetch", type=int, default=1, help="layershard's k (default: %(default)s)")
    add("--pace", type=numbers, default=[], help="GB/s, such as 100,200: as many further ways, with pulls held back")
    add("--control", action="store_true", help="a way more: by layershard, every layer resident")
    add("--fsdp-prefetch", type=numbers, default=[1, 2], help="blocks ahead (default: 1,2; '' for no FSDP2)")
    add("--all-to-all", choices=wan_alltoall.CARRIERS, default="auto", help="what carries them (default: by device)")
    add("--passes", type=int, default=2, help="in a sample (default: %(default)s)")
    add("--rounds", type=int, default=31, help="default: %(default)s")
    add("--warm-ms", type=float, default=200, help="of the same way before each sample (default: %(default)s)")
    add("--alltoall-rounds", type=int, default=5, help="for their own time (default: %(default)s)")
    add("--save", help="a file for the results, JSON")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("diffusers") is None:
        parser.error("diffusers is not installed: pip install 'layershard[diffusers]'")
    try:
        n_ranks = len(torch_launch.devices_of(options.devices))
        heads = wan_model.SHAPES[options.shape]["num_attention_heads"]
        if wan_model.tokens_of(options.video) % n_ranks or heads % n_ranks:
            raise ValueError(f"{n_ranks} ranks cannot share {wan_model.tokens_of(options.video)} tokens, {heads} heads")
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
    meeting = torch_launch.join(devices)
    if not meeting.on_gpus:
        torch.set_num_threads(1)
    try:
        with torch.no_grad():
            status = measure(options, meeting)
    except (torch_rounds.WrongBits, ValueError) as error:
        meeting.say(f"{type(error).__name__}: {error}")
        status = 1
    torch_launch.leave(meeting)
    sys.exit(status)


if __name__ == "__main__":
    main()

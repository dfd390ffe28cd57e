#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a hooked module costs over one with an empty hook, in microseconds; and what a pass allocates.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so bench/torch/python_overhead.py [--device cuda]

Two ranks share two layers, so that each rank has one window and it always holds what is needed: nothing is transferred,
only calls are left. Two models of modules that do nothing take turns, one with layershard's hooks and one with empty
hooks of the same kind; the least of many blocks of calls counts. The target is 5 us a hooked module, in inference mode
and in grad mode, where autograd is watched for shared weights that it would save; no graph is made.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time

import torch
from torch import nn

TARGET_US = 5.0


class Idle(nn.Module):
    """A weight and no work: what a call costs is the call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Block(nn.Module):
    def __init__(self, n_modules: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Idle() for _ in range(n_modules))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.inner:
            x = module(x)
        return x


def build(n_modules: int, device: str) -> nn.ModuleList:
    return nn.ModuleList(Block(n_modules) for _ in range(2)).to(device).eval()


def empty_hooks(model: nn.ModuleList, scope: str) -> int:
    """On the modules that layershard hooks; how many they are."""
    hooked = [each for each in model.modules() if isinstance(each, Block | Idle if scope == "linear" else Block)]
    for module in hooked:
        module.register_forward_pre_hook(lambda module, args, kwargs: None, prepend=True, with_kwargs=True)
    return len(hooked)


def block_us(model: nn.ModuleList, x: torch.Tensor, passes: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(passes):
        for block in model:
            block(x)
    return (time.perf_counter_ns() - begin) / 1e3 / passes


def allocations(model: nn.ModuleList, x: torch.Tensor) -> int:
    """Made by torch's allocator in a few passes."""
    if x.is_cuda:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        block_us(model, x, 5)
        return torch.cuda.memory_stats()["allocation.all.allocated"] - before
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        block_us(model, x, 5)
    return sum(event.name == "[memory]" for event in profile.events())


def compare(n_modules: int, scope: str, device: str, blocks: int, grad: bool) -> tuple[float, float, int, int]:
    """Microseconds of a pass with empty hooks and with layershard's; hooked modules; allocations in five passes."""
    import layershard.torch as sharding

    bare, hooked = build(n_modules, device), build(n_modules, device)
    hooks = empty_hooks(bare, scope)
    root = nn.Module()
    root.layers = hooked
    transport = "shm:copy" if device == "cpu" else "cuda:copy"
    sharding.shard(root, "layers.*.inner.*", scope=scope, layer="layers.*", transport=transport)
    if not any(each.windows for each in sharding.of(root).stats().values()):
        raise SystemExit("the ranks read each other's layers in place: there is no hook to measure")
    x = torch.zeros(4, device=device)
    with torch.inference_mode(not grad):
        pairs = [(block_us(bare, x, 50), block_us(hooked, x, 50)) for _ in range(blocks)]
        made = allocations(hooked, x)
    return min(each for each, _ in pairs), min(each for _, each in pairs), hooks, made


def rank_main(rank: int, job: str, options: argparse.Namespace) -> None:
    os.environ.update(LAYERSHARD_RANK=str(rank), LAYERSHARD_SIZE="2", LAYERSHARD_JOB=job)
    torch.set_num_threads(1)
    if options.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    worst = 0.0
    shapes = ((7, "linear"), (7, "block"), (1, "linear"))
    for n_modules, scope, grad in [(*shape, grad) for grad in (False, True) for shape in shapes]:
        blocks = options.blocks if rank == 0 else 1
        bare, hooked, hooks, made = compare(n_modules, scope, options.device, blocks, grad)
        worst = max(worst, (hooked - bare) / hooks)
        if rank == 0:
            print(
                f"{'grad mode, ' if grad else ''}scope {scope}, {n_modules} shared modules a block: "
                f"{hooks} hooks a pass, {bare:.2f} us when empty, "
                f"{hooked:.2f} us with layershard: {(hooked - bare) / hooks:+.2f} us each; "
                f"{made} allocations in 5 passes",
                flush=True,
            )
    if rank == 0:
        result = "met" if worst <= TARGET_US else "MISSED"
        versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
        print(f"{versions}: at most {TARGET_US} us a module: {result}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--blocks", type=int, default=60, help="blocks of 50 passes per model")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    job = f"overhead-{os.getpid()}"
    processes = [context.Process(target=rank_main, args=(rank, job, options)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Ranks of a torch program for tests: forked processes that run one function, and small models for them."""

import itertools
import multiprocessing
import os
import socket
import time
import traceback

import pytest
from patience import LONG_S
from rank_ends import crash_of

torch = pytest.importorskip("torch", reason="torch is not installed")

DEADLINE_S = LONG_S
_jobs = itertools.count()
_fork = multiprocessing.get_context("fork")

# A forked process cannot use the parent's OpenMP threads: there must be none. Two ranks on two cores need no more.
torch.set_num_threads(1)


def _work(sender, rank, size, job, environment, function, arguments):
    torch.set_num_threads(1)  # a forked process makes its pool anew: by itself, before autograd's threads race for it
    os.environ.update(LAYERSHARD_RANK=str(rank), LAYERSHARD_SIZE=str(size), LAYERSHARD_JOB=job, **environment)
    try:
        result = "value", function(rank, size, *arguments)
    except BaseException:
        result = "raised", f"rank {rank} of {size}:\n{traceback.format_exc()}"
    sender.send(result)


def start(size, function, *arguments, **environment):
    """Processes, and the pipes on which they send their results. Windows hold poison: nothing is right by luck."""
    environment = {"LAYERSHARD_POISON": "1", **environment}
    job = f"test-torch-{os.getpid()}-{next(_jobs)}"
    started = []
    for rank in range(size):
        receiver, sender = _fork.Pipe(duplex=False)
        given = (sender, rank, size, job, environment, function, arguments)
        process = _fork.Process(target=_work, args=given, daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    return started


def finish(started):
    """What each rank returned, None for one that was killed; fails with the texts of all that raised."""
    end = time.monotonic() + DEADLINE_S
    results, failures = [], []
    for rank, (process, receiver) in enumerate(started):
        if not receiver.poll(max(0, end - time.monotonic())):
            process.kill()
            failures.append(f"rank {rank} hangs")
            continue
        try:
            kind, value = receiver.recv()
        except EOFError:
            kind, value = "value", None
        (results if kind == "value" else failures).append(value)
        failures.extend(filter(None, [crash_of(rank, process, DEADLINE_S)]))
    assert not failures, "\n".join(failures)
    return results


def run(size, function, *arguments, **environment):
    """function(rank, size, *arguments) on every rank; what each returned."""
    return finish(start(size, function, *arguments, **environment))


def free_port():
    """For the ranks of one program to find each other at: torchrun's own is the same for all that run at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def quick_inductor(folder):
    """Let inductor keep in @folder what it makes, and make it with as little work as can be: what matters here is what
    it puts in which order, not how fast that runs."""
    import torch._inductor.config as config

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    config.compile_threads = 1  # else it starts a process that imports torch
    config.cpp.simdlen = 1
    config.cpp_cache_precompile_headers = True


# ---- Models ----


class Block(torch.nn.Module):
    """Sizes are odd on purpose: nothing divides by anything."""

    def __init__(self, width):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 2 * width + 1)
        self.down = torch.nn.Linear(2 * width + 1, width, bias=False)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        return x + self.scale * self.down(torch.relu(self.up(self.norm(x))))


class Stack(torch.nn.Module):
    def __init__(self, n_layers=5, width=37):
        super().__init__()
        self.embed = torch.nn.Linear(8, width)
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(n_layers))
        self.head = torch.nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack(seed=1, **options):
    """The same on every rank."""
    torch.manual_seed(seed)
    return Stack(**options).eval()


def spoil(model, rank, size, parts=("norm", "up", "down", "scale")):
    """Make what is to be shared wrong where this rank is not its source: right results then came from a peer."""
    for index, layer in enumerate(model.layers):
        for name, tensor in [*layer.named_parameters(), ("scale", layer.scale)]:
            if index % size != rank and name.split(".")[0] in parts:
                tensor.data.fill_(float("nan"))


def inputs(rank, rows=3):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(100 + rank))

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Models made at random, sharded, compiled by inductor and compared, bit for bit, with the same compiled program that
is not sharded.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so tests/python/random_runs.py blocks --seeds 500

Compared are the results of each pass and the buffers after it. One rank computes, the others store layers; windows hold
poison.
"""

import argparse
import random
import sys
import tempfile
import time
import traceback

import random_modules

import layershard.torch as sharding
import torch_ranks as ranks

torch = ranks.torch

RANKS = 3
MODES = ("whole", "dynamic", "blocks")  # dynamic: whole, and passes have different numbers of rows
GRAPHS = "graphs"  # on a GPU: whole, and CUDA graphs of what lies between the library's calls
WARM = 10  # models a process compiles before a fresh one takes over: it is given minutes, also on a busy machine


def compile_by(mode, model):
    torch.compiler.reset()
    # Block by block, dynamo takes a number on a submodule of the block for a constant unless told otherwise.
    torch._dynamo.config.allow_unspec_int_on_nn_module = mode == "blocks"
    if mode == GRAPHS:
        return torch.compile(model, fullgraph=True, mode="reduce-overhead")
    if mode != "blocks":
        return torch.compile(model, fullgraph=True, dynamic=mode == "dynamic")
    for layer in model.layers:
        layer.compile(fullgraph=True)
    return model


def inputs(mode, seed):
    rows = (5, 7, 5) if mode == "dynamic" else (5, 5, 5)
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(n, random_modules.WIDTH, generator=draw) for n in rows]


def passes(mode, model, xs):
    """What each pass of the compiled model gives, and its buffers after it: tensors in one list."""
    run = compile_by(mode, model)
    return [each.clone() for x in xs for each in (*run(x), *model.buffers())]


def differences(got, want):
    """The tensors that are not the same, bit for bit, and by how much they are off: NaN is poison."""
    return [
        f"{number}: {float((a - b).abs().max())}"
        for number, (a, b) in enumerate(zip(got, want, strict=True))
        if not torch.equal(a.view(torch.int32), b.view(torch.int32))
    ]


def model_of(seed):
    """One in ten keeps in an attribute what it computes: that is right or refused."""
    return random_modules.model(seed, keeps=seed % 10 == 9)


def sharded(mode, seed):
    """A model, and how it is sharded."""
    draw = random.Random(1000 + seed)
    how = {"scope": draw.choice(["block", "linear"]), "prefetch": draw.randint(0, 2)}
    modules = draw.choice(["layers.*", ["*.up", "*.down", "*.tap"]])
    model = model_of(seed)
    with gradients_off(seed):
        sharding.shard(model, modules, transport="shm:copy", **how)
    return model, {"modules": modules, **how}


def gradients_off(seed):
    return torch.no_grad() if seed % 2 else torch.inference_mode()


def wrong(mode, seed, model, how):
    """How a sharded model differs, or what was raised; None where it is right."""
    xs = inputs(mode, seed)
    try:
        with gradients_off(seed):
            found = differences(passes(mode, model, xs), passes(mode, model_of(seed), xs))
        return f"seed {seed} ({mode}, {how}) differs: {found}" if found else None
    except Exception as error:
        if isinstance(error, sharding.Refused) and seed % 10 == 9:
            return None
        return f"seed {seed} ({mode}, {how}): {traceback.format_exc()}"


def all_wrong(rank, size, mode, seeds, folder):
    """The ranks meet for all models first: nobody waits for a compiler."""
    ranks.quick_inductor(folder)
    models = [(seed, *sharded(mode, seed)) for seed in seeds]
    found = [] if rank else [wrong(mode, *each) for each in models]
    for _, model, *_ in models:
        sharding.of(model).close()
    return [each for each in found if each]


def import_compiler():
    """Seconds of imports, before ranks are forked."""
    with torch.no_grad():
        torch.compile(torch.nn.ReLU(), backend="aot_eager")(torch.ones(1))
    torch.compiler.reset()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    import_compiler()
    began, n_wrong = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        for begin in range(options.first, options.first + options.seeds, WARM):
            seeds = range(begin, min(begin + WARM, options.first + options.seeds))
            for each in sum(ranks.run(RANKS, all_wrong, options.mode, seeds, folder), []):
                n_wrong += 1
                print(each, flush=True)
            done, seconds = seeds[-1] + 1 - options.first, time.monotonic() - began
            print(f"{options.mode}: {done} models, {n_wrong} wrong, {seconds:.0f} s", flush=True)
    tried = f"{options.seeds} models from seed {options.first} on, {n_wrong} wrong"
    print(f"torch {torch.__version__}, {options.mode}: {tried}; bits of the same compiled program unsharded")
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    main()

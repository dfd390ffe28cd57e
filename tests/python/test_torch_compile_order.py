# SPDX-License-Identifier: Apache-2.0
"""Under torch.compile every read of a layer's weights stays between its arrival and the next one's, whatever a program
does with a block's results: models made at random, with poison, so that a read too early or too late gives NaN.

The results are compared with those of the same model in eager mode that is not sharded, which costs no second
compilation; a difference counts if the same compiled program has none that is not sharded. LAYERSHARD_TEST_SEEDS says
how many models there are. One rank computes, the others store layers.
"""

import os
import random

import pytest
import random_modules

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

SEEDS = range(int(os.environ.get("LAYERSHARD_TEST_SEEDS", 20)))
GROUPS, RANKS = 10, 3

# What compiling imports, seconds of it, is there when ranks are forked.
with torch.no_grad():
    torch.compile(torch.nn.ReLU(), backend="aot_eager")(torch.ones(1))
torch.compiler.reset()


def off_by(got, want):
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


def compiled(model, x, **how):
    """The results of three passes."""
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, **how)
    return [[each.clone() for each in run(x)] for _ in range(3)]


def sharded(seed):
    """A model, its input, what it computes before it is sharded, and how it is to be compiled and was sharded."""
    draw = random.Random(1000 + seed)
    how = {"scope": draw.choice(["block", "linear"]), "prefetch": draw.randint(0, 2)}
    dynamic = draw.random() < 0.3
    x = torch.randn(5, random_modules.WIDTH, generator=torch.Generator().manual_seed(seed))
    model = random_modules.model(seed)
    want = [each.clone() for each in model(x)]
    sharding.shard(model, "layers.*", transport="shm:copy", **how)
    return model, x, want, dynamic, how


def wrong(seed, model, x, want, dynamic, how):
    """How far a model is off; None where it is right."""
    error = max(off_by(got, want) for got in compiled(model, x, dynamic=dynamic))
    if error < 1e-4:
        return None
    theirs = max(off_by(got, want) for got in compiled(random_modules.model(seed), x, dynamic=dynamic))
    return f"seed {seed} is off by {error}, by {theirs} when not sharded ({how}, dynamic {dynamic})"


def all_wrong(rank, size, seeds, folder):
    """The ranks meet for all models first: nobody waits for a compiler."""
    ranks.quick_inductor(folder)
    with torch.inference_mode():
        models = [(seed, *sharded(seed)) for seed in seeds]
        found = [] if rank else [wrong(*each) for each in models]
        for _, model, *_ in models:
            sharding.of(model).close()
    return [each for each in found if each]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where inductor keeps what it has made."""
    return str(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_models(group, made):
    found = ranks.run(RANKS, all_wrong, SEEDS[group::GROUPS], made, LAYERSHARD_POISON="1")
    assert found == [[]] * RANKS


def kept_in_an_attribute(rank, size, folder):
    ranks.quick_inductor(folder)
    x = torch.randn(5, random_modules.WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = [each.clone() for each in random_modules.model(3, keeps=True)(x)]
        model = sharding.shard(random_modules.model(3, keeps=True), "layers.*", scope="block", transport="shm:copy")
        assert off_by(model(x), want) == 0
        if rank:
            return "return it from the module"
        try:
            return max(off_by(got, want) for got in compiled(model, x))
        except sharding.Refused as refusal:
            return str(refusal)


def test_what_a_module_keeps_to_itself_is_right_or_refused(made):
    for found in ranks.run(2, kept_in_an_attribute, made, LAYERSHARD_POISON="1"):
        assert "return it from the module" in found if isinstance(found, str) else found < 1e-4

# SPDX-License-Identifier: Apache-2.0
"""Hooks of the program that are methods, on modules that have layershard's before them, in compiled programs."""

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")


class Scaled:
    """Of the program: a method as a hook, and what it asks may change between passes."""

    def __init__(self):
        self.by = 1.0

    def hook(self, module, args):
        return (args[0] * self.by,)


def hooked():
    model, scaled = ranks.stack(), Scaled()
    for layer in model.layers:
        layer.register_forward_pre_hook(scaled.hook)
    return model, scaled


def computes_hooked(rank, size):
    (model, mine), (want, theirs), x = hooked(), hooked(), ranks.inputs(rank)
    ranks.spoil(model, rank, size, ("norm", "up", "down"))
    run = torch.compile(sharding.shard(model, "layers.*", transport="shm:copy"), backend="eager", fullgraph=True)
    with torch.inference_mode():
        for mine.by in (1.0, 2.0):
            theirs.by = mine.by
            assert torch.equal(run(x), want(x))


def test_hooks_of_the_program_that_are_methods_are_compiled_as_they_are():
    torch.compile(torch.nn.ReLU(), backend="eager")(torch.ones(1))  # what that imports is there when ranks are forked
    ranks.run(2, computes_hooked)


def beside_one_that_is_not(rank, size, before):
    """Called in turns, each by what was compiled for it."""
    model, plain = ranks.stack(), ranks.stack()
    if before:
        torch.compile(plain, backend="eager")(ranks.inputs(0))
    sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
    run, want = (torch.compile(each, fullgraph=True, backend="eager") for each in (model, plain))
    with torch.no_grad():
        found = [torch.equal(run(x), want(x)) for x in map(ranks.inputs, range(3))]
    sharding.of(model).close()
    return found


@pytest.mark.parametrize("before", (False, True))
def test_a_model_of_the_same_class_is_compiled_by_itself(before):
    assert ranks.run(2, beside_one_that_is_not, before) == [[True] * 3] * 2

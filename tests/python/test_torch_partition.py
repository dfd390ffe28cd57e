# SPDX-License-Identifier: Apache-2.0
"""Inductor's graph partition: torch.compile makes CUDA graphs of what lies between the library's calls, which it leaves
out. The processor stands in for a GPU here, and a function that is called for a graph that is replayed.

What CUDA itself says, see test_torch_generate_cuda.py.
"""

import contextlib
from unittest import mock

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

import random_runs  # noqa: E402

from layershard.torch import ops  # noqa: E402

random_runs.import_compiler()

BLOCKS = {"modules": "layers.*", "scope": "block", "buffers": "*"}
LINEARS = {"modules": ["*.up", "*.down"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where inductor keeps what it has made."""
    return str(tmp_path_factory.mktemp("made"))


class Partitions:
    """How many functions inductor would make graphs of, how often they ran, and whether one is running."""

    def __init__(self):
        self.count = self.runs = 0
        self.is_inside = False

    def wrap(self, function, _metadata):
        self.count += 1

        def replay(given):
            self.runs += 1
            self.is_inside = True
            try:
                return function(given)
            finally:
                self.is_inside = False

        return replay

    def outside(self, call):
        def checked(*arguments):
            assert not self.is_inside, "the library is called from inside a graph"
            return call(*arguments)

        return checked


def static(post_compile):
    """Graphs are passed over where a program changes what it is given and what may lie elsewhere the next time."""

    def checked(self, inputs, constants, options):
        assert self.mutated_input_idxs and self.mutated_input_idxs <= set(options["static_input_idxs"])
        return post_compile(self, inputs, constants, options)

    return checked


@contextlib.contextmanager
def partitioning():
    """As inductor does on a GPU with CUDA graphs on: what is on the processor is taken for what is on a GPU."""
    from torch._inductor import scheduler, utils

    found, real = Partitions(), scheduler.Scheduler.should_partition

    def should_partition(self, node):
        with mock.patch.object(scheduler.BaseSchedulerNode, "is_gpu", lambda _node: True):
            return real(self, node)

    with (
        mock.patch.object(scheduler.Scheduler, "should_partition", should_partition),
        mock.patch.object(utils._unstable_customized_partition_wrapper, "wrapper", found.wrap),
        mock.patch.object(ops.Steps, "refuse_copies", found.outside(ops.Steps.refuse_copies)),
    ):
        yield found


def cut_up(rank, size, how, folder):
    from torch._inductor import output_code

    ranks.quick_inductor(folder)
    model, x = ranks.stack(n_layers=4), ranks.inputs(rank)
    kept = output_code.CompiledFxGraph
    with torch.inference_mode(), partitioning() as found:
        want = model(x)
        sharding.shard(model, **how, transport="shm:copy")
        run = torch.compile(model, fullgraph=True)
        with mock.patch.object(kept, "post_compile", static(kept.post_compile)):
            run(x)
        for _ in range(2):
            assert torch.allclose(run(x), want, atol=1e-5)
        return found.count, found.runs


@pytest.mark.parametrize("how, least", [(BLOCKS, 4), (LINEARS, 8)], ids=["blocks", "linears"])
def test_the_library_is_called_between_graphs(how, least, made):
    for count, runs in ranks.run(2, cut_up, how, made):
        assert count >= least and runs == 3 * count


def random_models(rank, size, mode, seeds, folder):
    with partitioning() as found:
        wrong = random_runs.all_wrong(rank, size, mode, seeds, folder)
    assert found.runs or rank
    return wrong


# In model 1 what is stacked is computed in several partitions.
@pytest.mark.parametrize("mode, seeds", [("whole", (1, 2)), ("dynamic", (3,)), ("blocks", (4,))])
def test_random_models(mode, seeds, made):
    assert ranks.run(random_runs.RANKS, random_models, mode, seeds, made) == [[]] * random_runs.RANKS

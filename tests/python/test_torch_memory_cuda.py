# SPDX-License-Identifier: Apache-2.0
"""Shards and windows in memory of torch's allocator, on an NVIDIA GPU: two processes on one, by the copying mode of the
transport, as on two. torch counts them to the byte, and has them back after detach."""

import gc
import pathlib

import pytest

import layershard
import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

# Asking torch would start the driver in this process, after which no forked one can use it.
if not list(pathlib.Path("/dev").glob("nvidia[0-9]*")) or torch.version.cuda is None:
    pytest.skip("there is no NVIDIA GPU, or torch is built without CUDA", allow_module_level=True)

WIDTH = 4096
N_LAYERS = 6
LAYER_BYTES = WIDTH * WIDTH * 4  # whole blocks of torch's allocator, so that it adds nothing


def linears():
    """A stack of layers of 64 MiB, the same on every rank."""
    torch.manual_seed(1)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(N_LAYERS))).cuda().eval()


def inputs(rank):
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(rank)).cuda()


def allocated():
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def counted(rank, size, options):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, x = linears(), inputs(rank)
    with torch.inference_mode():
        want = model(x).clone()
        model(x)
        whole = allocated()
        for index in range(N_LAYERS):
            if index % size != rank:
                model[index].weight.fill_(float("nan"))
        sharding.shard(model, "*", transport="cuda:copy", memory="torch", **options)
        (stats,) = sharding.of(model).stats().values()
        held = stats.shard_bytes + stats.window_bytes + stats.resident_bytes
        assert held == LAYER_BYTES * (N_LAYERS // size + stats.windows + stats.residents) > stats.shard_bytes
        tokens = allocated() - whole + LAYER_BYTES * N_LAYERS - held
        assert 0 <= tokens <= 4096  # beside the layers: what compiled programs know the model by
        for _ in range(4):
            assert torch.equal(model(x), want)
        gc.collect()
        gc.disable()
        sharding.of(model).detach()
        assert allocated() - whole <= 4096
        gc.collect()
        assert allocated() == whole
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("options", [{}, {"prefetch": 0, "resident": 0.2}, {"placement": "striped"}], ids=str)
def test_torch_counts_what_the_library_keeps(options):
    ranks.run(2, counted, options, LAYERSHARD_POISON="0")


def out_of_memory(rank, size):
    """What torch is not allowed to have it says in its own words, and the model is as it was."""
    model, x = linears(), inputs(rank)
    with torch.inference_mode():
        want = model(x).clone()
        whole = allocated()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + LAYER_BYTES) / total)
        with pytest.raises(layershard.NoMemory) as failed:
            sharding.shard(model, "*", transport="cuda:copy", memory="torch")
        assert isinstance(failed.value.__cause__, torch.OutOfMemoryError)
        assert "Tried to allocate" in str(failed.value)
        assert torch.equal(model(x), want)
        assert allocated() == whole  # by itself: what one assertion computes lives until its end


def test_out_of_memory_is_told_by_torch():
    ranks.run(2, out_of_memory, LAYERSHARD_POISON="0")


def expandable(rank, size):
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    model, x = linears(), inputs(rank)
    with torch.inference_mode():
        want = model(x).clone()
        with pytest.raises(layershard.NotSupported, match="expandable_segments:False"):
            sharding.shard(model, "*", transport="cuda:copy", memory="torch")
        assert torch.equal(sharding.shard(model, "*", transport="cuda:copy")(x), want)  # of the library's own


def test_segments_that_other_processes_cannot_open_are_refused():
    ranks.run(2, expandable, LAYERSHARD_POISON="0")


def auto(rank, size, memory):
    """Two processes have equal parts of one GPU, and what is left free is as much as both have asked for."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model, x, reserve = linears(), inputs(rank), 2**32
    with torch.inference_mode():
        want = model(x).clone()
        sharding.shard(model, "*", transport="cuda:copy", resident="auto", reserve=reserve, memory=memory)
        report = sharding.of(model).report()
        (stats,) = sharding.of(model).stats().values()
        assert "of the GPU, a part for each of the 2 ranks" in report and "4.00 GiB are reserved" in report
        assert stats.residents == N_LAYERS // size  # with 20 GB of memory or more all of them
        assert torch.cuda.mem_get_info()[0] > size * reserve
        assert torch.equal(model(x), want)
        whole = 2 * torch.cuda.mem_get_info()[1]
    again = linears()
    with pytest.raises(sharding.Refused, match="shards and windows need"):
        sharding.shard(again, "*", transport="cuda:copy", resident="auto", reserve=whole)


@pytest.mark.parametrize("memory", ["library", "torch"])
def test_the_dial_is_turned_by_what_the_gpu_has_free(memory):
    ranks.run(2, auto, memory, LAYERSHARD_POISON="0")

# SPDX-License-Identifier: Apache-2.0
"""Sharded models on an NVIDIA GPU: two processes on one, by the copying mode of the transport, as on two.

Needs a GPU and its driver; everything but the speed of a link can be seen on one.
"""

import pathlib

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

# Asking torch would start the driver in this process, after which no forked one can use it.
if not list(pathlib.Path("/dev").glob("nvidia[0-9]*")) or torch.version.cuda is None:
    pytest.skip("there is no NVIDIA GPU, or torch is built without CUDA", allow_module_level=True)

LINEARS = {"modules": ["*.up", "*.down"], "transport": "cuda:copy"}
BLOCKS = {"modules": "layers.*", "scope": "block", "buffers": "*", "transport": "cuda:copy"}


def prepared(rank, size, how, n_layers=6):
    """A sharded model whose foreign weights were wrong before, an input, and what must come out."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model, x = ranks.stack(n_layers=n_layers).cuda(), ranks.inputs(rank, rows=64).cuda()
    with torch.inference_mode():
        want = model(x).clone()
        ranks.spoil(model, rank, size, ("norm", "up", "down", "scale") if how is BLOCKS else ("up", "down"))
    return sharding.shard(model, **how), x, want


def passes(rank, size, how):
    model, x, want = prepared(rank, size, how)
    with torch.inference_mode():
        for _ in range(3 + 5 * rank):
            assert torch.equal(model(x), want)
    stats = sharding.of(model).stats().values()
    assert all(each.windows == 2 and each.fetches for each in stats)


@pytest.mark.parametrize("how", [LINEARS, BLOCKS], ids=["linears", "blocks"])
def test_bits_are_the_same_through_windows(how):
    ranks.run(2, passes, how)


def allocations(model, x):
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        model(x)
    return torch.cuda.memory_stats()["allocation.all.allocated"] - before


def quiet(rank, size):
    """Nothing waits for the device on the host, and hooks allocate nothing."""
    model, x, _ = prepared(rank, size, BLOCKS)
    bare = ranks.stack(n_layers=6).cuda()
    with torch.inference_mode():
        for _ in range(3):
            model(x), bare(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        assert allocations(model, x) == allocations(bare, x) > 0
        torch.cuda.set_sync_debug_mode("default")


def test_no_host_synchronisation_and_no_memory_in_a_pass():
    ranks.run(2, quiet)


def graphs(rank, size):
    model, x, want = prepared(rank, size, BLOCKS)
    handle = sharding.of(model)
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(2):
            model(x)
        handle.prepare()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = model(x)
            handle.join()
        for _ in range(4):
            y.zero_()
            handle.prepare()
            graph.replay()
            stream.synchronize()
            assert torch.equal(y, want)
        assert torch.equal(model(x), want)  # and by calls again


def test_replays_of_a_cuda_graph():
    ranks.run(2, graphs)


def unjoined(rank, size):
    model, x, want = prepared(rank, size, BLOCKS)
    handle, stream = sharding.of(model), torch.cuda.Stream()

    def capture(end):
        graph = torch.cuda.CUDAGraph()
        handle.prepare()
        with torch.cuda.graph(graph, stream=stream):
            y = model(x)
            end()
        handle.prepare()
        graph.replay()
        stream.synchronize()
        return y

    def their_own():
        raise KeyError("theirs")

    with torch.inference_mode(), torch.cuda.stream(stream):
        assert torch.equal(model(x), want)
        with pytest.raises(sharding.Refused, match=r"prepare.*join"):
            capture(lambda: None)
        assert torch.equal(capture(handle.join), want)
        with pytest.raises(KeyError, match="theirs"):
            capture(their_own)
        assert torch.equal(model(x), want)
        assert torch.equal(capture(handle.join), want)


def test_a_capture_without_join_is_refused_and_does_no_harm():
    ranks.run(2, unjoined)


def compiled(rank, size):
    model, x, want = prepared(rank, size, BLOCKS, n_layers=4)
    handle = sharding.of(model)

    def step(x):
        y = model(x)
        handle.join(y)
        return y

    with torch.no_grad():
        for run in (torch.compile(model, fullgraph=True), torch.compile(step, mode="reduce-overhead")):
            for _ in range(5):
                handle.prepare()
                assert torch.allclose(run(x), want, atol=1e-4)


def test_compiled_with_and_without_graphs():
    ranks.run(2, compiled)


def loaded(rank, size, directory):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    if rank == 0:
        safetensors_torch.save_file(ranks.stack().state_dict(), directory / "model.safetensors")
    with sharding.empty_weights():
        model = ranks.stack()
    for layer in model.layers:
        layer.scratch = layer.scratch.cuda()
    sharding.shard(model, **BLOCKS, device="cuda")
    sharding.load(model, directory)
    whole, x = ranks.stack().cuda(), ranks.inputs(rank).cuda()
    with torch.inference_mode():
        assert torch.equal(model(x), whole(x))
        with sharding.of(model).update():
            for layer in model.layers:
                layer.up.weight.data.mul_(2)
        for layer in whole.layers:
            layer.up.weight.data.mul_(2)
        assert torch.equal(model(x), whole(x))
    assert torch.equal(sharding.of(model).detach()(x), whole(x))


def test_loaded_updated_and_detached(tmp_path):
    ranks.run(2, loaded, tmp_path)

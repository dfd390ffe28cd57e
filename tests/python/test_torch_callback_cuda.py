# SPDX-License-Identifier: Apache-2.0
"""The transport "callback" on device memory: gloo with two processes on one NVIDIA GPU, nccl with one rank, and nccl
between two GPUs where there are two.

gloo blocks the host until its bytes are there, so that the order on streams shows with nccl only; the order among the
ranks, the memory and the bits show with both.
"""

import contextlib
import os
import pathlib
import signal
import time

import pytest
from patience import patience

import layershard
import torch_ranks as ranks

torch = ranks.torch
dist = pytest.importorskip("torch.distributed", reason="this torch has no torch.distributed")
sharding = pytest.importorskip("layershard.torch")

# Asking torch would start the driver in this process, after which no forked one can use it.
GPUS = len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
if not GPUS or torch.version.cuda is None:
    pytest.skip("there is no NVIDIA GPU, or torch is built without CUDA", allow_module_level=True)

# nccl gives every rank a GPU of its own: on one GPU its cases are not skipped, they do not exist.
BACKENDS = ["gloo", "nccl"] if GPUS > 1 else ["gloo"]
WIDTH = 512


@contextlib.contextmanager
def world(rank, size, backend, store):
    torch.cuda.set_device(rank % GPUS)
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    yield
    dist.barrier()  # a rank that leaves takes its layers along
    dist.destroy_process_group()


def sharded(rank, size, n_layers=7, modules="layers.*", scope="block", timeout_ms=20000, **options):
    """A model whose foreign weights were wrong before, an input of this rank's own, and what must come out."""
    model, x = ranks.stack(n_layers=n_layers, width=WIDTH).cuda(), ranks.inputs(rank, rows=64).cuda()
    with torch.inference_mode():
        want = model(x).clone()
        ranks.spoil(model, rank, size, ("norm", "up", "down", "scale") if scope == "block" else ("up", "down"))
    buffers = "*" if scope == "block" else ()
    sharding.shard(model, modules, transport="callback", scope=scope, timeout_ms=timeout_ms, buffers=buffers, **options)
    return model, x, want


def slow_pass(model, x, cycles):
    """The device is behind the host all the time: what is overwritten or read too early shows."""
    handles = [layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(cycles)) for layer in model.layers]
    y = model(x)
    for handle in handles:
        handle.remove()
    return y


def bits(rank, size, backend, store, options):
    with world(rank, size, backend, store), torch.inference_mode():
        model, x, want = sharded(rank, size, **options)
        assert "callback" in sharding.of(model).report()
        got = [slow_pass(model, x, cycles) for cycles in (0, 10**6, 3 * 10**6, 0)]
        assert all(torch.equal(y, want) for y in got)
        handle = sharding.of(model)
        handle.verify()
        with handle.update():
            for layer in model.layers:
                layer.up.weight.data.mul_(1)
        assert torch.equal(slow_pass(model, x, 10**6), want)
        assert all(each.fetches for each in handle.stats().values())
        detached = handle.detach()
        assert torch.equal(detached(x), want)


WAYS = {
    "blocks": {},
    "linears": {"modules": ["*.up", "*.down"], "scope": "linear", "prefetch": 2},
    "stripes": {"placement": "striped"},
    "rows": {"placement": "striped", "stripe": {"*.weight": "rows"}},
    "columns": {"placement": "striped", "stripe": {"*.up.weight": "columns", "*.down.weight": "columns"}},
    "residents": {"resident": 0.3},
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_the_same(tmp_path, backend, how):
    ranks.run(2, bits, backend, tmp_path / "store", WAYS[how])


def quiet(rank, size, store):
    with world(rank, size, "nccl", store), torch.inference_mode():
        model, x, want = sharded(rank, size)
        for _ in range(3):
            model(x)
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.set_sync_debug_mode("error")
        got = [slow_pass(model, x, 10**6) for _ in range(3)]
        torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(y, want) for y in got)


def test_no_host_synchronisation_in_a_pass(tmp_path):
    ranks.run(min(GPUS, 2), quiet, tmp_path / "store")


# ---- Ranks that do not keep in step ----


def out_of_step(rank, size, backend, store):
    with world(rank, size, backend, store), torch.inference_mode():
        model, x, want = sharded(rank, size)
        assert torch.equal(model(x), want)
        series = sharding.of(model).shared[0].series
        began = time.monotonic()
        with pytest.raises(layershard.OutOfStep) as failure:
            for step in range(30):
                layer = (2 * step if rank == 1 else step) % 7
                series.reach(layer, torch.cuda.current_stream().cuda_stream)
                series.wait(layer, torch.cuda.current_stream().cuda_stream)
        assert "rank 0 is at position" in str(failure.value) and time.monotonic() - began < patience(15)
        torch.cuda.synchronize()  # nothing hangs on the device
        series.rewind()
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_that_go_different_ways_are_told(tmp_path, backend):
    ranks.run(2, out_of_step, backend, tmp_path / "store")


def late(rank, size, backend, store):
    with world(rank, size, backend, store), torch.inference_mode():
        model, x, want = sharded(rank, size, timeout_ms=patience(3000))
        assert torch.equal(model(x), want)
        text = None
        if rank == 1:
            time.sleep(patience(8))
        else:
            with pytest.raises(layershard.Timeout) as failure:
                model(x), model(x)
            torch.cuda.synchronize()  # nothing that waits for a rank is on the device
            text = str(failure.value)
            assert f"{patience(3000)} ms" in text and "layer" in text and "rank 0" in text
        sharding.of(model).group.abort()
        return text


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_does_not_come_is_a_timeout_and_no_hang(tmp_path, backend):
    text, _ = ranks.run(2, late, backend, tmp_path / "store")
    assert text


def outlive(rank, size, backend, store):
    with world(rank, size, backend, store), torch.inference_mode():
        model, x, want = sharded(rank, size)
        assert torch.equal(model(x), want)
        torch.cuda.synchronize()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises((layershard.PeerFailed, layershard.Timeout, layershard.TransportFailed)):
            for _ in range(4):
                model(x)
        assert time.monotonic() - began < patience(60)
        torch.cuda.synchronize()
        os._exit(0)  # the process group's own threads wait for the rank that has gone


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_rank_is_an_exception(tmp_path, backend):
    assert ranks.run(2, outlive, backend, tmp_path / "store") == [None, None]


# ---- One rank ----


def captured(rank, size, backend, store):
    with world(rank, size, backend, store), torch.inference_mode():
        model, x, want = sharded(rank, size)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with pytest.raises(layershard.NotSupported) as failure, torch.cuda.stream(stream):
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                model(x)
        assert "cannot be captured" in str(failure.value)
        torch.cuda.synchronize()
        assert torch.equal(model(x), want)  # the ranks are in step still


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_capture_is_refused(tmp_path, backend):
    ranks.run(2, captured, backend, tmp_path / "store")


def alone(rank, size, store):
    """What nccl enqueues comes after what its stream has been given, and before what follows; the host goes on."""
    from layershard.torch.distributed import ProcessGroupCollectives

    with world(rank, size, "nccl", store):
        before = torch.cuda.memory_allocated()
        collectives = ProcessGroupCollectives(dist.group.WORLD, torch.device("cuda", 0))
        device, count = collectives.device, 1 << 20
        place, host = device.allocate(2 * count, 4096), torch.arange(64, dtype=torch.uint8)
        event = device.record(None, 0)
        device.wait(device.stream, event)
        with device.current():
            torch.cuda._sleep(10**9)
        device.copy(place, 64, host.data_ptr(), 64, 64, 1)  # from the host: waits
        with device.current():
            torch.cuda._sleep(10**9)
        for work in (collectives.broadcast(place, count, 0), collectives.allgather(place, place + count, count)):
            assert collectives.finish(work, 100)
        done = device.record(None, device.stream)
        assert not device.query(done), "the host waited for the device"
        device.wait(torch.cuda.current_stream().cuda_stream, done)
        seen = device.bytes_at(place + count, 64).clone().cpu()
        assert torch.equal(seen, host) and device.query(done)
        assert not device.capturing(0)
        device.release(place)
        del work  # it holds its tensors
        assert torch.cuda.memory_allocated() <= before + 4096  # what nccl and the test keep
        collectives.stop()
        assert len(dist.distributed_c10d._world.pg_map) == 1, "the group is there still"


def test_nccl_is_enqueued_and_not_waited_for(tmp_path):
    ranks.run(1, alone, tmp_path / "store")


def whole(rank, size, backend, store):
    with world(rank, size, backend, store), torch.inference_mode():
        model, x, want = sharded(rank, size)
        assert torch.equal(model(x), want)
        sharding.of(model).verify()


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_a_group_of_one_rank(tmp_path, backend):
    ranks.run(1, whole, backend, tmp_path / "store")


def lean(rank, size, store):
    """Shares and windows, and nothing more, is on the device; all of it goes with the model."""
    with world(rank, size, "gloo", store), torch.inference_mode():
        torch.nn.functional.linear(*torch.zeros(2, 64, 64, device="cuda"))  # takes the workspace of cuBLAS
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        model, x, want = sharded(rank, size, n_layers=12)
        del want
        stats = list(sharding.of(model).stats().values())
        used = torch.cuda.memory_allocated() - before
        wanted = sum(each.shard_bytes + each.window_bytes for each in stats)
        assert 0 < wanted <= used < wanted + (2 << 20), (used, wanted)
        y = model(x)
        torch.cuda.synchronize()
        del model, y, x
        import gc

        gc.collect()
        assert torch.cuda.memory_allocated() - before < 2 << 20


def test_memory_is_shares_and_windows(tmp_path):
    ranks.run(2, lean, tmp_path / "store")

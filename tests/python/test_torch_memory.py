# SPDX-License-Identifier: Apache-2.0
"""Shards and windows in memory of torch's allocator, in host memory: what is taken, and that it is given back when
nobody shows it, without a garbage collection. On a GPU torch counts it itself: test_torch_memory_cuda.py."""

import contextlib
import gc
import types
import weakref

import pytest

import layershard
import torch_ranks as ranks

torch = ranks.torch
dist = pytest.importorskip("torch.distributed", reason="this torch has no torch.distributed")
sharding = pytest.importorskip("layershard.torch")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

TORCH = {"modules": "layers.*", "scope": "block", "transport": "callback", "memory": "torch"}
PAGE = 4096


@contextlib.contextmanager
def world(rank, size, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    yield
    dist.destroy_process_group()


class Taken:
    """What torch's allocator has given, as long as it is there."""

    def __init__(self, monkeypatch):
        from layershard.torch import torch_memory

        self.blocks = []
        give = torch_memory.zeros_at

        def counted(*arguments):
            block = give(*arguments)
            self.blocks.append(weakref.ref(block))
            return block

        monkeypatch.setattr(torch_memory, "zeros_at", counted)

    @property
    def nbytes(self):
        return sum(block().nbytes for block in self.blocks if block() is not None)


def taken_and_given_back(rank, size, path, options):
    model, x = ranks.stack(), ranks.inputs(rank)
    with torch.inference_mode():
        want = model(x)
    ranks.spoil(model, rank, size, ("norm", "up", "down"))
    with world(rank, size, path), pytest.MonkeyPatch.context() as monkeypatch, torch.inference_mode():
        taken = Taken(monkeypatch)
        sharding.shard(model, **{**TORCH, **options})
        for _ in range(3):
            assert torch.equal(model(x), want)
        (stats,) = sharding.of(model).stats().values()
        said = stats.shard_bytes + stats.window_bytes + stats.resident_bytes
        assert said <= taken.nbytes <= said + PAGE * (3 + stats.residents + stats.windows)
        gc.collect()
        gc.disable()
        sharding.of(model).detach()
        assert taken.nbytes == 0
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("options", [{"placement": "striped"}, {"resident": 0.5}], ids=str)
def test_all_of_it_is_torchs_until_detach(tmp_path, options):
    ranks.run(2, taken_and_given_back, tmp_path / "store", options, LAYERSHARD_POISON="0")


def forgotten(rank, size, path):
    with world(rank, size, path), pytest.MonkeyPatch.context() as monkeypatch:
        taken = Taken(monkeypatch)
        model = sharding.shard(ranks.stack(), **TORCH)
        kept = model.layers[1].up.weight.data
        sharding.of(model).close()
        dist.barrier()
        assert taken.nbytes
        del model
        gc.collect()
        assert taken.nbytes  # somebody looks at it
        del kept
        assert not taken.nbytes


def test_it_lives_as_long_as_anything_shows_it(tmp_path):
    ranks.run(2, forgotten, tmp_path / "store")


def without(rank, size, path):
    """Of what torch cannot give rank 1."""
    from layershard.torch import torch_memory

    model, x = ranks.stack(), ranks.inputs(rank)
    want = model(x)

    def give(*_arguments):
        raise torch.OutOfMemoryError("tried to allocate 7.00 GiB")

    with world(rank, size, path), pytest.MonkeyPatch.context() as monkeypatch:
        if rank == 1:
            monkeypatch.setattr(torch_memory, "zeros_at", give)
        with pytest.raises(layershard.NoMemory, match="rank 1" if rank == 0 else "7.00 GiB") as failed:
            sharding.shard(model, **TORCH)
        assert isinstance(failed.value.__cause__, torch.OutOfMemoryError if rank else type(None))
        assert torch.equal(model(x), want)


def test_torchs_words_are_the_cause_where_it_has_none(tmp_path):
    ranks.run(2, without, tmp_path / "store")


def refused(rank, size):
    model, x = ranks.stack(), ranks.inputs(rank)
    want = model(x)
    with pytest.raises(layershard.NotSupported, match=r"transport shm.*callback"):
        sharding.shard(model, "layers.*", memory="torch")
    with pytest.raises(layershard.Invalid, match="memory"):
        sharding.shard(model, "layers.*", memory="cuda")
    assert torch.equal(model(x), want)


def test_what_shares_files_of_the_librarys_is_refused():
    ranks.run(2, refused)


@pytest.mark.parametrize("transport, is_refused", [("callback (as asked)", False), ("trace=x,fabric (auto)", True)])
def test_ranks_that_only_meet_by_torchs_collectives_are_refused(transport, is_refused):
    """Their group has them as one has whose layers they carry, and whose memory is torch's in any case."""
    from layershard.torch import device, torch_memory

    collectives = types.SimpleNamespace(device=device.TorchDevice(torch.device("cpu")))
    group = types.SimpleNamespace(transport=transport, callbacks=collectives, rank=0)
    refusal = pytest.raises(layershard.NotSupported, match="fabric") if is_refused else contextlib.nullcontext()
    with refusal:
        assert torch_memory.source_for(group, "torch", torch.device("cpu")) is None


def one_alone(rank, size, path):
    with world(rank, size, path), pytest.raises(layershard.Mismatch, match="memory_source"):
        sharding.shard(ranks.stack(), **{**TORCH, "memory": ["torch", "library"][rank]})


def test_all_ranks_or_none(tmp_path):
    ranks.run(2, one_alone, tmp_path / "store")

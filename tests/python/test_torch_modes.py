# SPDX-License-Identifier: Apache-2.0
"""What changes a model's mode after sharding is told when it happens: train(), casting hooks, forked children."""

import atexit
import contextlib
import logging
import os
import traceback

import pytest

import layershard
import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
sharding = pytest.importorskip("layershard.torch")

with contextlib.suppress(ImportError):  # seconds of imports, before ranks are forked
    from diffusers.hooks import apply_layerwise_casting


@pytest.fixture
def alone(monkeypatch):
    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        monkeypatch.delenv(name, raising=False)


def compute(model, x):
    with torch.inference_mode():
        return model(x)


# ---- train() ----


def normed():
    model = ranks.stack()
    for layer in model.layers:
        layer.norm = nn.BatchNorm1d(37)
    return model.eval()


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_statistics_that_are_shared(transport):
    def work(rank, size):
        model, want, x = normed(), normed(), ranks.inputs(rank)
        sharding.shard(model, "layers.*", scope="block", buffers="*.norm.*", transport=transport)
        for module in (model, model.layers, model.layers[1], model.layers[0].norm):
            with pytest.raises(sharding.Guarded, match=r"BatchNorm1d would let it write to layers\.[01]\.norm\."):
                module.train()
            assert not any(each.training for each in model.modules())
        model.head.train()
        model.layers[2].up.train()
        assert model.eval() is model and not model.head.training
        assert torch.equal(compute(model, x), compute(want, x))
        sharding.of(model).detach()
        compute(model.train(), x)
        assert not torch.equal(model.layers[1].norm.running_mean, want.layers[1].norm.running_mean)

    ranks.run(2, work)


def test_statistics_that_each_rank_keeps():
    def work(rank, size):
        model, want, x = normed(), normed(), ranks.inputs(rank)
        sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
        assert torch.equal(compute(model.train(), x), compute(want.train(), x))
        assert torch.equal(model.layers[1].norm.running_mean, want.layers[1].norm.running_mean)

    ranks.run(2, work)


def test_train_mode_is_told_once(alone, caplog):
    caplog.set_level(logging.WARNING, "layershard")
    model = sharding.shard(ranks.stack(), "*.up")
    model.eval()
    assert not caplog.records
    assert model.train() is model and model.layers[0].up.training
    model.train()
    (record,) = caplog.records
    assert "Stack.train()" in record.getMessage() and "detach()" in record.getMessage()
    sharding.of(model).close()
    assert not any("train" in vars(each) for each in model.modules())


# ---- Casting ----


def test_casting_before_sharding(alone):
    pytest.importorskip("diffusers")
    for target, name in ((lambda model: model, "layers.0.up"), (lambda model: model.layers[3].up, "layers.3.up")):
        model = ranks.stack()
        apply_layerwise_casting(target(model), torch.float32, torch.float64)
        with pytest.raises(sharding.Refused, match=rf"{name} has diffusers' hook 'layerwise_casting', .*{name}.weight"):
            sharding.shard(model, "*.up")
        sharding.shard(ranks.stack(), "*.up")


def test_casting_beside_what_is_shared():
    pytest.importorskip("diffusers")

    def work(rank, size):
        model, want, x = ranks.stack(), ranks.stack(), ranks.inputs(rank)
        for each in (model, want):
            apply_layerwise_casting(each, torch.bfloat16, torch.float32, skip_modules_pattern=("up",))
        sharding.shard(model, "*.up", transport="shm:copy")
        for _ in range(2):
            assert torch.equal(compute(model, x), compute(want, x))

    ranks.run(2, work)


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_casting_after_sharding(transport):
    def work(rank, size):
        model, want, x = ranks.stack(), ranks.stack(), ranks.inputs(rank)
        sharding.shard(model, "*.up", transport=transport)
        if "apply_layerwise_casting" in globals():
            with pytest.raises(sharding.Guarded, match="float32 on cpu to torch.bfloat16.*layerwise casting"):
                apply_layerwise_casting(model.layers[1].up, torch.bfloat16, torch.float32)
        hook = model.layers[2].up.register_forward_pre_hook(lambda module, _args: module.to(torch.bfloat16) and None)
        with pytest.raises(sharding.Guarded, match="layerwise casting"):
            compute(model, x)
        hook.remove()
        assert torch.equal(compute(model, x), compute(want, x))

    ranks.run(2, work)


# ---- Forked children ----


def child(function):
    """What a forked child's function raises, in words; the child ends as a program does."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, function().encode())
            atexit._run_exitfuncs()
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return text


@pytest.mark.parametrize("transport", ["shm", "shm:copy", "callback"])
def test_forked_children(transport, tmp_path):
    def work(rank, size):
        if transport == "callback":
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=size
            )
        x, want = ranks.inputs(rank), compute(ranks.stack(), ranks.inputs(rank))
        model = sharding.shard(ranks.stack(), "*.up", transport=transport)
        compute(model, x)

        def run():
            if transport == "shm":
                return str(torch.equal(compute(model, x), want))
            with pytest.raises(layershard.WrongState) as caught:
                compute(model, x)
            return str(caught.value)

        def close():
            sharding.of(model).close()
            with pytest.raises(sharding.Guarded, match="given up"):
                compute(model, x)
            return "closed"

        told = child(run)
        assert told == "True" if transport == "shm" else "this process is a child by fork" in told, told
        assert child(close) == "closed"
        assert child(lambda: "nothing") == "nothing"
        assert torch.equal(compute(model, x), want)
        with sharding.of(model).update():
            model.layers[rank].up.weight.data.mul_(2)
        assert not torch.equal(compute(model, x), want)
        sharding.of(model).close()  # the other may be in its last pass

    ranks.run(2, work)

# SPDX-License-Identifier: Apache-2.0
"""What torch's wrappers do round a sharded model: they leave shared weights alone, or say that they cannot."""

import os

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: E402
from torch.distributed.tensor import distribute_module  # noqa: E402
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402

pytest.importorskip("torch._dynamo")  # what wrappers import is imported once, before ranks are forked
accelerate = pytest.importorskip("accelerate")

HOST = torch.device("cpu")
TRANSPORTS = pytest.mark.parametrize("transport", ["shm", "shm:copy"])
LINEARS = {"modules": "*.up"}
BLOCKS = {"modules": "*layers.*", "scope": "block", "buffers": "*.scale"}


def meet(rank, size, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


def compute(model, rank):
    with torch.no_grad():
        return model(ranks.inputs(rank))


def shared_ones(model):
    return {place.name: place.tensor for place in sharding.of(model).all_places()}


# ---- Those that leave out what is shared ----


def data_parallel(model):
    return DistributedDataParallel(model)


def data_parallel_above(model):
    return DistributedDataParallel(nn.Sequential(model))


def cut_up(model):
    return fully_shard(model)


def cut_up_above(model):
    return fully_shard(nn.Sequential(model))


def flat(model):
    return FullyShardedDataParallel(model, device_id=HOST)


def flat_above(model):
    return FullyShardedDataParallel(nn.Sequential(model), device_id=HOST, use_orig_params=True)


def prepared(model):
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # asked for; the ranks have met already
    wrapped = accelerate.Accelerator().prepare(model)
    assert isinstance(wrapped, DistributedDataParallel)
    return wrapped


LEAVING_OUT = [data_parallel, data_parallel_above, cut_up, cut_up_above, flat, flat_above, prepared]


def wrap_and_run(rank, transport, how, wrap):
    want = ranks.stack()
    model = sharding.shard(ranks.stack(), **how, transport=transport)
    before = shared_ones(model)
    if rank == 1 and "parallel" in wrap.__name__:
        model.head.weight.data.zero_()  # not shared: it is sent by rank 0, as ever
    wrapped = wrap(model)
    for _ in range(2):
        torch.testing.assert_close(compute(wrapped, rank), compute(want, rank))
    assert all(tensor is before[name] for name, tensor in shared_ones(model).items())
    sharding.of(model).verify()


@TRANSPORTS
def test_what_is_shared_is_left_out(transport, tmp_path):
    def work(rank, size):
        meet(rank, size, tmp_path / "store")
        for wrap in LEAVING_OUT:
            for how in (LINEARS, BLOCKS):
                wrap_and_run(rank, transport, how, wrap)

    ranks.run(2, work)


def train(rank, size, transport, wrap):
    want = ranks.stack()
    sum(want(ranks.inputs(each)).square().sum() for each in range(size)).div(size).backward()
    model = sharding.shard(ranks.stack().requires_grad_(False), "*.up", transport=transport)
    model.head.requires_grad_(True)
    wrapped = wrap(model)
    wrapped(ranks.inputs(rank)).square().sum().backward()
    grad = model.head.weight.grad
    torch.testing.assert_close(grad.full_tensor() if hasattr(grad, "full_tensor") else grad, want.head.weight.grad)
    sharding.of(model).verify()


@TRANSPORTS
def test_what_is_not_shared_is_trained(transport, tmp_path):
    def work(rank, size):
        meet(rank, size, tmp_path / "store")
        train(rank, size, transport, data_parallel)
        train(rank, size, transport, cut_up)

    ranks.run(2, work)


def test_what_is_to_be_trained_below_shared_tensors_is_not_left_out(tmp_path):
    """A block that holds a shared tensor itself, and gets adapters."""

    def work(rank, size):
        meet(rank, size, tmp_path / "store")
        model = ranks.stack().requires_grad_(False)
        sharding.shard(model, **BLOCKS, transport="shm")
        model.layers[1].adapter = nn.Linear(3, 3)
        fully_shard(model)
        assert type(model.layers[1].adapter.weight).__name__ == type(model.head.weight).__name__ == "DTensor"
        assert type(model.layers[0].up.weight) is nn.Parameter

    ranks.run(2, work)


def shard_what_is_parallel(rank, transport, inside):
    """It sends buffers in each pass."""
    wrapped, want = DistributedDataParallel(ranks.stack()), ranks.stack()
    model = sharding.shard(wrapped.module if inside else wrapped, **BLOCKS, transport=transport)
    for _ in range(3):
        torch.testing.assert_close(compute(wrapped, rank), compute(want, rank))
    sharding.of(model).verify()


@TRANSPORTS
def test_data_parallel_that_was_there_before(transport, tmp_path):
    def work(rank, size):
        meet(rank, size, tmp_path / "store")
        for inside in (False, True):
            shard_what_is_parallel(rank, transport, inside)

    ranks.run(2, work)


# ---- Those that cannot ----


def tensor_parallel(model):
    parallelize_module(model, dist.init_device_mesh("cpu", (2,)), {"layers.0.up": RowwiseParallel()})


def distributed(model):
    distribute_module(model.layers[0], dist.init_device_mesh("cpu", (2,)))


def cut_up_itself(model):
    fully_shard(model.layers[0].up)


def to_many_devices(model):
    model.layers[0]._replicate_for_data_parallel()  # what DataParallel calls where there are several


@TRANSPORTS
def test_what_cannot_leave_it_out_is_refused(transport, tmp_path):
    def work(rank, size):
        meet(rank, size, tmp_path / "store")
        want = ranks.stack()
        for wrap in (tensor_parallel, distributed, cut_up_itself, to_many_devices):
            model = sharding.shard(ranks.stack(), "*.up", transport=transport)
            for _ in range(2):
                with pytest.raises(sharding.Guarded, match=r"(shared by layershard|layershard shares).*detach\(\)"):
                    wrap(model)
                assert torch.equal(compute(model, rank), compute(want, rank))
            sharding.of(model).verify()
            wrap(sharding.of(model).detach())

    ranks.run(2, work)


@pytest.mark.parametrize("whole", [False, True])
def test_weights_that_are_cut_up_already_are_refused(whole, tmp_path):
    def work(rank, size, store):
        meet(rank, size, store)
        model = ranks.stack()
        if whole:
            model = FullyShardedDataParallel(model, device_id=HOST, use_orig_params=True)
        else:
            fully_shard(model.layers[1])
        with pytest.raises(sharding.Refused, match="up.weight is (part of a FullySharded|a DTensor)"):
            sharding.shard(model, "*.up", transport="shm")

    ranks.run(2, work, tmp_path / "store")


def test_no_mark_is_left_on_the_modules():
    model = ranks.stack()
    before = [set(vars(module)) for module in model.modules()]
    sharding.shard(model, "*.up")
    sharding.of(model).state_dict()
    sharding.of(model).detach()
    # A compiled program goes on asking whether passes are refused.
    assert [set(vars(module)) - {"_layershard_gate"} for module in model.modules()] == before


def test_activation_checkpoints_are_kept():
    checkpoint = pytest.importorskip("torch.distributed._composable").checkpoint
    model = sharding.shard(ranks.stack(), "*.up")
    checkpoint(model.layers[0].up)
    sharding.of(model).state_dict()
    model(ranks.inputs(0)).sum().backward()
    sharding.of(model).detach()
    model(ranks.inputs(0)).sum().backward()


# ---- What is put before a weight ----


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


BEFORE_A_WEIGHT = {
    "parametrization": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "weight norm": parametrizations.weight_norm,
    "older weight norm": nn.utils.weight_norm,
    "older spectral norm": nn.utils.spectral_norm,
    "pruning": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    "pruning for good": lambda module: prune.remove(prune.l1_unstructured(module, "weight", amount=0.5), "weight"),
}


def test_what_is_put_before_a_weight_is_named_in_the_next_pass():
    def work(rank, size):
        for put in BEFORE_A_WEIGHT.values():
            model = sharding.shard(ranks.stack(), "layers.*", scope="block", transport="shm:copy")
            compute(model, rank)
            put(model.layers[1].down)  # one of many tensors
            for _ in range(2):
                with pytest.raises(sharding.Guarded, match=r"layers\.1\.down\.weight is no longer"):
                    compute(model, rank)
            sharding.of(model).verify()

    ranks.run(2, work)


def test_what_is_put_before_a_weight_that_lies_in_place_is_right():
    def work(rank, size):
        for put in BEFORE_A_WEIGHT.values():
            model, want = sharding.shard(ranks.stack(), "layers.*", scope="block", transport="shm"), ranks.stack()
            for each in (model, want):
                torch.manual_seed(1)
                put(each.layers[1].down)
            assert torch.equal(compute(model, rank), compute(want, rank))
            sharding.of(model).verify()

    ranks.run(2, work)


@TRANSPORTS
def test_what_was_put_before_a_weight_first_is_right(transport):
    def work(rank, size):
        model, want = ranks.stack(), ranks.stack()
        for each in (model, want):
            for layer in each.layers:
                parametrize.register_parametrization(layer.up, "weight", Doubled())
        sharding.shard(model, "*.up", transport=transport)
        for _ in range(2):
            assert torch.equal(compute(model, rank), compute(want, rank))

    ranks.run(2, work)

# SPDX-License-Identifier: Apache-2.0
"""Which ranks share: each row of docs/python.md's table, and what is said where it and the environment disagree."""

import logging
import os
import re

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
layershard = pytest.importorskip("layershard")

VARIABLES = (
    *("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_ID"),
)


@pytest.fixture(autouse=True)
def _levels(caplog):
    caplog.set_level(logging.WARNING, "layershard")


def environment(**variables):
    """Only these."""
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in variables.items()})


def ours(rank, size, job):
    return {"LAYERSHARD_RANK": rank, "LAYERSHARD_SIZE": size, "LAYERSHARD_JOB": job}


def torchrun(rank, size, job):
    there = {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    return {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": job, **there}


def slurm(rank, size, job):
    return {"SLURM_PROCID": rank, "SLURM_NTASKS": size, "SLURM_JOB_ID": job, "SLURM_STEP_ID": 0}


def half(rank, size, job):
    return {"LAYERSHARD_RANK": rank}


def only_job(rank, size, job):
    return {"LAYERSHARD_JOB": job}


def nothing(rank, size, job):
    return {}


def others(rank, size, job):
    """Another rank of more than there are."""
    return ours(rank + 1, size + 2, f"{job}-other")


def world(path, rank, size):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    return dist.group.WORLD


def each_alone(path, rank, size):
    return world(f"{path}{rank}", 0, 1)


def no_world(path, rank, size):
    return None


def default(rank, size, job, pg):
    return None


def its_world(rank, size, job, pg):
    return pg


def own_group(rank, size, job, pg):
    return layershard.Group(rank, size, job=f"{job}-own", transport="shm:copy")


def whole_dict(rank, size, job, pg):
    return {"rank": rank, "size": size, "job": f"{job}-dict"}


def dict_of_job(rank, size, job, pg):
    return {"job": f"{job}-dict"}


def empty_dict(rank, size, job, pg):
    return {}


# By torch.distributed: what is given, the environment, how many share, and the words of the warning.
ROWS = {
    world: [
        (own_group, others, 2, r"LAYERSHARD_\* in the environment says rank 1 of 4"),
        (whole_dict, others, 2, r"-dict' is given, which counts, and LAYERSHARD_JOB="),
        (its_world, nothing, 2, ""),
        (its_world, others, 2, r"LAYERSHARD_\* in the environment says rank 1 of 4"),
        (its_world, half, 2, r"the environment was not asked.* incomplete"),
        (default, ours, 2, ""),
        (default, others, 2, r"LAYERSHARD_\* in the environment says rank 1 of 4"),
    ],
    each_alone: [
        (own_group, torchrun, 2, ""),
        (whole_dict, nothing, 2, ""),
        (empty_dict, slurm, 2, ""),
        (its_world, torchrun, 1, "shares with nobody.* torchrun in the environment says rank 0 of 2"),
        (default, nothing, 1, ""),
        (default, ours, 2, ""),
        (default, torchrun, 2, ""),
        (default, slurm, 1, "shares with nobody.* Slurm in the environment says rank 0 of 2"),
    ],
    no_world: [
        (own_group, nothing, 2, ""),
        (whole_dict, nothing, 2, ""),
        (dict_of_job, torchrun, 2, ""),
        (default, ours, 2, ""),
        (default, torchrun, 2, ""),
        (default, slurm, 1, "shares with nobody.* Slurm in the environment says rank 0 of 2"),
        (default, only_job, 1, "LAYERSHARD_JOB=.* nothing says which rank"),
        (default, nothing, 1, ""),
    ],
}


def share(rank, size, init, path, caplog):
    pg, job = init(path, rank, size), os.environ["LAYERSHARD_JOB"]
    for number, (given, variables, want, words) in enumerate(ROWS[init]):
        environment(**variables(rank, size, f"{job}-{number}"))
        group = given(rank, size, f"{job}-{number}", pg)
        caplog.clear()
        transport = "auto" if isinstance(group, layershard.Group) else "shm:copy"
        model = sharding.shard(ranks.stack(), "layers.*", group, prefetch=0, scope="block", transport=transport)
        row = f"{given.__name__}, {variables.__name__}: {caplog.text}"
        assert sharding.of(model).group.size == want, row
        assert rank > 0 or (re.search(words, caplog.text) and bool(caplog.text) == bool(words)), row
        with torch.inference_mode():
            assert torch.equal(model(ranks.inputs(rank)), ranks.stack()(ranks.inputs(rank))), row


@pytest.mark.parametrize("init", ROWS, ids=lambda init: init.__name__)
def test_which_ranks_share(init, tmp_path, caplog):
    ranks.run(2, share, init, tmp_path / "store", caplog)


# ---- A group of the caller's ----


def several_models(rank, size):
    with layershard.Group(transport="shm:copy") as group:
        one = sharding.shard(ranks.stack(), "layers.*", group, scope="block")
        two = sharding.shard(ranks.stack(seed=2), "layers.*.up", group)
        x = ranks.inputs(rank)
        with torch.inference_mode():
            assert torch.equal(two(one(x) @ torch.ones(3, 8)), ranks.stack(seed=2)(ranks.stack()(x) @ torch.ones(3, 8)))
            assert sharding.of(one).group is group is sharding.of(two).group
            sharding.of(one).detach()
            assert torch.equal(two(x), ranks.stack(seed=2)(x)) and torch.equal(one(x), ranks.stack()(x))
        sharding.of(two).close()
        assert not group.closed and group.open_series == ()
        again = sharding.shard(ranks.stack(), "layers.*", group)
        with torch.inference_mode():
            assert torch.equal(again(x), ranks.stack()(x))
    assert group.closed


def test_a_group_of_the_callers_serves_several_models_and_stays_open():
    ranks.run(2, several_models)


def one_refuses(rank, size):
    group, model = layershard.Group(transport="shm:copy"), ranks.stack()
    if rank == 1:
        model.layers[2].up.weight.grad = torch.zeros_like(model.layers[2].up.weight)
    with pytest.raises(sharding.Refused if rank == 1 else layershard.Mismatch, match="gradient"):
        sharding.shard(model, "layers.*", group)
    assert group.open_series == ()
    if rank == 0:
        assert torch.equal(model(ranks.inputs(0)), ranks.stack()(ranks.inputs(0)))
    model = sharding.shard(ranks.stack(), "layers.*", group)
    with torch.inference_mode():
        assert torch.equal(model(ranks.inputs(rank)), ranks.stack()(ranks.inputs(rank)))


def test_a_refusal_is_told_to_a_group_of_the_callers_which_goes_on():
    ranks.run(2, one_refuses)


def one_cannot_read(rank, size):
    """The weights of the second of three series cannot be copied on one rank."""
    group, model = layershard.Group(transport="shm:copy"), ranks.stack()
    if rank == 1:
        model.layers[1].up.weight.data = model.layers[1].up.weight.data[:0]
        model.layers[1].up._parameters["weight"] = Unreadable(ranks.stack().layers[1].up.weight)
    with pytest.raises((RuntimeError, layershard.CallbackFailed)):
        sharding.shard(model, "layers.*", group)
    assert group.open_series == ()
    works = sharding.shard(ranks.stack(), "layers.*", group)
    with torch.inference_mode():
        assert torch.equal(works(ranks.inputs(rank)), ranks.stack()(ranks.inputs(rank)))


class Unreadable(torch.nn.Parameter):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            raise RuntimeError("not to be read")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_what_fails_leaves_nothing_open_in_a_group_of_the_callers():
    ranks.run(2, one_cannot_read)


# ---- What makes no sense ----


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"rank": 1, "size": 2}, "no name by which"),
        ({"rank": 2, "size": 2, "job": "x"}, "rank 2 of size 2"),
        ({"rank": 1, "job": "x"}, "give both"),
        ({"job": "x"}, "no launcher says"),
        ({"ranks": 2}, "'ranks'"),
        ({"rank": 0, "size": 1, "job": 7}, "job is 7"),
        ({"rank": "one", "size": 2, "job": "x"}, "whole number"),
        (torch.distributed.GroupMember.NON_GROUP_MEMBER, "not in the process group"),
        ("x", "DeviceMesh's dimension"),
    ],
)
def test_what_makes_no_sense_is_refused(group, words, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=words):
        sharding.shard(ranks.stack(), "layers.*", group)


@pytest.mark.parametrize("option", [{"transport": "shm"}, {"timeout_ms": 5000}])
def test_what_a_group_has_already_is_not_given_twice(option):
    with layershard.Group(0, 1) as group, pytest.raises(sharding.Refused, match=next(iter(option))):
        sharding.shard(ranks.stack(), "layers.*", group, **option)


def test_a_closed_group_is_refused():
    group = layershard.Group(0, 1)
    group.close()
    with pytest.raises(sharding.Refused, match="closed"):
        sharding.shard(ranks.stack(), "layers.*", group)


def test_half_a_rank_in_the_environment_is_refused(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LAYERSHARD_RANK", "0")
    with pytest.raises(layershard.Mismatch, match="LAYERSHARD_SIZE is not"):
        sharding.shard(ranks.stack(), "layers.*")


def sum_over_others(rank, size, path):
    each_alone(path, rank, size)
    cuts = {"*.up.*": "rows", "*.down.*": "columns"}
    model = sharding.shard(ranks.stack(), ["*.up", "*.down"], placement="striped", stripe=cuts)
    assert sharding.of(model).group.size == 2
    with pytest.raises(sharding.Refused, match="rank 0 of 1 in the process group that would sum"):
        sharding.dual(model)


def test_dual_does_not_sum_over_other_ranks(tmp_path):
    ranks.run(2, sum_over_others, tmp_path / "store")

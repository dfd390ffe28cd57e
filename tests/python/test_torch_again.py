# SPDX-License-Identifier: Apache-2.0
"""A second shard of one model, for other modules and with other options: one handle, passes that are right, and a call
that fails leaves the first one's as they were."""

import pytest
from patience import LONG_MS

import layershard
import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

UP = {"modules": "*.up", "transport": "shm:copy"}
DOWN = {"modules": "*.down", "transport": "shm:copy", "prefetch": 2, "scope": "block"}


def twice(model, *more):
    for options in (UP, DOWN, *more):
        sharding.shard(model, **options)
    return model


def alike(model, rank, want=None, run=None):
    want, x, run = want or ranks.stack(), ranks.inputs(rank), model if run is None else run
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(run(x), want(x))


def compute_alike(rank, size, more):
    model = ranks.stack()
    ranks.spoil(model, rank, size, ("up", "down"))
    alike(twice(model, *more), rank)
    return list(sharding.of(model).stats())


@pytest.mark.parametrize("more", [[], [{"modules": "*.norm", "transport": "shm", "placement": "striped"}]], ids=len)
def test_the_bits_are_the_same(more):
    names = ["layers.*.up", "layers.*", "layers.*.norm"][: 2 + len(more)]
    assert ranks.run(2, compute_alike, more) == [names] * 2


def test_layers_of_one_pattern_in_two_calls_have_names_of_their_own():
    def work(rank, size):
        model = ranks.stack(n_layers=12)
        for modules in ("layers.[0-5].up", "layers.[6-9].up", "layers.1[01].up"):
            sharding.shard(model, modules, transport="shm:copy")
        alike(model, rank, ranks.stack(n_layers=12))
        return list(sharding.of(model).stats())

    assert ranks.run(2, work) == [["layers.*.up", "layers.*.up #2", "layers.*.up #3"]] * 2


def covers_everything(rank, size):
    model, new = twice(ranks.stack()), ranks.stack(seed=2)
    handle, x = sharding.of(model), ranks.inputs(rank)
    assert handle.report().count("transport shm:copy") == 2  # a table for each call
    with handle.update():
        model.load_state_dict(new.state_dict())
    alike(model, rank, new)
    assert set(handle.verify()) == {"layers.*.up", "layers.*"}
    with torch.inference_mode():
        assert sharding.check(model, x).is_equal
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in handle.state_dict().items())
    with pytest.raises(sharding.Guarded):
        model.half()
    whole = handle.detach().state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in new.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(sharding.Refused, match="has not been sharded"):
        sharding.of(model)
    alike(twice(model), rank, new)


def test_the_handle_is_of_all_calls():
    ranks.run(2, covers_everything)


def fills_empty(rank, size):
    with sharding.empty_weights():
        model = twice(ranks.stack())
    with pytest.raises(sharding.Guarded, match="not been loaded"):
        model(ranks.inputs(rank))
    weights = ranks.stack().state_dict()
    sharding.fill(model, lambda name, like: weights[name])
    alike(model, rank)


def test_a_model_without_weights_is_filled_once_for_all_calls():
    ranks.run(2, fills_empty)


def compiles_again(rank, size):
    model = sharding.shard(ranks.stack(), **UP)
    run = torch.compile(model, backend="eager", fullgraph=True)
    alike(model, rank, run=run)
    sharding.shard(model, **DOWN)
    alike(model, rank, run=run)


def test_what_was_compiled_between_the_calls_is_compiled_anew():
    torch.compile(torch.nn.ReLU(), backend="eager")(torch.ones(1))  # what that imports is there when ranks are forked
    ranks.run(2, compiles_again)


def fails_the_second_time(rank, size):
    model, x = sharding.shard(ranks.stack(), **UP), ranks.inputs(rank)
    cut = {"stripe": {"*": "rows"}, "placement": ("whole", "striped")[rank]}
    with pytest.raises(layershard.Error):
        sharding.shard(model, "*.down", transport="shm:copy", timeout_ms=LONG_MS, **cut)
    alike(model, rank)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(sharding.layout.Layout, "view", lambda *_: 1 / 0)
        with pytest.raises(Exception, match="rank 1|division"):
            sharding.shard(model, **{**DOWN, "timeout_ms": LONG_MS})
    handle = sharding.of(model)
    assert list(handle.stats()) == ["layers.*.up"]
    assert model.layers[0].down.weight.requires_grad
    alike(model, rank)
    with pytest.raises(sharding.Refused, match="gradient is wanted"):
        model(x)
    sharding.shard(model, **DOWN)
    alike(model, rank)


def test_a_second_call_that_fails_leaves_the_first_one_s_as_they_were():
    ranks.run(2, fails_the_second_time)


def test_a_second_call_that_fails_does_not_open_a_model_without_weights(monkeypatch):
    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        monkeypatch.delenv(name, raising=False)
    with sharding.empty_weights():
        model = sharding.shard(ranks.stack(), "*.up")
    take = sharding.handle.Handle.take
    monkeypatch.setattr(sharding.handle.Handle, "take", lambda handle: _once(handle, take))
    with pytest.raises(ZeroDivisionError):
        sharding.shard(model, "*.down")
    with pytest.raises(sharding.Guarded, match="not been loaded"):
        model(ranks.inputs(0))


def _once(handle, take, failed=[]):  # noqa: B006
    take(handle)
    if not failed:
        failed.append(handle)
        raise ZeroDivisionError


def test_while_an_update_is_under_way_no_more_is_shared(monkeypatch):
    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        monkeypatch.delenv(name, raising=False)
    model = sharding.shard(ranks.stack(), "*.up")
    with sharding.of(model).update():
        with pytest.raises(sharding.Refused, match="update of the shared weights is under way"):
            sharding.shard(model, "*.down")
    sharding.shard(model, "*.down")


def shares_in_one_group(rank, size):
    with layershard.Group(transport="shm:copy") as group:
        model = ranks.stack()
        for modules in ("*.up", "*.down"):
            sharding.shard(model, modules, group)
        alike(model, rank)
        handle = sharding.of(model)
        assert handle.report().count("transport shm:copy") == 1
        handle.close()
        assert group.size == 2  # still open


def test_both_calls_may_be_in_a_group_of_the_caller_s():
    ranks.run(2, shares_in_one_group)

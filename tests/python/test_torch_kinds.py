# SPDX-License-Identifier: Apache-2.0
"""Layers of one pattern that differ: a series for each kind, sources that are balanced over all of them, and kinds that
would save nothing, which stay on every rank."""

import logging

import pytest

import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
sharding = pytest.importorskip("layershard.torch")

from layershard.torch.grouping import SeriesPlan  # noqa: E402
from layershard.torch.layout import Layout  # noqa: E402
from layershard.torch.spreading import Spreading  # noqa: E402

WIDTH = 37
MIXED = "dmmmdmmmdmmmdmmmdmmm"  # 5 and 15
SEVERAL = "dmmdmdmdmmd"  # 5 and 6, each worth sharing
FIRST = "ddmmmmmmm"  # 2, which save nothing on two ranks, and 7


class Mixed(nn.Module):
    """Blocks of two kinds: as they come in what mixes attention and state spaces, dense layers and experts."""

    def __init__(self, kinds):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(ranks.Block(WIDTH) for _ in kinds)
        for kind, layer in zip(kinds, self.layers):
            if kind == "m":
                layer.up, layer.down = nn.Linear(WIDTH, 11), nn.Linear(11, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 3)

    forward = ranks.Stack.forward


def mixed(kinds):
    torch.manual_seed(1)
    return Mixed(kinds).eval()


def sharded(kinds, modules="layers.*", **options):
    options = {"scope": "block", "transport": "shm:copy", **options}
    return sharding.shard(mixed(kinds), modules, **options)


def spoiled(kinds, modules, **options):
    """One of which a rank has nothing right but what it is source of, and what is not shared."""
    handle = sharding.of(sharded(kinds, modules, **options))
    own = {place.name for place in handle.own_places()}
    others = {place.name for place in handle.all_places()} - own
    handle.close()
    assert own and others
    model = mixed(kinds)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in others:
                parameter.fill_(float("nan"))
    return sharding.shard(model, modules, **{"scope": "block", "transport": "shm:copy", **options})


def compile_whole(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def compile_blocks(model):
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    return model


def compute_alike(rank, size, kinds, modules, options, prepare=lambda model: model):
    want, model, x = mixed(kinds), spoiled(kinds, modules, **options), ranks.inputs(rank, rows=2 + rank)
    run = prepare(model)
    with torch.inference_mode():
        expected = want(x)
        for _ in range(2 + rank):  # ranks need not be in step
            assert torch.equal(run(x), expected)
        model.layers[3](want.embed(x))  # by itself, out of order
        assert torch.equal(run(x), expected)
    return {name: each.windows for name, each in sharding.of(model).stats().items()}


def test_each_kind_has_a_ring_of_its_own():
    for found in ranks.run(2, compute_alike, MIXED, "layers.*", {}):
        assert found == {"layers.* #1": 2, "layers.* #2": 2}


@pytest.mark.parametrize("options", [{"transport": "shm"}, {"placement": "striped"}], ids=str)
def test_the_same_bits_however_layers_are_kept(options):
    ranks.run(3, compute_alike, MIXED, "layers.*", options)


def test_linears_that_differ_are_series_of_their_own():
    for found in ranks.run(2, compute_alike, MIXED, ["*.up", "*.down"], {"scope": "linear"}):
        assert list(found) == ["layers.*.up #1", "layers.*.up #2", "layers.*.down #1", "layers.*.down #2"]


@pytest.mark.parametrize("prepare", [compile_whole, compile_blocks])
def test_compiled_the_bits_are_the_same(prepare):
    prepare(mixed("dm"))(ranks.inputs(0))  # what that imports is there when ranks are forked
    for found in ranks.run(2, compute_alike, SEVERAL, "layers.*", {}, prepare):
        assert len(found) == 2


def what_is_held(rank, size, kinds):
    """Bytes of shards and of windows, of all layers if replicated, of the largest layer."""
    handle = sharding.of(sharded(kinds))
    stats = {each.plan.name: (each.series.stats(), len(each.plan.places)) for each in handle.shared}.values()
    return (
        sum(each.shard_bytes for each, _ in stats),
        sum(each.layer_bytes * each.windows for each, _ in stats),
        sum(each.layer_bytes * n_layers for each, n_layers in stats),
        max(each.layer_bytes for each, _ in stats),
    )


@pytest.mark.parametrize("kinds, size", [(MIXED, 3), ("m" * 7 + "d" * 7 + "m" * 2, 2)])
def test_ranks_hold_less_than_all_and_alike_to_one_layer(kinds, size):
    found = ranks.run(size, what_is_held, kinds)
    shards = [shard for shard, *_ in found]
    assert max(shards) - min(shards) <= max(largest for *_, largest in found)
    for shard, windows, whole, _ in found:
        assert shard + windows < whole
    assert sum(shards) == found[0][2]  # each layer once


def lines_of(build):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("layershard").addHandler(handler)
    try:
        return build(), lines
    finally:
        logging.getLogger("layershard").removeHandler(handler)


def leaves_the_first_alone(rank, size):
    model, lines = lines_of(lambda: sharded(FIRST))
    handle, x = sharding.of(model), ranks.inputs(rank)
    assert list(handle.stats()) == ["layers.* #2"]
    (line,) = (line for line in lines if "stay replicated" in line)
    assert "layers.* #1 (layers 0-1" in line
    assert model.layers[0].up.weight.requires_grad and not model.layers[2].up.weight.requires_grad
    with torch.inference_mode():
        assert torch.equal(model(x), mixed(FIRST)(x))
    assert handle.state_dict().keys() == mixed(FIRST).state_dict().keys()


def test_a_kind_that_would_save_nothing_stays_replicated_and_is_named():
    ranks.run(2, leaves_the_first_alone)


def test_where_nothing_moves_every_kind_is_shared():
    def work(rank, size):
        return list(sharding.of(sharded(FIRST, transport="shm")).stats())

    assert ranks.run(2, work) == [["layers.* #1", "layers.* #2"]] * 2


def test_kinds_are_shared_all_the_same_where_none_would_save_anything():
    for found in ranks.run(2, compute_alike, "dmmd", "layers.*", {}):
        assert len(found) == 2


def updates_and_checks(rank, size):
    model, new, x = sharded(SEVERAL), mixed(SEVERAL), ranks.inputs(rank)
    assert len(sharding.of(model).stats()) == 2
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(0.5)
    with sharding.of(model).update():
        model.load_state_dict(new.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(x), new(x))
        assert sharding.check(model, x).is_equal
    sharding.of(model).verify()
    whole = sharding.of(model).detach().state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in new.state_dict().items())


def test_kinds_are_updated_checked_and_detached_together():
    ranks.run(2, updates_and_checks)


# ---- Where each begins ----


def plans_of(*described):
    """Plans by the number of layers and their bytes, parts of one pattern."""
    plans, number = [], 0
    for n_layers, nbytes in described:
        tensors = {"weight": Layout((nbytes,), (1,), torch.uint8)}
        numbers = list(range(number, number + n_layers))
        plans.append(SeriesPlan(f"layers.* #{number}", "layers.*", numbers, tensors, [[]] * n_layers, is_part=True))
        number += n_layers
    return plans


def loads(plans, size):
    found = [0] * size
    for plan in plans:
        for layer, _ in plan.layers():
            found[layer % size] += plan.layer_bytes
    return found


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize(
    "described",
    [[(3, 100), (58, 700)], [(7, 100), (7, 90), (7, 110), (9, 1)], [(9, 50), (17, 1000), (11, 400)]],
    ids=str,
)
def test_sources_are_balanced_over_all_kinds(size, described):
    plans = plans_of(*described)
    Spreading(size, 1, "whole", False, False).place(plans)
    found = loads(plans, size)
    assert max(found) - min(found) <= max(nbytes for _, nbytes in described)


def test_the_second_kind_goes_on_where_the_first_ended():
    """So that its numbers are the model's own, and the library's texts name the layers as the model does."""
    plans = plans_of((3, 100), (58, 100))
    Spreading(4, 1, "auto", False, False).place(plans)
    assert [plan.first_layer for plan in plans] == [0, 3]

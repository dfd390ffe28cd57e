# SPDX-License-Identifier: Apache-2.0
"""A sharded model that a program drops, without close or detach: nothing of it stays."""

import gc
import pathlib
import weakref

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

WAYS = {
    "in place": {"modules": "layers.*", "scope": "block", "buffers": "*"},
    "windows": {"modules": "layers.*", "scope": "block", "buffers": "*", "transport": "shm:copy"},
    "linears": {"modules": ["*.up", "*.down"], "scope": "linear", "transport": "shm:copy"},
    "stripes": {"modules": "layers.*", "scope": "block", "buffers": "*", "placement": "striped"},
    "callbacks": {"modules": "layers.*", "scope": "block", "buffers": "*", "transport": "callback"},
}


def shared_mappings():
    maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
    return sum("layershard:" in line for line in maps)


def use(model, rank):
    """What can leave something behind: passes, an update, a verification, texts."""
    handle = sharding.of(model)
    y = model(ranks.inputs(rank))
    with handle.update():
        for layer in model.layers:
            layer.up.weight.data.mul_(1)
    assert torch.equal(model(ranks.inputs(rank)), y)
    handle.verify()
    handle.report()
    return weakref.ref(model), weakref.ref(handle), *map(weakref.ref, model.layers)


def drop(rank, size, options, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    before = shared_mappings()
    with torch.inference_mode():
        model = sharding.shard(ranks.stack(), **options)
        used = use(model, rank)
    assert shared_mappings() > before or options.get("transport") == "callback"
    del model
    gc.collect()
    assert [each() for each in used if each() is not None] == []
    assert shared_mappings() == before
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("how", WAYS)
def test_all_of_it_goes_with_the_model(tmp_path, how):
    ranks.run(2, drop, WAYS[how], tmp_path / "store")

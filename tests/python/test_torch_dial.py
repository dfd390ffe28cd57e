# SPDX-License-Identifier: Apache-2.0
"""resident="auto": what is free, found in /proc, cgroups and torch's counters; how many layers the ranks keep of it,
where what is free is faked; and what is refused."""

import contextlib
import re
import resource
import types

import pytest

import layershard
import torch_ranks as ranks

torch = ranks.torch
dist = pytest.importorskip("torch.distributed", reason="this torch has no torch.distributed")
sharding = pytest.importorskip("layershard.torch")
from layershard.torch import dial, free_memory  # noqa: E402

MIB = 2**20
BLOCKS = {"modules": "layers.*", "scope": "block", "transport": "shm:copy", "resident": "auto"}


# ---- What is free ----


def tree(root, files):
    for name, text in {"proc/sys/kernel/random/boot_id": "abc\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return [(name.split(":")[0], free) for name, free in free_memory.host_pools(root)]


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    1000 kB\n"}
HOST = ("host's memory", 1000 * 1024)
V2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
    "sys/fs/cgroup/job/step/memory.current": "5\n",
    "sys/fs/cgroup/job/memory.max": "5000\n",
    "sys/fs/cgroup/job/memory.current": "4000\n",
    "sys/fs/cgroup/job/memory.stat": "anon 3700\ninactive_file 300\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu:/x\n4:memory,hugetlb:/docker/0123\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "6000\n",
    "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
}
UNLIMITED = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
PAGE = resource.getpagesize()


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, []),
        (MEMINFO, [HOST]),
        ({**MEMINFO, **V2}, [HOST, ("cgroup's limit", 1300)]),
        ({**MEMINFO, **V1}, [HOST, ("cgroup's limit", 1500)]),
        ({**MEMINFO, **V1, **UNLIMITED}, [HOST]),
    ],
    ids=["nothing", "no cgroup", "version 2", "version 1 in a container", "no limit"],
)
def test_what_a_host_has_free(tmp_path, files, expected):
    assert tree(tmp_path, files) == expected


def test_what_addresses_a_process_has_left(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (100 * PAGE, 100 * PAGE))
    assert tree(tmp_path, {"proc/self/statm": "30 2 1\n"}) == [("address space", 70 * PAGE)]


def test_two_ranks_of_a_cgroup_name_one_pool_and_this_host_has_one(tmp_path):
    assert tree(tmp_path, V2) == tree(tmp_path, V2)
    found = dict(free_memory.host_pools())
    assert len(found) >= 1 and all(free >= 0 for free in found.values())


def test_what_a_gpu_has_free_counts_what_torch_has_cached(monkeypatch):
    given = {"memory_reserved": 50, "memory_allocated": 20, "get_per_process_memory_fraction": 0.5}
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100, 400))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: types.SimpleNamespace(uuid="u"))
    device = torch.device("cuda", 0)
    found = free_memory.free_memory(device, "library")
    assert found == free_memory.Free({"GPU:u": 100}, 30)
    limited = free_memory.free_memory(device, "torch").pools
    assert sorted(limited.values()) == [100, 150] and "GPU:u" in limited
    shares = [dial.Share(100, "GPU", 1, reserve, 30) for reserve in (0, 30, 40, 140)]
    assert [share.budget for share in shares] == [100, 100, 90, -10]


def test_ranks_divide_what_they_share():
    """By the least that one of them saw; but its own addresses are its own, less the others' shards."""
    one, other = {"host's memory:h": 1000, "address space:h:1": 900}, {"host's memory:h": 800, "cgroup's limit:c": 250}
    told = [(free_memory.Free(one), 10), (free_memory.Free(other), None), (free_memory.Free({"GPU:u": 50}, 30), 60)]
    first, second, third = dial._shares(told, [600, 0, 0])
    assert (first.free, first.pool, first.ranks, first.budget) == (300, "address space", 1, 290)
    assert (second.free, second.pool, second.reserve) == (250, "cgroup's limit", 25)
    assert (third.free, third.budget) == (50, 20)
    first, second, _ = dial._shares(told, [400, 0, 0])
    assert (first.free, first.pool, first.ranks) == (400, "host's memory", 2)


# ---- What is kept ----


@contextlib.contextmanager
def finds(pools, cached=0):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dial, "free_memory", lambda _device, _memory: free_memory.Free(pools, cached))
        yield


def kept(rank, size, pools, options, report=(), n_layers=12):
    """Of a model with the right bits: the resident layers, bytes in all, those of a layer, the report."""
    model, x = ranks.stack(n_layers=n_layers), ranks.inputs(rank)
    with torch.inference_mode():
        want = model(x)
        ranks.spoil(model, rank, size, ("up", "down"))
        with finds(pools[rank]):
            sharding.shard(model, **{**BLOCKS, **options})
        for _ in range(2):
            assert torch.equal(model(x), want)
    handle = sharding.of(model)
    stats = handle.stats().values()
    held = sum(each.shard_bytes + each.window_bytes + each.resident_bytes for each in stats)
    found = [each.residents for each in stats], held, sum(each.layer_bytes for each in stats)
    return *found, handle.report(**dict(report))


LAYER = 23552  # of the stack, packed
BASE = 6 * LAYER + 2 * LAYER  # of two ranks and twelve layers: shard and windows


def test_each_rank_keeps_what_its_own_memory_allows():
    pools = [{"a:0": BASE + 3 * LAYER + 9 * 4096 + 100}, {"b:1": 10**9}]
    options = {"reserve": 100}
    (few, held, layer, told), (all_, _, _, other) = ranks.run(2, kept, pools, options, LAYERSHARD_POISON="0")
    assert layer == LAYER and few == [3] and all_ == [6]
    assert held <= pools[0]["a:0"] - 100 < held + LAYER + 10 * 4096
    assert "keeps 3 of the 6 layers" in told and "not known" in told
    assert "keeps 6 of the 6 layers" in other and "no next step" in other


def test_ranks_that_share_memory_do_not_each_take_all_of_it():
    pools = [{"host's memory:x": 2 * BASE + 5 * LAYER}, {"host's memory:x": 10**9, "cgroup's limit:y": 10**9}]
    options = {"reserve": 0}
    report = {"compute_ns": 1000, "link_bytes_per_s": 10**9}
    found = ranks.run(2, kept, pools, options, report, LAYERSHARD_POISON="0")
    assert [each[0] for each in found] == [[1], [1]]
    for _, _, _, told in found:
        assert "2 ranks that share it" in told and "left above reserve" in told
        then, now = re.search(r"would take (\S+) ms instead of (\S+), by plan at 1.00 GB/s", told).groups()
        assert 0 < float(then) < float(now)


def test_several_series_keep_layers_alike_and_the_reserve_is_a_tenth():
    """With poison, which takes windows of its own."""
    options = {"modules": ["*.up", "*.down"], "scope": "linear"}
    pools = [{f"{rank}:": 400000} for rank in range(2)]
    for residents, held, layer, _ in ranks.run(2, kept, pools, options):
        assert residents[0] == residents[1] > 0
        assert held <= 360000 < held + layer + 2 * 16 * 4096


def in_step(rank, size, path, pools, options):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    found = kept(rank, size, pools, {"transport": "callback", **options})
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize(
    "options, staging", [({"memory": "torch"}, 0), ({"placement": "striped"}, 3 * LAYER)], ids=["whole", "striped"]
)
def test_in_step_all_keep_what_the_poorest_can(tmp_path, options, staging):
    pools = [{"a:0": 10**9}, {"b:1": BASE + 6 * LAYER + staging}]
    options = {"reserve": 2 * LAYER, **options}
    rich, poor = ranks.run(2, in_step, tmp_path / "store", pools, options, LAYERSHARD_POISON="0")
    assert 0 < sum(poor[0]) < 5 and poor[1] <= BASE + 4 * LAYER + staging
    assert abs(sum(rich[0]) - sum(poor[0])) <= 1  # of layers that are stored here or there
    assert "fit on rank 1" in rich[3] and "fit on" not in poor[3]


def in_place(rank, size):
    with finds({"a:": 10**9}):
        return sharding.of(sharding.shard(ranks.stack(), **{**BLOCKS, "transport": "shm"})).report()


def test_where_nothing_moves_nothing_is_kept():
    assert all("keeps nothing" in told for told in ranks.run(2, in_place))


# ---- What is refused ----


@pytest.mark.parametrize("reserve", [-1, "1GB", True, 1e9, 2**64])
def test_a_reserve_that_is_no_number_of_bytes(reserve):
    with pytest.raises(ValueError, match="reserve"):
        sharding.shard(ranks.stack(), "layers.*", group={"rank": 0, "size": 1}, resident="auto", reserve=reserve)


def test_a_reserve_that_counts_for_nothing():
    with pytest.raises(sharding.Refused, match="reserve.*resident='auto'"):
        sharding.shard(ranks.stack(), "layers.*", group={"rank": 0, "size": 1}, resident=0.5, reserve=5)


def too_much(rank, size, reserve):
    """Each rank says so, of the rank that has too little; and the model is as it was."""
    model, x = ranks.stack(), ranks.inputs(rank)
    want = model(x)
    with finds({f"host's memory:{rank}": 10**9}), pytest.raises(sharding.Refused) as failed:
        sharding.shard(model, **BLOCKS, reserve=[0, reserve][rank])
    with finds({}), pytest.raises(sharding.Refused, match="rank 0 cannot see"):
        sharding.shard(model, **BLOCKS)
    with pytest.raises(layershard.Mismatch, match=r"shard\(resident='auto'\)"):
        sharding.shard(model, **{**BLOCKS, "resident": ["auto", 0][rank]})
    assert torch.equal(model(x), want)
    return str(failed.value)


@pytest.mark.parametrize("reserve", [10**9 - LAYER, 10**12], ids=["no windows", "nothing"])
def test_a_reserve_that_leaves_too_little(reserve):
    first, second = ranks.run(2, too_much, reserve)
    assert first == second and "on rank 1: its shards and windows need" in first and "smaller reserve" in first

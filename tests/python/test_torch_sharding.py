# SPDX-License-Identifier: Apache-2.0
"""layershard.torch.shard: what a model computes from shared layers, where they are, what the ranks save."""

import gc
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

LINEARS = {"modules": ["*.up", "*.down"]}
PACKED = {"modules": ["*.up", "*.down"], "scope": "block"}
BLOCKS = {"modules": "layers.*", "scope": "block", "buffers": "*"}
PARTS = {id(LINEARS): ("up", "down"), id(PACKED): ("up", "down"), id(BLOCKS): ("norm", "up", "down", "scale")}


def compute_alike(rank, size, how, options, parts):
    model, x = ranks.stack(), ranks.inputs(rank, rows=3 + rank)
    with torch.inference_mode():
        want = model(x)
        ranks.spoil(model, rank, size, parts)
        assert sharding.shard(model, **how, **options) is model
        for _ in range(1 + 2 * rank):  # ranks need not be in step
            assert torch.equal(model(x), want)
    return [(each.windows, each.waits, each.misses) for each in sharding.of(model).stats().values()]


@pytest.mark.parametrize("how", [LINEARS, PACKED, BLOCKS], ids=["linears", "packed", "blocks"])
@pytest.mark.parametrize("size", [2, 3])
def test_bits_are_the_same_through_windows(how, size):
    for stats in ranks.run(size, compute_alike, how, {"transport": "shm:copy"}, PARTS[id(how)]):
        for windows, waits, misses in stats:
            assert windows == 2  # prefetch = 1
            assert waits >= 5 and waits % 5 == 0  # once per layer and pass
            assert misses == 0


@pytest.mark.parametrize(
    "options",
    [
        {"transport": "shm"},
        {"transport": "auto"},
        {"transport": "shm", "placement": "striped"},
        {"transport": "shm:copy", "placement": "striped", "prefetch": 0},
        {"transport": "shm:copy", "placement": "striped", "stripe": {"*.up.weight": "rows", "*.down.*": "columns"}},
        {"transport": "shm:copy", "prefetch": 7},
        {"transport": "shm:copy", "resident": "50%"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_bits_are_the_same_however_layers_are_kept(options):
    modules = BLOCKS if "stripe" not in options else PACKED
    ranks.run(2, compute_alike, modules, options, PARTS[id(modules)])


def test_more_ranks_than_layers_are_striped_by_auto():
    def work(rank, size):
        model, x = ranks.stack(n_layers=2), ranks.inputs(rank)
        with torch.inference_mode():
            want = model(x)
            sharding.shard(model, **BLOCKS, transport="shm")
            assert torch.equal(model(x), want)
        return "striped" in sharding.of(model).report()

    assert ranks.run(3, work) == [True] * 3


def test_auto_is_striped_where_a_stripe_is_asked_for():
    def work(rank, size):
        model, x = ranks.stack(), ranks.inputs(rank)
        with torch.inference_mode():
            want = model(x)
            sharding.shard(model, "*.up", transport="shm", stripe={"*.weight": "rows"})
            assert torch.equal(model(x), want)
        return sharding.of(model).stripe("layers.3.up.weight").tolist()

    first, last = ranks.run(2, work)
    assert first and last and first + last == ranks.stack().layers[3].up.weight.tolist()


def test_a_stripe_that_cuts_nothing_is_told(caplog):
    for placement, told in (("whole", True), ("striped", False), ("auto", False)):
        caplog.clear()
        sharding.shard(ranks.stack(), "*.up", stripe={"*.weight": "rows"}, placement=placement)
        assert ["stripe is passed over" in record.message for record in caplog.records] == [True] * told


def test_autocast_does_not_keep_a_window_s_bytes():
    """Autocast may remember a weight's conversion; a window's weight is another layer's by then."""

    def work(rank, size):
        model, x = ranks.stack().requires_grad_(False), ranks.inputs(rank)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want = model(x)
            sharding.shard(model, **LINEARS, transport="shm:copy")
            assert torch.equal(model(x), want) and torch.equal(model(x), want)

    ranks.run(3, work)


class Odd(torch.nn.Module):
    """Dtypes side by side, a transposed weight, one with holes."""

    def __init__(self):
        super().__init__()
        self.thin = torch.nn.Parameter(torch.randn(37, 5, dtype=torch.bfloat16))
        self.turned = torch.nn.Parameter(torch.randn(37, 5).t())
        self.holes = torch.nn.Parameter(torch.randn(37, 40)[:, :37])
        self.register_buffer("small", torch.randint(-9, 9, (3, 5), dtype=torch.int8))

    def forward(self, x):
        return x + (x.bfloat16() @ self.thin).float() @ self.turned @ self.holes + self.small.sum()


def odd_stack():
    model = ranks.stack()
    model.layers = torch.nn.ModuleList(Odd() for _ in range(5))
    return model


def odd_tensors(rank, size):
    model, want, x = odd_stack(), odd_stack(), ranks.inputs(rank)
    seen = []
    model.layers[1].register_forward_pre_hook(lambda layer, args: seen.append(layer.turned.clone()))
    for index, layer in enumerate(model.layers):
        if index % size != rank:
            for tensor in layer.state_dict().values():
                tensor.fill_(99)
    sharding.shard(model, **BLOCKS, transport="shm:copy", prefetch=0)
    for layer in model.layers:
        assert layer.turned.stride() == (1, 5) and layer.holes.stride() == (40, 1)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(model(x), want(x))
    assert all(torch.equal(each, want.layers[1].turned) for each in seen)  # a hook of the user's comes after


def test_any_dtype_and_stride_and_hooks_that_read_weights():
    ranks.run(3, odd_tensors)


def where_they_are(rank, size):
    model, x = ranks.stack(), ranks.inputs(rank)
    before = dict(model.named_parameters())
    sharding.shard(model, "*.up", transport="shm:copy", prefetch=1)
    after = dict(model.named_parameters())
    shared = [name for name in after if ".up." in name]
    addresses = {name: after[name].data_ptr() for name in shared}
    assert len(shared) == 10
    assert all(after[name] is before[name] for name in after)  # others may hold the Parameter
    assert not any(after[name].requires_grad for name in shared)
    assert all(after[name].requires_grad for name in after if name not in shared)
    assert all(address % 64 == 0 for address in addresses.values())
    with torch.inference_mode():
        for _ in range(3):
            model(x)
    assert {name: after[name].data_ptr() for name in shared} == addresses


def test_addresses_are_final_and_aligned_and_parameters_stay_the_same_objects():
    ranks.run(3, where_they_are)


def test_resident_layers_need_no_window():
    def work(rank, size):
        model = ranks.stack()
        sharding.shard(model, **BLOCKS, transport="shm:copy", resident="all")
        return [(each.windows, each.residents) for each in sharding.of(model).stats().values()]

    assert ranks.run(2, work) == [[(0, 2)], [(0, 3)]]


def test_one_process_alone_works():
    def work(rank, size):
        for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
            del os.environ[name]
        compute_alike(0, 1, LINEARS, {}, PARTS[id(LINEARS)])

    ranks.run(1, work)


def test_ranks_of_torchrun_meet_without_torch_distributed():
    def work(rank, size):
        for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE"):
            del os.environ[name]
        job = os.environ.pop("LAYERSHARD_JOB")
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
        os.environ.update(TORCHELASTIC_RUN_ID=job, MASTER_ADDR="localhost", MASTER_PORT="29500")
        for _ in range(2):  # each call is a meeting of its own
            compute_alike(rank, size, BLOCKS, {"transport": "shm:copy"}, PARTS[id(BLOCKS)])

    ranks.run(3, work)


def test_the_package_has_the_functions_and_imports_torch_only_for_them():
    code = (
        "import layershard, sys\n"
        "assert 'torch' not in sys.modules and not hasattr(layershard, 'load')\n"
        "import layershard.torch\n"
        "assert layershard.shard is layershard.torch.shard and layershard.of is layershard.torch.of\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=ranks.DEADLINE_S)


# ---- torch.distributed ----


def init_gloo(rank, size, path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    return dist


def by_groups(rank, size, path):
    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        del os.environ[name]
    dist = init_gloo(rank, size, path)
    compute_alike(rank, size, LINEARS, {"transport": "shm:copy"}, PARTS[id(LINEARS)])  # the default group
    compute_alike(rank, size, LINEARS, {"transport": "shm"}, PARTS[id(LINEARS)])
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    compute_alike(rank % 2, 2, BLOCKS, {"transport": "shm:copy", "group": pairs[rank // 2]}, PARTS[id(BLOCKS)])
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    compute_alike(rank // 2, 2, BLOCKS, {"transport": "shm", "group": mesh["dp"]}, PARTS[id(BLOCKS)])
    with pytest.raises(sharding.Refused, match="2 dimensions"):
        sharding.shard(ranks.stack(), "layers.*", mesh)
    with pytest.raises(sharding.Refused, match="is of type str"):
        sharding.shard(ranks.stack(), "layers.*", "world")
    dist.barrier()
    dist.destroy_process_group()


def test_process_groups_and_mesh_dimensions():
    with tempfile.TemporaryDirectory() as directory:
        ranks.run(4, by_groups, pathlib.Path(directory) / "store")


def by_collectives(rank, size, path):
    """Ranks in step, as gloo, nccl, hccl or any other backend needs them."""
    dist = init_gloo(rank, size, path)
    for how in (LINEARS, BLOCKS):
        model, x = ranks.stack(), ranks.inputs(rank)
        with torch.inference_mode():
            want = model(x)
            ranks.spoil(model, rank, size, PARTS[id(how)])
            sharding.shard(model, **how, transport="callback", group=dist.group.WORLD)
            for _ in range(3):
                assert torch.equal(model(x), want)
            sharding.of(model).detach()
            assert torch.equal(model(x), want)
    dist.barrier()
    dist.destroy_process_group()


def test_any_backend_of_torch_distributed():
    with tempfile.TemporaryDirectory() as directory:
        ranks.run(2, by_collectives, pathlib.Path(directory) / "store")


# ---- What it is for ----


def hold_model(rank, size, directory, shared, ready, go):
    options = {"n_layers": 8, "width": 1500}
    if shared:
        with sharding.empty_weights():
            model = ranks.stack(**options)
        sharding.shard(model, "layers.*", scope="block", transport="shm")
        sharding.load(model, directory)
    else:
        from safetensors.torch import load_file

        from layershard.torch.memory import release_freed_memory

        model = ranks.stack(**options)
        model.load_state_dict(load_file(directory / "model.safetensors"))
        release_freed_memory()
    with torch.inference_mode():
        result = model(ranks.inputs(0))
    ready.release()
    go.acquire()
    return result.tolist()


def proportional_bytes(pid):
    """The kernel's count of the process's own memory and its part of shared memory; not of files, which others map.
    Of reserved pages that the two ranks share it tells no part: half."""
    lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return 1024 * (kib["Pss_Anon"] + kib["Pss_Shmem"] + kib["Private_Hugetlb"] + kib["Shared_Hugetlb"] // 2)


def memory_of_two(directory, shared):
    ready, go = ranks._fork.Semaphore(0), ranks._fork.Semaphore(0)
    started = ranks.start(2, hold_model, directory, shared, ready, go)
    assert all(ready.acquire(timeout=ranks.DEADLINE_S) for _ in started)
    used = sum(proportional_bytes(process.pid) for process, _ in started)
    for _ in started:
        go.release()
    return used, ranks.finish(started)


def save_stack(directory):
    def work(rank, size):
        from safetensors.torch import save_file

        save_file(ranks.stack(n_layers=8, width=1500).state_dict(), directory / "model.safetensors")

    ranks.run(1, work)


def test_all_ranks_together_need_less_memory_by_the_shared_copies(tmp_path):
    pytest.importorskip("safetensors.torch")
    pytest.importorskip("tqdm")  # in the parent, so that the ranks share their modules in both cases
    gc.collect()
    gc.freeze()
    save_stack(tmp_path)
    replicated, want = memory_of_two(tmp_path, shared=False)
    shared, got = memory_of_two(tmp_path, shared=True)
    assert got == want
    layers = 8 * 4 * (1500 * 3001 * 2)
    assert replicated - shared > 0.9 * layers, f"{replicated / 2**20:.0f} MiB replicated, {shared / 2**20:.0f} shared"

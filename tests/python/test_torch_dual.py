# SPDX-License-Identifier: Apache-2.0
"""One store, two regimes: gathered layers and tensor-parallel stripes of the same memory."""

import os
import pathlib
import tempfile

import pytest

import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
sharding = pytest.importorskip("layershard.torch")

CUTS = {"*": "rows", "*.down.weight": "columns", "*.o_proj.weight": "columns"}
HEADS, SIZE = 6, 4


class Layer(nn.Module):
    """Attention and MLP; heads are counted from what the projections give."""

    def __init__(self):
        super().__init__()
        width = HEADS * SIZE
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.ModuleDict({name: nn.Linear(width, width) for name in "qkv"})
        self.o_proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 75)
        self.down = nn.Linear(75, width, bias=False)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (self.qkv[name](y).unflatten(-1, (-1, SIZE)).transpose(0, 1) for name in "qkv")
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(0, 1).flatten(1))
        return x + self.down(torch.relu(self.up(x)))


def build():
    torch.manual_seed(2)
    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(4))
    model.forward = lambda x: [x := layer(x) for layer in model.layers][-1]
    return model.eval()


def both_regimes(rank, size, path, transport):
    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        del os.environ[name]
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    model = build()
    own = torch.randn(5 + rank, HEADS * SIZE, generator=torch.Generator().manual_seed(rank))
    same = torch.randn(2, HEADS * SIZE, generator=torch.Generator().manual_seed(99))
    with torch.inference_mode():
        want_own, want_same = model.forward(own), model.forward(same)
        patterns = ["*.qkv.*", "*.o_proj", "*.up", "*.down"]
        sharding.shard(model, patterns, transport=transport, placement="striped", stripe=CUTS, scope="block")
        regime = sharding.dual(model)
        assert isinstance(model.layers[0].up, sharding.DualLinear)
        handle = sharding.of(model)
        for _ in range(2):
            assert torch.equal(model.forward(own), want_own)
            handle.verify()  # fetches under way are over
            fetched = [each.fetched_bytes for each in handle.stats().values()]
            with regime.parallel():
                got = model.forward(same)
            assert torch.allclose(got, want_same, atol=1e-5)
            assert model.layers[0].up(same).shape[1] == 75  # whole again
            assert [each.fetched_bytes for each in handle.stats().values()] == fetched  # nothing in a parallel pass
            if transport == "shm:copy":
                assert sum(fetched) > 0
    total = sum(each.shard_bytes for each in handle.stats().values())
    whole = sum(tensor.numel() * 4 for name, tensor in build().named_parameters() if "norm" not in name)
    dist.barrier()
    dist.destroy_process_group()
    return total / whole


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_prefill_gathered_and_decode_parallel_from_one_store(size, transport):
    with tempfile.TemporaryDirectory() as directory:
        shares = ranks.run(size, both_regimes, pathlib.Path(directory) / "store", transport)
    assert all(share < 1.35 / size for share in shares)  # stripes are padded to 256 bytes, and no copy is kept


def test_what_has_no_stripe_is_refused():
    def work(rank, size):
        model = sharding.shard(ranks.stack(), "layers.*", scope="block", transport="shm", placement="striped")
        with pytest.raises(sharding.Refused, match="need torch.distributed"):
            sharding.dual(model)

    ranks.run(2, work)


def test_only_linears_compute_from_stripes(monkeypatch):
    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        monkeypatch.delenv(name, raising=False)
    model = sharding.shard(ranks.stack(), "layers.*", scope="block", placement="striped")
    with pytest.raises(sharding.Refused, match="only linears"):
        sharding.dual(model)

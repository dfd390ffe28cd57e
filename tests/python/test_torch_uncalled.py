# SPDX-License-Identifier: Apache-2.0
"""Weights that are read without their module being called: refused where torch marks them, found by check elsewhere."""

import contextlib

import pytest

import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
sharding = pytest.importorskip("layershard.torch")

with contextlib.suppress(ImportError):  # seconds of imports, before ranks are forked
    from transformers import MambaConfig, MambaModel


class Attention(nn.Module):
    """A block with torch's attention, or a copy of it as libraries have them."""

    def __init__(self, copied):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        if copied:
            self.inner.__class__ = Copied

    def forward(self, x):
        return x + self.inner(x, x, x, need_weights=False)[0]


class Copied(nn.Module):
    def forward(self, x, *_others, **_options):
        return nn.functional.linear(x, self.out_proj.weight, self.out_proj.bias), None


def attentions(copied):
    torch.manual_seed(2)
    return nn.Sequential(*(Attention(copied) for _ in range(4))).eval()


@pytest.mark.parametrize("copied", [False, True])
def test_marked_by_torch(copied):
    def work(rank, size):
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(rank))
        model, want = attentions(copied), attentions(copied)
        with pytest.raises(sharding.Refused, match=r"0\.inner\.out_proj is read by the .* without being called.*block"):
            sharding.shard(model, "*.out_proj", transport="shm:copy")
        sharding.shard(model, "*.out_proj", scope="block", transport="shm:copy")
        with torch.inference_mode():
            for _ in range(2):
                assert torch.equal(model(x), want(x))
            assert sharding.check(model, x).is_equal

    ranks.run(2, work)


class Step(nn.Module):
    """As stock Mamba: dt_proj's weight is multiplied by hand."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.dt_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + (self.dt_proj.weight @ self.in_proj(x).transpose(0, 1)).transpose(0, 1) + self.dt_proj.bias


def found(model, name, *inputs, **options):
    """The text of what check raises."""
    sharding.shard(model, "*.dt_proj", transport="shm:copy", **options)
    with torch.inference_mode(), pytest.raises(sharding.CheckFailed) as caught:
        sharding.check(model, *inputs)
    assert f"{name}.dt_proj.weight is read outside its view" in str(caught.value)


def test_found_by_check():
    def work(rank, size):
        found(nn.Sequential(*(Step() for _ in range(4))), "0", torch.ones(3, 8))
        model = nn.Sequential(*(Step() for _ in range(4)))
        sharding.shard(model, "*.dt_proj", scope="block", transport="shm:copy")
        with torch.inference_mode():
            assert sharding.check(model, torch.ones(3, 8)).is_equal

    ranks.run(2, work)


def mamba():
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "state_size": 4, "vocab_size": 40, "time_step_rank": 4}
    return MambaModel(MambaConfig(**sizes, use_cache=False)).eval()


def test_stock_mamba():
    pytest.importorskip("transformers")

    def work(rank, size):
        tokens = torch.arange(6)[None] + rank
        found(mamba(), "layers.0.mixer", tokens)
        model, want = mamba(), mamba()
        sharding.shard(model, "*.dt_proj", scope="block", transport="shm:copy")
        with torch.inference_mode():
            assert torch.equal(model(tokens).last_hidden_state, want(tokens).last_hidden_state)
            assert sharding.check(model, tokens).is_equal

    ranks.run(2, work)

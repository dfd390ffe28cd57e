# SPDX-License-Identifier: Apache-2.0
"""Buffers: each rank's own, since forwards write to them, unless they are named. Who has weights in one is told so."""

import logging

import pytest

import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
sharding = pytest.importorskip("layershard.torch")


class Remembering(ranks.Block):
    """Writes to what a state_dict holds, in every pass: a cache, and a batch norm's statistics in train mode."""

    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("cache", torch.zeros(width))
        self.statistics = nn.BatchNorm1d(width)

    def forward(self, x):
        self.cache += x.detach().sum(dim=0)
        return self.statistics(super().forward(x)) + self.cache


class Packed(nn.Module):
    """As quantised layers that keep their weight in a buffer."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("qweight", torch.randint(-9, 9, (width, width), dtype=torch.int8))

    def forward(self, x):
        return x + x @ self.qweight.float() / 300


def of_layers(kind, seed=1):
    torch.manual_seed(seed)
    model = ranks.Stack()
    model.layers = nn.ModuleList(kind(37) for _ in range(5))
    return model.eval()


def written_in_passes(rank, size, transport):
    model, want = of_layers(Remembering), of_layers(Remembering)
    sharding.shard(model, "layers.*", scope="block", transport=transport)
    for net in (model, want):
        net.layers.requires_grad_(False)
        net.train()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(ranks.inputs(rank)), want(ranks.inputs(rank)))
    for mine, other in zip(model.layers, want.layers, strict=True):
        assert torch.equal(mine.cache, other.cache)
        assert torch.equal(mine.statistics.running_mean, other.statistics.running_mean)


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_a_forward_may_write_to_buffers(transport):
    ranks.run(2, written_in_passes, transport)


def shared_by_name(rank, size, buffers):
    model, want, x = of_layers(Packed), of_layers(Packed), ranks.inputs(rank)
    for index, layer in enumerate(model.layers):
        if index % size != rank:
            layer.qweight.zero_()
    sharding.shard(model, "layers.*", buffers=buffers, transport="shm:copy")
    assert 0 <= sharding.of(model).stats()["layers.*"].layer_bytes - 37 * 37 < 256
    with torch.inference_mode():
        assert torch.equal(model(x), want(x)) and torch.equal(model(x), want(x))


@pytest.mark.parametrize("buffers", ["*", ["*.qweight"]])
def test_buffers_are_shared_by_name(buffers):
    ranks.run(2, shared_by_name, buffers)


@pytest.mark.parametrize(
    "buffers, text",
    [
        ("*.scratch", r"'\*.scratch' matches none that a state_dict would hold; there are: layers.0.scale"),
        ("scale", "'scale' matches none"),
        (3, "buffers is of type int"),
    ],
)
def test_names_of_no_buffer_are_refused(buffers, text):
    with pytest.raises(sharding.Refused, match=text):
        sharding.shard(ranks.stack(), "layers.*", scope="block", buffers=buffers)


def test_modules_of_buffers_alone_are_refused_with_what_to_do():
    with pytest.raises(sharding.Refused, match=r"no parameters; buffers \(layers.0.qweight.*buffers='\*'"):
        sharding.shard(of_layers(Packed), "layers.*", scope="block")


def quantised(width):
    from torch.ao.nn.quantized.dynamic import Linear

    return nn.Sequential(nn.LayerNorm(width), Linear(width, width))


@pytest.mark.parametrize(
    "kind, text",
    [
        (lambda width: nn.Sequential(nn.LayerNorm(width), Packed(width)), "layers.0.1.qweight.*buffers='*.qweight'"),
        (quantised, "layers.0.1.weight and the like are not parameters, and stay whole"),
    ],
    ids=["buffer", "packed"],
)
def test_a_pattern_that_shares_less_than_half_says_so(caplog, kind, text):
    with caplog.at_level(logging.WARNING, logger="layershard"):
        sharding.shard(of_layers(kind), "layers.*", scope="block")
    assert [record.message for record in caplog.records if "are shared" in record.message]
    caplog.clear()
    sharding.shard(ranks.stack(), "layers.*", scope="block")
    assert not caplog.records


class Linear8bitLt(nn.Linear):
    """As bitsandbytes': after the first pass the weight is only what state.CB was made from."""

    def __init__(self, width):
        super().__init__(width, width)
        self.state = type("MatmulLtState", (), {"CB": None})()


def test_modules_that_compute_from_a_copy_of_their_own_are_refused():
    model = of_layers(lambda width: nn.Sequential(nn.LayerNorm(width), Linear8bitLt(width)))
    for how in ({"modules": "layers.*", "scope": "block"}, {"modules": "layers.*.1"}):
        with pytest.raises(sharding.Refused, match=r"layers.0.1 is a Linear8bitLt, which computes from a copy"):
            sharding.shard(model, **how)

# SPDX-License-Identifier: Apache-2.0
"""What programs do to shared tensors from outside is told at the next pass, by the tensor's name."""

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

NEW = torch.zeros(75, 37)


def compute(model, rank):
    with torch.inference_mode():
        return model(ranks.inputs(rank))


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def assign(module):
    module.weight = torch.nn.Parameter(NEW.clone(), requires_grad=False)


def give_data(module):
    module.weight.data = NEW.clone()


def swap(module):
    torch.utils.swap_tensors(module.weight, torch.nn.Parameter(NEW.clone(), requires_grad=False))


def wrap(module):
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


def delete(module):
    del module.weight
    module.weight = NEW.clone()


def write(module):
    with torch.no_grad():
        module.weight.add_(1)


REPLACE = [assign, give_data, swap, wrap, delete]


def refused(rank, size, spoil, how, words):
    model, want = sharding.shard(ranks.stack(), **how, transport="shm:copy"), ranks.stack()
    assert torch.equal(compute(model, rank), compute(want, rank))
    spoil(model.layers[rank].up)
    with pytest.raises(sharding.Guarded, match=rf"layers\.{rank}\.up\.weight .*{words}.*update\(\)"):
        for _ in range(3):  # a block of six tensors is looked at in two passes
            compute(model, rank)


@pytest.mark.parametrize("spoil", REPLACE, ids=lambda each: each.__name__)
def test_what_is_replaced_or_wrapped_is_named(spoil):
    for how in ({"modules": "*.up"}, {"modules": "layers.*", "scope": "block"}):
        ranks.run(2, refused, spoil, how, "no longer what layershard hung there")


def test_what_is_written_in_place_is_named():
    for how in ({"modules": "*.up"}, {"modules": "layers.*", "scope": "block"}):
        ranks.run(2, refused, write, how, "written in place outside an update")


def test_buffers_are_looked_at_too():
    def work(rank, size):
        model = sharding.shard(ranks.stack(), "layers.*", scope="block", transport="shm:copy", buffers="*.scale")
        model.layers[rank].scale.mul_(2)
        with pytest.raises(sharding.Guarded, match=rf"layers\.{rank}\.scale was written"):
            for _ in range(3):
                compute(model, rank)

    ranks.run(2, work)


def test_an_update_mends_it():
    def work(rank, size):
        model, new = sharding.shard(ranks.stack(), "*.up", transport="shm:copy"), ranks.stack()
        for layer in new.layers:
            layer.up.weight.data.fill_(0.25)
        for spoil in (write, assign):
            spoil(model.layers[rank].up)
            with pytest.raises(sharding.Guarded):
                compute(model, rank)
            with sharding.of(model).update() as update:
                update.copy((name, tensor) for name, tensor in new.state_dict().items() if "up.weight" in name)
            for _ in range(2):
                assert torch.equal(compute(model, rank), compute(new, rank))

    ranks.run(2, work)


def test_what_is_put_back_is_right_again():
    def work(rank, size):
        model, want = sharding.shard(ranks.stack(), "*.up", transport="shm:copy"), ranks.stack()
        up = model.layers[2].up
        weight = up.weight
        assign(up)
        with pytest.raises(sharding.Guarded):
            compute(model, rank)
        up.weight = weight
        assert torch.equal(compute(model, rank), compute(want, rank))

    ranks.run(2, work)


def test_replaced_under_compile_is_named():
    def work(rank, size):
        model = sharding.shard(ranks.stack(), "*.up", transport="shm:copy")
        run = torch.compile(model, backend="eager")
        for _ in range(3):
            compute(run, rank)
        assign(model.layers[1].up)
        with pytest.raises(sharding.Guarded, match=r"layers\.1\.up\.weight is no longer"):
            compute(run, rank)

    ranks.run(2, work)


def test_passes_in_every_mode_are_no_writes():
    def work(rank, size):
        model = sharding.shard(ranks.stack(), "layers.*", scope="block", transport="shm:copy")
        want, run = compute(ranks.stack(), rank), torch.compile(model, backend="eager")
        for _ in range(3):
            assert torch.equal(compute(model, rank), want)
            with torch.no_grad():
                assert torch.equal(model(ranks.inputs(rank)), want)
                assert torch.allclose(run(ranks.inputs(rank)), want, atol=1e-5)

    ranks.run(2, work)

# SPDX-License-Identifier: Apache-2.0
"""Under torch.compile every read of a layer's weights stays between its arrival and the next one's, whatever a program
does with a block's results: models made at random give the bits of the same compiled program unsharded. With poison: a
read too early or too late gives NaN.

LAYERSHARD_TEST_SEEDS says how many models there are, each in one of the modes; many more of one: see random_runs.py.
"""

import os

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

import random_runs  # noqa: E402

SEEDS = range(int(os.environ.get("LAYERSHARD_TEST_SEEDS", 20)))
GROUPS = 6

random_runs.import_compiler()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where inductor keeps what it has made."""
    return str(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_models(group, made):
    mode = random_runs.MODES[group % len(random_runs.MODES)]
    found = ranks.run(random_runs.RANKS, random_runs.all_wrong, mode, SEEDS[group::GROUPS], made)
    assert found == [[]] * random_runs.RANKS


def test_one_bit_counts_and_so_does_poison():
    one, zero = torch.ones(2), torch.zeros(2)
    next_to_one = torch.nextafter(one, 2 * one)
    assert random_runs.differences([one, one], [one, one.clone()]) == []
    assert len(random_runs.differences([zero], [-zero])) == 1
    for got in ([one, next_to_one], [next_to_one, one], [one, one * torch.nan], [one * torch.nan, one]):
        assert len(random_runs.differences(got, [one, one])) == 1


class Keeping(torch.nn.Module):
    """Inductor computes what it keeps where it is used: after all layers."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(16) + 0.5)
        self.up = torch.nn.Linear(16, 16)
        self.kept = None

    def forward(self, x):
        self.kept = x * self.scale
        return x + torch.relu(self.up(x))


class KeptUntilTheEnd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Keeping() for _ in range(4)).requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return (x + sum(layer.kept for layer in self.layers),)


def kept_in_an_attribute(rank, size, folder):
    ranks.quick_inductor(folder)
    x = torch.ones(5, 16)
    with torch.inference_mode():
        model = sharding.shard(KeptUntilTheEnd(), "layers.*", scope="block", transport="shm:copy", prefetch=0)
        if rank:
            return "return it from the module"
        try:
            found = random_runs.passes("whole", model, [x] * 3)
        except sharding.Refused as refusal:
            return str(refusal)
        return random_runs.differences(found, random_runs.passes("whole", KeptUntilTheEnd(), [x] * 3))


def test_what_a_module_keeps_to_itself_is_right_or_refused(made):
    for found in ranks.run(2, kept_in_an_attribute, made):
        assert "return it from the module" in found if isinstance(found, str) else found == []


class Turning(torch.nn.Module):
    """Hands on complex numbers, which inductor leaves to kernels of their own, beside what it computes: views of real
    ones, and complex from the beginning."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(16) + 0.5)
        self.up = torch.nn.Linear(16, 16)

    def forward(self, x, turned):
        pairs = (x * self.scale).reshape(-1, 8, 2)
        turned = (*turned, torch.view_as_complex(pairs), torch.complex(x * self.scale, x + self.scale))
        return x + torch.relu(self.up(x)), turned


class TurnedUntilTheEnd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Turning() for _ in range(4)).requires_grad_(False)

    def forward(self, x):
        turned = ()
        for layer in self.layers:
            x, turned = layer(x, turned)
        pairs = [torch.view_as_real(each * each.conj()) for each in turned]
        return x, *(each.sum(dim=-1) for each in pairs)


def hands_on_complex_numbers(rank, size, folder):
    ranks.quick_inductor(folder)
    model, x = TurnedUntilTheEnd(), torch.rand(3, 16)
    sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
    found = random_runs.passes("whole", model, [x] * 2)
    sharding.of(model).close()
    return random_runs.differences(found, random_runs.passes("whole", TurnedUntilTheEnd(), [x] * 2))


def test_complex_numbers_are_right(made):
    assert ranks.run(2, hands_on_complex_numbers, made) == [[]] * 2

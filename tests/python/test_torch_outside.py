# SPDX-License-Identifier: Apache-2.0
"""A part of a block is called without the block, as diffusers' DiT does at the end of each pass: refused, not wrong."""

import copy

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")


class Asking(ranks.Stack):
    """It asks for a part of its first block once more: before its blocks, or at its end."""

    is_last = False

    def forward(self, x):
        first = 0 if self.is_last else self.layers[0].norm(self.embed(x))
        rest = super().forward(x).sum()
        return (self.layers[0].norm(self.embed(x)) if self.is_last else first) + rest


def asking():
    torch.manual_seed(1)
    return Asking().eval()


def calls(model, x):
    with torch.no_grad():
        return model(x)


def refused(rank, size, is_last):
    """However often a program makes the pass again."""
    model = asking()
    model.is_last = is_last
    sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
    for _ in range(4):
        with pytest.raises(sharding.Refused, match=r"layers\.0\.norm was called without layers\.0"):
            calls(model, ranks.inputs(rank))


@pytest.mark.parametrize("is_last", [False, True])
def test_it_is_refused_in_the_first_pass_by_name_and_in_every_one_after_it(is_last):
    ranks.run(2, refused, is_last)


def allowed(rank, size, modules, transport):
    model, plain = asking(), asking()
    sharding.shard(model, modules, scope="block", transport=transport)
    return all(torch.equal(calls(model, x), calls(plain, x)) for x in [ranks.inputs(rank)] * 3)


@pytest.mark.parametrize("modules, transport", [("layers.*", "shm"), ("layers.[1-4]", "shm:copy")])
def test_it_is_right_where_nothing_moves_and_of_a_block_that_is_not_shared(modules, transport):
    assert ranks.run(2, allowed, modules, transport) == [True, True]


def hooks(module):
    return sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in module.modules())


def looked_at(rank, size):
    """Hooks in a block after each pass; a pass that fails is none."""
    model = ranks.stack()
    sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
    block, counts = model.layers[1], []
    for x in (ranks.inputs(rank), torch.ones(3, 5), *[ranks.inputs(rank)] * 2):
        if x.shape[1] == 8:
            calls(model, x)
        else:
            with pytest.raises(RuntimeError):
                calls(model, x)
        counts.append(hooks(block))
    return counts


def test_two_passes_are_looked_at_and_no_more():
    for first, failed, second, third in ranks.run(2, looked_at):
        assert first == failed > second == third


class Broken(ranks.Block):
    """Compiled, it runs a part of it eagerly."""

    @torch.compiler.disable
    def aside(self, x):
        return self.up(self.norm(x))

    def forward(self, x):
        return x + self.down(torch.relu(self.aside(x)))


def broken():
    model = ranks.stack()
    model.layers = torch.nn.ModuleList(Broken(37) for _ in range(5))
    return model.eval()


def partly_compiled(rank, size):
    torch.manual_seed(2)
    model = broken()
    plain = copy.deepcopy(model)
    sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
    for layer in model.layers:
        layer.compile(backend="eager")
    return all(torch.equal(calls(model, x), calls(plain, x)) for x in [ranks.inputs(rank)] * 3)


def test_a_part_that_a_compiled_block_runs_eagerly_is_inside():
    assert ranks.run(2, partly_compiled) == [True, True]


def checked_and_updated(rank, size):
    """What puts hooks in anew, or calls modules for its own ends, is not taken for a program that calls a part."""
    model = ranks.stack()
    sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
    x = ranks.inputs(rank)
    before = calls(model, x)
    with sharding.of(model).update() as update:
        update.copy([])
    with torch.inference_mode():
        return sharding.check(model, x).is_equal and torch.equal(calls(model, x), before)


def test_checks_and_updates_go_on():
    assert ranks.run(2, checked_and_updated) == [True, True]


def recorded(rank, size, warm):
    """A part by itself, by what would keep its weights; torch.export is told only as long as parts are looked at."""
    model, x = ranks.stack(), torch.ones(2, 37)
    sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
    for _ in range(warm):
        calls(model, ranks.inputs(rank))
    part = model.layers[0].up
    ways = {"jit.trace": torch.jit.trace, "export": lambda part, x: torch.export.export(part, (x,))}
    for name, make in list(ways.items())[: 1 if warm else 2]:
        with torch.no_grad(), pytest.raises(sharding.Refused, match=rf"torch\.{name} makes a program"):
            make(part, x)
    sharding.of(model).detach()
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(part, x)(x), part(x))


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_part_is_not_traced(warm):
    ranks.run(2, recorded, warm)

# SPDX-License-Identifier: Apache-2.0
"""Sharded models under torch.compile: no graph break, no recompilation after warm-up, the same results."""

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

# What compiling imports, seconds of it, is there when ranks are forked.
with torch.no_grad():
    torch.compile(torch.nn.ReLU(), backend="aot_eager")(torch.ones(1))
torch.compiler.reset()

LINEARS = {"modules": ["*.up", "*.down"]}
BLOCKS = {"modules": "layers.*", "scope": "block", "buffers": "*"}


def steady(rank, size, how, parts, whole, backend):
    import torch._dynamo as dynamo

    # Block by block, dynamo takes a number on a submodule of the block for a constant unless told otherwise.
    dynamo.config.allow_unspec_int_on_nn_module = not whole and how is LINEARS
    model, x = ranks.stack(n_layers=10), ranks.inputs(rank)
    with torch.no_grad():
        want = model(x)
        ranks.spoil(model, rank, size, parts)
        sharding.shard(model, **how, transport="shm:copy")
        if whole:
            run = torch.compile(model, fullgraph=True, backend=backend)
        else:  # block by block: more layers than dynamo would compile variants of
            run = model
            for layer in model.layers:
                layer.compile(fullgraph=True, backend=backend)
        for _ in range(2):
            assert torch.allclose(run(x), want, atol=1e-5)
        handle = sharding.of(run)
        before = handle.stats()
        with dynamo.config.patch(error_on_recompile=True):
            for _ in range(3 + rank):
                assert torch.allclose(run(x), want, atol=1e-5)
        for name, after in handle.stats().items():
            assert after.waits - before[name].waits == 10 * (3 + rank)
            assert after.misses == 0
        with handle.update():
            for layer in model.layers:
                layer.up.weight.data.mul_(2)
        assert not torch.allclose(run(x), want, atol=1e-5)  # nothing was folded into the code


@pytest.mark.parametrize("how, parts", [(LINEARS, ("up", "down")), (BLOCKS, ("norm", "up", "down", "scale"))])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_compiled(how, parts, whole):
    ranks.run(2, steady, how, parts, whole, "aot_eager")


def test_compiled_by_inductor(tmp_path):
    ranks.run(2, steady, BLOCKS, ("norm", "up", "down", "scale"), False, "inductor")


def test_freezing_is_refused_when_compiling():
    def work(rank, size):
        import torch._inductor.config as inductor

        model = sharding.shard(ranks.stack(n_layers=2), "*.up", transport="shm:copy")
        with torch.no_grad(), inductor.patch(freezing=True), pytest.raises(Exception, match="freezing is on"):
            torch.compile(model, fullgraph=True, backend="aot_eager")(ranks.inputs(rank))

    ranks.run(2, work)


def test_operator_is_well_formed():
    from layershard.torch import ops

    def work(rank, size):
        model = sharding.shard(ranks.stack(), "*.up", transport="shm:copy")
        step = [(sharding.of(model).shared[0].series, 2)]
        steps = ops.Steps(step, step, torch.device("cpu"))
        torch.library.opcheck(ops.arrive, ([torch.randn(3)], steps.number))

    ranks.run(2, work)


def test_a_pass_that_ends_in_join_and_begins_in_prepare():
    """What a captured region does, without a device to capture on."""

    def work(rank, size):
        model, x = ranks.stack(), ranks.inputs(rank)
        with torch.no_grad():
            want = model(x)
            sharding.shard(model, "*.up", transport="shm:copy")
            handle = sharding.of(model)

            def step(x):
                y = model(x)
                handle.join(y)
                return y

            run = torch.compile(step, fullgraph=True, backend="aot_eager")
            for _ in range(3):
                handle.prepare()
                assert torch.allclose(run(x), want, atol=1e-5)
            assert torch.equal(step(x), want)

    ranks.run(2, work)

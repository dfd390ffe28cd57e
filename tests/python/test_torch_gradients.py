# SPDX-License-Identifier: Apache-2.0
"""Gradients through a window are refused wherever the wish comes from; those that need no shared weight are right."""

import functools
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
checkpoint = pytest.importorskip("torch.utils.checkpoint").checkpoint
sharding = pytest.importorskip("layershard.torch")

# What these import, seconds of it, is there when ranks are forked.
with torch.no_grad():
    torch.compile(nn.ReLU(), backend="eager")(torch.ones(1))
torch.compiler.reset()

LINEARS = {"modules": ["*.up", "*.down"], "scope": "linear"}
BLOCKS = {"modules": ["*.up", "*.down"], "scope": "block"}


class Adapted(nn.Module):
    """A frozen block with a trainable part: @where it is."""

    def __init__(self, where, width=6):
        super().__init__()
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)
        self.requires_grad_(False)
        self.extra = nn.Parameter(torch.linspace(0.5, 1.5, 9 if where == "between" else width))
        self.where = where

    def forward(self, x):
        given = x = x[0] if isinstance(x, (list, tuple)) else x
        x = x * self.extra if self.where == "before" else x
        x = self.up(x) * self.extra if self.where == "between" else self.up(x)
        x = torch.sigmoid(self.down(x))
        x = x * self.extra if self.where == "after" else x
        return x + given * self.extra if self.where == "beside" else x


def adapted(where, n_layers=4):
    torch.manual_seed(3)
    model = nn.Module()
    model.layers = nn.ModuleList(Adapted(where) for _ in range(n_layers))
    return model


X = torch.linspace(-1, 1, 12).reshape(2, 6)


def grads(model, numbers, x=X):
    """Of a pass through layers @numbers, each of which gets inputs without gradients."""
    for number in numbers:
        y = model.layers[number](x)
        x = y.detach()
    y.sum().backward()
    return model.layers[numbers[-1]].extra.grad


def refused(call):
    with pytest.raises(sharding.Refused, match="a gradient is wanted"):
        call()
    gc.collect()  # an older checkpoint takes its own hooks away when the exception's frames go
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_trainable_tensors_before_a_shared_weight():
    def work(rank, size):
        for how, where, prefetch, numbers in itertools.product(
            (LINEARS, BLOCKS), ("before", "between"), (0, 1), (range(4), [2])
        ):
            model, want = adapted(where), adapted(where)
            sharding.shard(model, **how, transport="shm:copy", prefetch=prefetch)
            refused(lambda model=model, numbers=numbers: grads(model, numbers))
            with torch.no_grad():
                assert all(torch.equal(model.layers[i](X), want.layers[i](X)) for i in range(4))
            sharding.of(model).close()

    ranks.run(2, work)


def test_gradients_that_need_no_shared_weight():
    def work(rank, size):
        for how, where in itertools.product((LINEARS, BLOCKS), ("after", "beside")):
            model, want = sharding.shard(adapted(where), **how, transport="shm:copy"), adapted(where)
            for numbers in (range(4), [1], [3, 0]):
                assert torch.equal(grads(model, numbers), grads(want, numbers))

    ranks.run(2, work)


def test_nested_inputs():
    def work(rank, size):
        for how in (LINEARS, BLOCKS):
            model = sharding.shard(adapted("after"), **how, transport="shm:copy")
            x = X.clone().requires_grad_()
            for given in ([x], (x, None)):
                refused(lambda model=model, given=given: model.layers[1](given))
            with torch.no_grad():
                model.layers[1]([x])

    ranks.run(2, work)


class Checkpointed(Adapted):
    """The whole block is computed again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__("before")
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class Within(Adapted):
    """A part of it is, without the block being called."""

    def __init__(self, reentrant):
        super().__init__("after")
        self.inner, self.reentrant = nn.Sequential(self.up, nn.ReLU(), self.down), reentrant
        del self.up, self.down

    def forward(self, x):
        return checkpoint(self.inner, x * self.extra, use_reentrant=self.reentrant)


@pytest.mark.parametrize("kind, pattern", [(Checkpointed, ["*.up", "*.down"]), (Within, "*.inner.*")])
def test_checkpointing(kind, pattern):
    def work(rank, size):
        for scope, reentrant in itertools.product(("linear", "block"), (True, False)):
            model = nn.Module()
            model.layers = nn.ModuleList(kind(reentrant) for _ in range(4))
            sharding.shard(model, pattern, scope=scope, transport="shm:copy")
            x = X.clone().requires_grad_(reentrant and kind is Checkpointed)
            refused(lambda model=model, x=x: model.layers[1](x).sum().backward())
            with torch.no_grad():
                model.layers[1](X)

    ranks.run(2, work)


class Aside(Within):
    """Nothing that it returns has a gradient, and nothing outside of the checkpointed part saves anything."""

    def forward(self, x):
        self.kept = checkpoint(lambda x: self.inner(x) * self.extra, x, use_reentrant=False)
        return self.kept.detach()


def test_checkpointing_of_what_a_block_keeps_to_itself():
    def work(rank, size):
        model = nn.Module()
        model.layers = nn.ModuleList(Aside(False) for _ in range(4))
        sharding.shard(model, "*.inner.*", scope="block", transport="shm:copy")
        model.layers[1](X)
        refused(lambda: model.layers[1].kept.sum().backward())

    ranks.run(2, work)


def test_modules_in_a_block_have_no_hooks_where_no_graph_is_made():
    def work(rank, size):
        model = sharding.shard(adapted("after").requires_grad_(False), **BLOCKS, transport="shm:copy")
        for _ in range(2):
            assert torch.is_grad_enabled() and not model.layers[1](X).requires_grad
        assert not any(module._forward_pre_hooks for module in (model.layers[1].up, model.layers[1].down))

    ranks.run(2, work)


def test_hooks_of_the_program_s_that_came_after_sharding():
    """They read the weights as the module does."""

    def work(rank, size):
        model = sharding.shard(adapted("after"), **BLOCKS, transport="shm:copy")
        model.layers[1].register_forward_hook(lambda block, args, y: y + (block.up.weight * block.extra.sum()).sum())
        refused(lambda: model.layers[1](X))

    ranks.run(2, work)


class Keeping(torch.autograd.Function):
    """Keeps a weight as quantised layers' kernels do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.tensors = [weight.t()]
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.tensors[0].t(), None


def test_functions_that_keep_a_weight_by_themselves():
    def work(rank, size):
        model = adapted("before")
        for layer in model.layers:
            layer.forward = lambda x, layer=layer: Keeping.apply(x * layer.extra, layer.up.weight)
        sharding.shard(model, **BLOCKS, transport="shm:copy")
        refused(lambda: grads(model, [2]))

    ranks.run(2, work)


def in_a_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_graphs_that_another_thread_makes():
    def work(rank, size):
        def keeping(layer, x):
            return Keeping.apply(x * layer.extra, layer.up.weight)

        def checkpointing(layer, x):
            return checkpoint(lambda x: layer.up(x * layer.extra), x, use_reentrant=False)

        for call in (keeping, checkpointing):
            model = adapted("before")
            for layer in model.layers:
                layer.forward = lambda x, layer=layer, call=call: in_a_thread(lambda: call(layer, x))
            sharding.shard(model, **BLOCKS, transport="shm:copy")
            refused(lambda model=model: grads(model, [2]))

    ranks.run(2, work)


def turned_on(layer, x):
    with torch.enable_grad():
        layer.kept = nn.functional.linear(x * layer.extra, layer.up.weight)
    return layer.kept.detach()


def in_a_worker(layer, x):
    layer.kept = in_a_thread(lambda: nn.functional.linear(x * layer.extra, layer.up.weight))
    return layer.kept * 1


@pytest.mark.parametrize("call, outer", [(turned_on, torch.no_grad), (in_a_worker, torch.enable_grad)])
def test_what_nobody_has_told_fails_in_the_backward_pass(call, outer):
    def work(rank, size):
        model, want = adapted("before"), adapted("before")
        for layer in (*model.layers, *want.layers):
            layer.forward = functools.partial(call, layer)
        sharding.shard(model, **BLOCKS, transport="shm:copy")
        for numbers in (range(4), [2, 1]):  # nothing is taken for a write in the next pass
            with outer():
                assert all(torch.equal(model.layers[i](X), want.layers[i](X)) for i in numbers)
            for i in numbers:
                with pytest.raises(RuntimeError, match="modified"):
                    model.layers[i].kept.sum().backward()

    ranks.run(2, work)


def direct(layer, x):
    return nn.functional.linear(x * layer.extra, layer.up.weight)


def in_hooks(layer, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda each: [each], lambda each: each[0]):
        return direct(layer, x)


def on_cpu(layer, x):
    with torch.autograd.graph.save_on_cpu():
        return direct(layer, x)


def checkpointed(layer, x):
    return checkpoint(lambda x: direct(layer, x), x, use_reentrant=False)


def checkpointed_reentrant(layer, x):
    return checkpoint(lambda x: direct(layer, x), layer.extra * 1, use_reentrant=True)


class KeepingModule(Keeping):
    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return module(x)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.module.weight, None


def keeping_module(layer, x):
    return KeepingModule.apply(x * layer.extra, layer.up)


def copied(layer, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda each: each.clone(), lambda each: each):
        return direct(layer, x)


def blocks_of(call):
    model = adapted("before")
    for layer in model.layers:
        layer.forward = functools.partial(call, layer)
    return model


@pytest.mark.parametrize("call", [in_hooks, on_cpu, checkpointed, checkpointed_reentrant, keeping_module])
def test_weights_that_are_kept_or_read_again_inside_a_block(call):
    def work(rank, size):
        model = sharding.shard(blocks_of(call), **BLOCKS, transport="shm:copy")
        refused(lambda: grads(model, [2]))

    ranks.run(2, work)


def test_hooks_that_keep_copies_are_right():
    def work(rank, size):
        model, want = sharding.shard(blocks_of(copied), **BLOCKS, transport="shm:copy"), blocks_of(copied)
        assert torch.equal(grads(model, [2]), grads(want, [2]))

    ranks.run(2, work)


def test_the_programs_own_hooks_are_asked_too():
    def work(rank, size):
        model, want = sharding.shard(adapted("after"), **BLOCKS, transport="shm:copy"), adapted("after")
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: packed.append(each) or each, lambda each: each):
            assert torch.equal(grads(model, range(4)), grads(want, range(4)))
            assert len(packed) == 2 * 4  # what both have saved
            refused_in_hooks = sharding.shard(adapted("before"), **BLOCKS, transport="shm:copy")
            with pytest.raises(sharding.Refused):
                grads(refused_in_hooks, [0])
            packed.clear()
            X.clone().requires_grad_().square()
            assert len(packed) == 1

    ranks.run(2, work)


def test_what_was_modified_after_it_was_saved_is_told_as_ever():
    def work(rank, size):
        model = sharding.shard(adapted("after"), **BLOCKS, transport="shm:copy")
        y = model.layers[0](X)
        with torch.no_grad():
            model.layers[0].extra.add_(1)
        y.sum().backward()
        y = model.layers[0](X).sigmoid()
        z = y.mul_(2)
        with pytest.raises(RuntimeError, match="modified"):
            z.sum().backward()

    ranks.run(2, work)


def test_after_a_pass_that_failed():
    def work(rank, size):
        model, want = sharding.shard(adapted("after"), **BLOCKS, transport="shm:copy"), adapted("after")
        with pytest.raises(RuntimeError):
            model.layers[2](torch.ones(2, 5))
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        assert torch.equal(grads(model, range(4)), grads(want, range(4)))

    ranks.run(2, work)


def test_where_layers_are_read_in_place():
    def work(rank, size):
        for where in ("before", "between", "after", "beside"):
            model, want = sharding.shard(adapted(where), **BLOCKS, transport="shm"), adapted(where)
            assert torch.equal(grads(model, range(4)), grads(want, range(4)))
            x, other = X.clone().requires_grad_(), X.clone().requires_grad_()
            model.layers[1](x).sum().backward()
            want.layers[1](other).sum().backward()
            assert torch.equal(x.grad, other.grad)

    ranks.run(2, work)


def test_transforms_of_functions():
    def work(rank, size):
        model, want = sharding.shard(adapted("after"), **BLOCKS, transport="shm:copy"), adapted("after")
        refused(lambda: torch.func.grad(lambda x: model.layers[1](x).sum())(X))
        refused(lambda: torch.func.grad(lambda x: model.layers[1]([x]).sum())(X))
        one, other = (torch.func.jvp(each.layers[1], (X,), (X,)) for each in (model, want))
        assert all(torch.equal(a, b) for a, b in zip(one, other))

    ranks.run(2, work)


def test_compiled():
    def work(rank, size):
        model, x = sharding.shard(adapted("before"), **BLOCKS, transport="shm:copy"), X.clone().requires_grad_()

        def step(x):
            for layer in model.layers:
                x = layer(x)
            return x

        for fullgraph, given in ((False, X), (True, X), (True, x)):
            with pytest.raises(Exception, match="a gradient is wanted"):
                torch.compile(step, backend="eager", fullgraph=fullgraph)(given)
            torch.compiler.reset()
        with torch.no_grad():
            torch.compile(step, backend="eager", fullgraph=True)(x)

    ranks.run(2, work)

# SPDX-License-Identifier: Apache-2.0
"""Ways into a sharded model, and out of it: none computes from other layers' bytes, or keeps them."""

import copy
import dataclasses
import functools
import logging
import pickle

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

BY = ["shm", "shm:copy"]


class Reader(ranks.Stack):
    """As libraries have them: another method than forward runs the layers."""

    def encode(self, x):
        return self.layers[1](self.layers[0](self.embed(x)))


def reader():
    torch.manual_seed(1)
    return Reader().eval()


def entries(model):
    yield "encode", lambda x: model.encode(x)
    yield "forward", lambda x: model.forward(x)
    yield "a block", lambda x: model.layers[1](model.embed(x))
    yield "a block's forward", lambda x: model.layers[1].forward(model.embed(x))
    yield "a linear", lambda x: model.layers[1].up(model.embed(x))


def refuse_all(model, rank, words):
    for name, enter in entries(model):
        with torch.inference_mode(), pytest.raises(sharding.Guarded, match=words):
            enter(ranks.inputs(rank))
            raise AssertionError(f"{name} goes on")


def refuse_to_read(model, rank):
    handle = sharding.of(model)
    check = functools.partial(sharding.check, model, ranks.inputs(rank))
    for read in (handle.state_dict, handle.verify, handle.detach, check):
        with pytest.raises(sharding.Guarded, match="under way, or has failed"):
            read()


def enter_after_a_failed_update(rank, size, transport):
    model = sharding.shard(reader(), "layers.*", scope="block", transport=transport)
    with pytest.raises(KeyError, match="in the middle"):
        with sharding.of(model).update():
            refuse_all(model, rank, "an update of the shared weights is under way: make the pass after the end")
            refuse_to_read(model, rank)
            for weight in model.layers.parameters():
                weight.data.fill_(7)
            raise KeyError("in the middle")
    refuse_all(model, rank, "update has failed")
    refuse_to_read(model, rank)
    fast = torch.compile(model.forward, backend="eager")
    with torch.inference_mode(), pytest.raises(sharding.Guarded, match="update has failed"):
        fast(ranks.inputs(rank))
    with sharding.of(model).update() as update:
        update.copy({name: each for name, each in reader().state_dict().items() if name in dict(update.parameters())})
    with torch.inference_mode():
        assert torch.equal(model.encode(ranks.inputs(rank)), reader().encode(ranks.inputs(rank)))


@pytest.mark.parametrize("transport", BY)
def test_no_way_in_after_a_failed_update(transport):
    ranks.run(2, enter_after_a_failed_update, transport)


def enter_before_load(rank, size, transport):
    with sharding.empty_weights():
        model = reader()
    sharding.shard(model, "layers.*", scope="block", transport=transport, device="cpu")
    with torch.inference_mode(), pytest.raises(sharding.Guarded, match="not been loaded"):
        model.layers[0](torch.zeros(1, 37))


@pytest.mark.parametrize("transport", BY)
def test_no_way_in_before_the_weights_are_there(transport):
    ranks.run(2, enter_before_load, transport)


def leave_by_close(rank, size, transport):
    model, want = sharding.shard(reader(), "layers.*", scope="block", transport=transport), reader().state_dict()
    sharding.of(model).close()
    refuse_all(model, rank, r"given up by close\(\)")
    if transport == "shm":  # read where it lies, also now
        assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
        return
    for part in (model, model.layers, model.layers[0].up):
        for keep in (lambda each: each.state_dict(), copy.deepcopy, pickle.dumps):
            with pytest.raises(sharding.Guarded, match=r"given up by close\(\)"):
                keep(part)


@pytest.mark.parametrize("transport", BY)
def test_a_closed_model_gives_nothing_of_its_windows(transport):
    ranks.run(2, leave_by_close, transport)


def in_inference_mode(rank, size):
    model = ranks.stack()
    with torch.inference_mode():
        sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
        model(ranks.inputs(rank))
        with sharding.of(model).update():
            pass
        assert not any(each.is_inference() for each in model.parameters())
    with torch.no_grad():
        model.layers[0].up.weight.add_(1)
        with pytest.raises(sharding.Guarded, match=r"layers\.0\.up\.weight was written"):
            for _ in range(3):
                model(ranks.inputs(rank))
    again = sharding.shard(ranks.stack(), "layers.*", scope="block", transport="shm:copy")
    with torch.inference_mode():
        sharding.of(again).detach()
    again(ranks.inputs(rank)).sum().backward()
    assert all(each.grad is not None for each in again.parameters())


def test_inference_mode_round_the_calls_leaves_no_mark():
    ranks.run(2, in_inference_mode)


def test_detach_gives_back_what_was_trainable():
    model = ranks.stack()
    model.layers[1].up.weight.requires_grad_(False)
    sharding.of(sharding.shard(model, "layers.*")).detach()
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    assert frozen == ["layers.1.up.weight"]


def test_conversions_reach_what_is_not_shared():
    model = ranks.stack().bfloat16()
    for layer in model.layers:
        layer.up.register_buffer("table", torch.ones(3))
    sharding.shard(model, "*.up")
    assert model.bfloat16().layers[0].up.table.dtype == torch.bfloat16
    assert list(model.layers[0].up._parameters) == ["weight", "bias"]
    assert model(ranks.inputs(0).bfloat16()).dtype == torch.bfloat16


def lend_weights(rank, size):
    model = sharding.shard(ranks.stack(), "layers.*", scope="block", transport="shm:copy")
    own, x = dict(ranks.stack(seed=5).named_parameters()), ranks.inputs(rank)
    one = {"layers.1.up.weight": own["layers.1.up.weight"]}
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(torch.func.functional_call(model, own, (x,)), ranks.stack(seed=5)(x))
            want = torch.func.functional_call(ranks.stack(), one, (x,))
            for call in (torch.func.functional_call, torch.nn.utils.stateless.functional_call):
                assert torch.equal(call(model, one, (x,)), want)
            assert torch.equal(model(x), ranks.stack()(x))


@pytest.mark.filterwarnings("ignore")  # of the older one's
def test_functional_call_runs_the_callers_weights():
    ranks.run(2, lend_weights)


def traced_before(rank, size, trace, caplog):
    model, x = ranks.stack(), ranks.inputs(rank)
    traced, copied = trace(model, x), trace(copy.deepcopy(model), x)
    caplog.clear()
    sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
    with torch.inference_mode():
        assert torch.equal(copied(x), model(x))
        with pytest.raises(sharding.CheckFailed):
            sharding.check(model, x, call=traced)
    return caplog.text


def exported(model, x):
    """A program that is no module until it is run, packed or saved."""
    program = torch.export.export(model, (x,))
    return lambda x: program.module()(x)


TRACERS = {
    "export": exported,
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "jit": lambda model, x: torch.jit.trace(model, (x,)),
}


@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
@pytest.mark.filterwarnings("ignore")
def test_what_was_traced_before_is_told(trace, caplog):
    caplog.set_level(logging.WARNING, "layershard")
    for text in ranks.run(2, traced_before, trace, caplog):
        assert text.count("outside of the model") == 1 and "layers." in text


@dataclasses.dataclass
class Unhashable(torch.nn.Module):
    weight: object = None


def beside_strangers(rank, size):
    """What else the process holds is none of shard's business, however strange."""
    strangers = [object.__new__(Unhashable), Unhashable(), torch.fx.GraphModule.__new__(torch.fx.GraphModule)]
    strangers.append(torch.jit.RecursiveScriptModule.__new__(torch.jit.RecursiveScriptModule))
    model = sharding.shard(ranks.stack(), "*.up", transport="shm:copy")
    holder = torch.nn.Linear(2, 2)
    holder.weight = torch.nn.Parameter(torch.ones(2, 2))
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    scripted.add_module("0", torch.jit.script(torch.nn.Linear(2, 2)))
    return len(strangers) == 4 and torch.equal(model(ranks.inputs(rank)), ranks.stack()(ranks.inputs(rank)))


@pytest.mark.filterwarnings("ignore")
def test_strange_modules_elsewhere_are_none_of_its_business():
    with torch.no_grad():
        assert ranks.run(2, beside_strangers) == [True] * 2


def test_a_compiled_block_is_no_module_that_is_never_called():
    model = ranks.stack()
    model.layers[0] = torch.compile(model.layers[0])
    with pytest.raises(sharding.Refused, match=r"layers\.0\._orig_mod"):
        sharding.shard(model, "layers.*")


def test_a_model_round_a_sharded_one():
    def work(rank, size):
        class Pair(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = ranks.stack(), ranks.stack(seed=2)

            def forward(self, x):
                return self.one(x) + self.two(x)

        pair, x = Pair().eval(), ranks.inputs(rank)
        sharding.shard(pair.one, "layers.*", transport="shm:copy")
        sharding.shard(pair, "two.layers.*", transport="shm:copy")
        with torch.inference_mode():
            assert torch.equal(pair(x), ranks.stack()(x) + ranks.stack(seed=2)(x))

    ranks.run(2, work)


def test_operators_are_left_out_of_cuda_graphs():
    """What inductor asks where it decides that: see test_torch_partition."""
    from layershard.torch import ops

    for operator in (ops.arrive, ops.arrive_parts, ops.settle, ops.leave, ops.finish):
        assert torch.Tag.cudagraph_unsafe in operator.tags

# SPDX-License-Identifier: Apache-2.0
"""A handle's own calls and passes of its model take turns: what comes second is refused, what was first is right."""

import concurrent.futures
import sys
import threading

import pytest
from patience import LONG_S

import layershard
import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

IN_A_PASS = "in thread 'MainThread' while thread 'user_0' is in a pass of the model"

# What compiling imports, seconds of it, is there when ranks are forked.
with torch.no_grad():
    torch.compile(torch.nn.ReLU(), backend="eager")(torch.ones(1))
torch.compiler.reset()


def a_thread():
    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="user")


def compute(model, x):
    with torch.inference_mode():
        return model(x)


def update(model):
    with sharding.of(model).update():
        for parameter in model.layers.parameters():
            parameter.fill_(7)


CALLS = {
    "gathered": lambda model: sharding.of(model).state_dict(),
    "verify": lambda model: sharding.of(model).verify(),
    "check": lambda model: sharding.check(model, torch.ones(2, 8)),
    "detach": lambda model: sharding.of(model).detach(),
    "update": update,
    "fill": lambda model: sharding.fill(model, lambda name, tensor: torch.ones_like(tensor)),
}


class Rest:
    """with it: a pass in another thread rests in a module, the first time that it runs."""

    def __init__(self, module, run, x):
        self.reached, self.go = threading.Event(), threading.Event()
        self.hook = module.register_forward_hook(self)
        self.pool, self.run, self.x = a_thread(), run, x

    def __call__(self, *_args):
        if not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(LONG_S)

    def __enter__(self):
        self.result = self.pool.submit(compute, self.run, self.x)
        assert self.reached.wait(LONG_S)
        return self

    def __exit__(self, *_error):
        self.go.set()
        self.pool.shutdown()
        self.hook.remove()


def one_and_reference(rank, transport="shm:copy", **options):
    x = ranks.inputs(rank)
    want = compute(ranks.stack(), x)
    return sharding.shard(ranks.stack(), "layers.*", scope="block", transport=transport, **options), x, want


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_call_is_refused_while_another_thread_is_in_a_pass(prefetch):
    def work(rank, size):
        model, x, want = one_and_reference(rank, prefetch=prefetch)
        for place in ("layers.2.up", "layers.3"):
            for call in CALLS.values():
                with Rest(model.get_submodule(place), model, x) as rest, pytest.raises(sharding.Refused, match="Lock"):
                    call(model)
                assert torch.equal(rest.result.result(LONG_S), want)
        assert torch.equal(compute(model, x), want)
        state = sharding.of(model).state_dict()
        assert torch.equal(state["layers.3.up.weight"], ranks.stack().layers[3].up.weight)
        update(model)
        assert not torch.equal(compute(model, x), want)

    ranks.run(2, work)


@pytest.mark.parametrize("transport,names", [("shm", ["update", "fill"]), ("shm:copy", ["verify", "check", "update"])])
def test_a_collective_call_is_refused_on_all_ranks_for_a_pass_on_one(transport, names):
    def work(rank, size):
        model, x, want = one_and_reference(rank, transport)
        for name in names:
            if rank:
                with pytest.raises((sharding.Refused, layershard.CallbackFailed), match="rank 0.* in layers.2"):
                    CALLS[name](model)
                continue
            with Rest(model.layers[2].up, model, x) as rest:
                with pytest.raises(sharding.Refused, match=f"{name}\\(\\) was called {IN_A_PASS}, in layers.2"):
                    CALLS[name](model)
            assert torch.equal(rest.result.result(LONG_S), want)
        assert torch.equal(compute(model, x), want)
        update(model)
        assert not torch.equal(compute(model, x), want)

    ranks.run(2, work)


@pytest.mark.parametrize("transport,compiles", [("shm", "call"), ("shm", "model"), ("shm:copy", "call")])
def test_an_update_is_refused_while_a_compiled_pass_rests(transport, compiles):
    """Where layers are read in place a compiled program calls nothing of this library's."""

    def work(rank, size):
        model, x, _ = one_and_reference(rank, transport)
        reached, go = threading.Event(), threading.Event()

        class Resting(torch.nn.ReLU):
            @torch.compiler.disable
            def forward(self, x):
                if threading.current_thread().name != "MainThread":
                    reached.set()
                    assert go.wait(LONG_S)
                return super().forward(x)

        model.head = torch.nn.Sequential(Resting(), model.head)
        if compiles == "model":
            model.compile(backend="eager")
        run = torch.compile(model, backend="eager") if compiles == "call" else model
        want = compute(run, x)
        with a_thread() as pool:
            first = pool.submit(compute, run, x)
            assert reached.wait(LONG_S)
            try:
                with pytest.raises(sharding.Refused, match=IN_A_PASS):
                    update(model)
            finally:
                go.set()
            assert torch.equal(first.result(LONG_S), want)
        update(model)
        assert not torch.equal(compute(run, x), want)

    ranks.run(2, work)


@pytest.mark.parametrize("how", ["block", "linear"])
def test_a_call_from_inside_a_module_is_refused_and_between_two_is_right(how):
    def work(rank, size):
        x, want = ranks.inputs(rank), compute(ranks.stack(), ranks.inputs(rank))
        model = sharding.shard(ranks.stack(), ["*.up", "*.down"], scope=how, transport="shm:copy")
        for name in ("gathered", "verify", "detach", "update"):
            hook = model.layers[2].up.register_forward_pre_hook(lambda *_args, call=CALLS[name]: call(model) and None)
            with pytest.raises(sharding.Refused, match=r"from inside layers\.2"):
                compute(model, x)
            hook.remove()

        def forward(x):
            x = model.embed(x)
            for layer in model.layers:
                x = layer(x)
                sharding.of(model).verify()
                sharding.of(model).state_dict()
            return model.head(x)

        assert torch.equal(compute(model, x), want)
        model.forward = forward
        assert torch.equal(compute(model, x), want)

    ranks.run(2, work)


def test_a_pass_that_begins_beside_a_call_is_refused():
    def work(rank, size):
        model, x, want = one_and_reference(rank)
        handle, shared = sharding.of(model), sharding.of(model).shared[0]
        reached, go, gathered = threading.Event(), threading.Event(), shared.gathered

        def rests(layer, stream):
            reached.set()
            assert go.wait(LONG_S)
            return gathered(layer, stream)

        for run in (model, model.layers[3], torch.compile(model, backend="eager")):
            assert torch.equal(compute(model, x), want)
            shared.gathered = rests
            with a_thread() as pool:
                state = pool.submit(handle.state_dict)
                assert reached.wait(LONG_S)
                try:
                    with pytest.raises(sharding.Refused, match=r"thread 'user_0' makes state_dict\(\)"):
                        compute(run, torch.ones(2, 37) if run is model.layers[3] else x)
                    with pytest.raises(sharding.Refused, match=r"while thread 'user_0' makes state_dict\(\)"):
                        handle.state_dict()
                finally:
                    go.set()
                assert torch.equal(state.result(LONG_S)["layers.1.up.weight"], ranks.stack().layers[1].up.weight)
            shared.gathered = gathered
            reached.clear(), go.clear()

    ranks.run(2, work)


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_what_needs_no_window_is_made_beside_passes(transport):
    def work(rank, size):
        model, x, want = one_and_reference(rank, transport)
        handle, reference = sharding.of(model), ranks.stack().state_dict()
        kinds = ["sharded"] if transport == "shm:copy" else ["sharded", "gathered"]
        with Rest(model.layers[2].up, model, x) as rest:
            for kind in kinds:
                state = handle.state_dict(kind)
                assert all(torch.equal(tensor, reference[name]) for name, tensor in state.items())
            handle.report()
            if transport == "shm":
                handle.verify()
                assert torch.equal(compute(model, x), want)
        assert torch.equal(rest.result.result(LONG_S), want)

    ranks.run(2, work)


def test_no_pass_is_wrong_whenever_threads_change():
    def work(rank, size):
        model, x, want = one_and_reference(rank, prefetch=0)
        sys.setswitchinterval(1e-5)
        stop, right, refused = threading.Event(), [], 0

        def save():
            while not stop.is_set():
                try:
                    sharding.of(model).state_dict()
                except sharding.Refused:
                    pass

        with a_thread() as pool:
            saving = pool.submit(save)
            for _ in range(300):
                try:
                    right.append(torch.equal(compute(model, x), want))
                except sharding.Refused:
                    refused += 1
            stop.set()
            assert saving.result(LONG_S) is None
        assert all(right) and len(right) + refused == 300
        assert torch.equal(compute(model, x), want)

    ranks.run(2, work)

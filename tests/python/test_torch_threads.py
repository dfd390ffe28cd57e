# SPDX-License-Identifier: Apache-2.0
"""Two passes of one model at once: the second is refused, the first goes on and is right; in turn, any threads may."""

import concurrent.futures
import gc
import os
import sys
import threading
import time

import pytest
from patience import LONG_S

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

LINEARS = {"modules": ["*.up", "*.down"], "scope": "linear"}
BLOCKS = {"modules": ["*.up", "*.down"], "scope": "block"}


def threads(n=2):
    return concurrent.futures.ThreadPoolExecutor(n, thread_name_prefix="user")


# What compiling imports, seconds of it, is there when ranks are forked.
with torch.no_grad():
    torch.compile(torch.nn.ReLU(), backend="eager")(torch.ones(1))
torch.compiler.reset()


class Pause:
    """with it: of the first thread that comes here, until it is let go, by an error at the latest."""

    def __init__(self):
        self.reached, self.go, self.used = threading.Event(), threading.Event(), False

    def __enter__(self):
        assert self.reached.wait(LONG_S)

    def __exit__(self, *_error):
        self.go.set()

    def __call__(self, *_args):
        if not self.used:
            self.used = True
            self.reached.set()
            assert self.go.wait(LONG_S)


def compute(model, x):
    with torch.inference_mode():
        return model(x)


def by_blocks(model):
    def run(x):
        x = model.embed(x)
        for layer in model.layers:
            x = layer(x)
        return model.head(x)

    return run


def both_at_once(model, x, want):
    meeting = threading.Barrier(2, timeout=LONG_S)

    def meet(*_args):
        meeting.wait()

    model.layers[2].register_forward_hook(meet)
    with threads() as pool:
        for each in concurrent.futures.as_completed([pool.submit(compute, model, x) for _ in range(2)]):
            if each.exception() is not None:
                meeting.abort()
            assert torch.equal(each.result(), want)


def second_refused(pool, run, pause, x, want):
    first = pool.submit(compute, run, x)
    with pause, pytest.raises(sharding.Refused, match="'user_1' began a pass .* in thread 'user_0'.*Lock"):
        pool.submit(compute, run, x).result(LONG_S)
    assert torch.equal(first.result(LONG_S), want)
    for _ in range(2):
        assert torch.equal(pool.submit(compute, run, x).result(LONG_S), want)
        assert torch.equal(compute(run, x), want)


@pytest.mark.parametrize("how", [LINEARS, BLOCKS], ids=["linear", "block"])
def test_the_second_pass_is_refused(how):
    def work(rank, size):
        x, want = ranks.inputs(rank), compute(ranks.stack(), ranks.inputs(rank))
        for place in ("embed", "layers.2", "layers.2.down", "layers.4.norm"):
            model = sharding.shard(ranks.stack(), **how, transport="shm:copy")
            pause = Pause()
            model.get_submodule(place).register_forward_hook(pause)
            with threads() as pool:
                second_refused(pool, model, pause, x, want)

    ranks.run(2, work)


@pytest.mark.parametrize("how", [LINEARS, BLOCKS], ids=["linear", "block"])
def test_blocks_that_the_program_calls(how):
    def work(rank, size):
        x, want = ranks.inputs(rank), compute(ranks.stack(), ranks.inputs(rank))
        model = sharding.shard(ranks.stack(), **how, transport="shm:copy")
        pause = Pause()
        model.layers[3].up.register_forward_hook(pause)
        run = by_blocks(model)
        with threads() as pool:
            first = pool.submit(compute, run, x)
            with pause:
                for late in (run, model, model.layers[3], model.layers[0]):
                    with pytest.raises(sharding.Refused, match="in thread 'user_0'"):
                        compute(late, x if late in (run, model) else torch.ones(2, 37))
            assert torch.equal(first.result(LONG_S), want)

    ranks.run(2, work)


def test_after_an_exception_the_model_is_free():
    def work(rank, size):
        x, want = ranks.inputs(rank), compute(ranks.stack(), ranks.inputs(rank))
        model = sharding.shard(ranks.stack(), **LINEARS, transport="shm:copy")
        with threads() as pool:
            for error in (ValueError, KeyboardInterrupt):

                def fail(*_args, error=error):
                    raise error

                hook = model.layers[2].down.register_forward_pre_hook(fail)
                with pytest.raises(error):
                    pool.submit(compute, model, x).result(LONG_S)
                hook.remove()
                assert torch.equal(compute(model, x), want)
                assert torch.equal(pool.submit(compute, model, x).result(LONG_S), want)

    ranks.run(2, work)


def test_passes_that_move_between_threads():
    def work(rank, size):
        x, want = ranks.inputs(rank), compute(ranks.stack(), ranks.inputs(rank))
        for how in (LINEARS, BLOCKS):
            model = sharding.shard(ranks.stack(), **how, transport="shm:copy")
            with threads() as pool:

                def forward(x, model=model, pool=pool):
                    x = model.embed(x)
                    for layer in model.layers:
                        x = pool.submit(compute, layer, x).result(LONG_S)
                    return model.head(x)

                assert torch.equal(compute(forward, x), want)
                model.forward = forward  # the pass waits in its own thread
                for _ in range(2):
                    assert torch.equal(compute(model, x), want)

    ranks.run(2, work)


def test_a_pass_that_rests_in_a_generator():
    def work(rank, size):
        x, want = ranks.inputs(rank), compute(ranks.stack(), ranks.inputs(rank))
        model = sharding.shard(ranks.stack().requires_grad_(False), **BLOCKS, transport="shm:copy")

        def steps():
            y = model.embed(x)
            for layer in model.layers:
                y = layer(y)
                yield model.head(y)

        with threads() as pool:
            running = steps()
            pool.submit(next, running).result(LONG_S)
            assert torch.equal(compute(model, x), want)
            *_, last = running
            assert torch.equal(last, want)

    ranks.run(2, work)


class Experts(torch.nn.Module):
    """Each in a thread of its own."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        with threads() as pool:
            return sum(pool.map(lambda expert: compute(expert, x), self.experts))


def test_threads_of_one_pass():
    def work(rank, size):
        torch.manual_seed(1)
        want = torch.nn.Sequential(*(Experts() for _ in range(4)))
        torch.manual_seed(1)
        model = torch.nn.Sequential(*(Experts() for _ in range(4)))
        sharding.shard(model, "*.experts.*", transport="shm:copy")
        for _ in range(3):
            assert torch.equal(compute(model, ranks.inputs(rank)), compute(want, ranks.inputs(rank)))

    ranks.run(2, work)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Half() for _ in range(4))
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x):
        for layer in self.layers:
            x = self.norm(layer(x))
        return x


class Half(torch.nn.Module):
    """The first of its linears in a thread of its own."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        with threads(1) as pool:
            return self.down(pool.submit(compute, self.up, x).result(LONG_S))


class Encoders(torch.nn.Module):
    """Each in a thread of its own, while the pass waits."""

    def __init__(self, names):
        super().__init__()
        torch.manual_seed(1)
        for name in names:
            self.add_module(name, Encoder())

    def forward(self, x):
        with threads() as pool:
            return sum(pool.map(lambda encoder: compute(encoder, x), self.children()))


@pytest.mark.parametrize("scope", ["linear", "block"])
def test_threads_of_one_pass_in_which_passes_can_begin(scope):
    def work(rank, size):
        x = ranks.inputs(rank)[:, :8]
        for names in (["text"], ["text", "image"]):
            model, want = Encoders(names), compute(Encoders(names), x)
            chosen = [f"{name}.layers.*.{part}" for name in names for part in ("up", "down")]
            sharding.shard(model, chosen, scope=scope, transport="shm:copy")
            for _ in range(3):
                assert torch.equal(compute(model, x), want)

    ranks.run(2, work)


@pytest.mark.parametrize("place", ["norm", "layers.2", "layers.2.up"])
def test_passes_that_begin_in_different_modules(place):
    def work(rank, size):
        x = ranks.inputs(rank)[:, :8]
        model, want = Encoders(["text"]), compute(Encoders(["text"]), x)
        sharding.shard(model, **LINEARS, transport="shm:copy")
        pause, encoder = Pause(), model.text
        encoder.get_submodule(place).register_forward_hook(pause)
        with threads() as pool:
            first = pool.submit(compute, model, x)
            with pause, pytest.raises(sharding.Refused, match="'MainThread' began a pass"):
                compute(encoder, x)
            assert torch.equal(first.result(LONG_S), want)
            assert torch.equal(compute(encoder, x), want)

    ranks.run(2, work)


def test_a_block_reaches_what_another_thread_reads():
    """The block itself waits for nothing; its linears do, and one of them runs by itself."""

    def work(rank, size):
        x = ranks.inputs(rank)
        model, want = ranks.stack(), compute(ranks.stack(), x)
        h = model.embed(x).detach()
        alone = compute(model.layers[3].up, h)
        sharding.shard(model, **LINEARS, transport="shm:copy")
        for _ in range(2):
            pause = Pause()
            hook = model.layers[3].up.register_forward_pre_hook(pause)
            with threads() as pool:
                first = pool.submit(compute, model.layers[3].up, h)
                with pause, pytest.raises(sharding.Refused, match="in thread 'user_0'"):
                    compute(model, x)
                assert torch.equal(first.result(LONG_S), alone)
            hook.remove()
            assert torch.equal(compute(model, x), want)

    ranks.run(2, work)


def test_modules_that_threads_call_without_their_block():
    """The window is held by the layer that was there last: the words are those of other refusals, not the library's."""

    def work(rank, size):
        x = ranks.inputs(rank)
        model, want = ranks.stack(), compute(ranks.stack(), x)
        h = model.embed(x).detach()
        sharding.shard(model, **LINEARS, transport="shm:copy", prefetch=0)
        early, late = model.layers[3 + rank], model.layers[1 - rank].up  # of the other rank
        with threads() as pool:
            for run in (late, torch.compile(late, backend="eager", fullgraph=True)):
                pool.submit(compute, early, h).result(LONG_S)
                with pytest.raises(sharding.Refused, match=r"layers\.\d\.up was called .*Call the block.*Lock"):
                    compute(run, h)
                assert torch.equal(compute(model, x), want)

    ranks.run(2, work)


def test_nothing_is_wrong_whenever_threads_change():
    """Also in a garbage collection, while stacks are read."""

    def loop(call, want, end, outcomes):
        while time.monotonic() < end:
            try:
                outcomes.append(torch.equal(call(), want))
            except sharding.Refused:
                pass

    def work(rank, size):
        x = ranks.inputs(rank)
        model, want = ranks.stack(), compute(ranks.stack(), x)
        h = model.embed(x).detach()
        alone = compute(model.layers[3], h)
        sharding.shard(model, **LINEARS, transport="shm:copy")
        sys.setswitchinterval(1e-5)
        gc.callbacks.append(lambda *_args: time.sleep(0))
        gc.set_threshold(20)
        outcomes, end = [], time.monotonic() + 2
        with threads() as pool:
            running = [
                pool.submit(loop, lambda: compute(model, x), want, end, outcomes),
                pool.submit(loop, lambda: compute(model.layers[3], h), alone, end, outcomes),
            ]
        assert [each.result() for each in running] == [None, None] and outcomes and all(outcomes)
        assert gc.isenabled() and torch.equal(compute(model, x), want)

    ranks.run(2, work)


def test_where_layers_are_read_in_place():
    def work(rank, size):
        x, want = ranks.inputs(rank), compute(ranks.stack(), ranks.inputs(rank))
        model = sharding.shard(ranks.stack(), **LINEARS, transport="shm")
        both_at_once(model, x, want)

    ranks.run(2, work)


def test_detached_models_have_no_turns():
    def work(rank, size):
        x, want = ranks.inputs(rank), compute(ranks.stack(), ranks.inputs(rank))
        model = sharding.shard(ranks.stack(), **LINEARS, transport="shm:copy")
        compute(model, x)
        sharding.of(model).detach()
        assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())
        both_at_once(model, x, want)

    ranks.run(2, work)


_pauses = []


@torch.library.custom_op("layershard_test::pause", mutates_args=())
def paused(x: torch.Tensor) -> torch.Tensor:
    _pauses[0]()
    return x.clone()


@paused.register_fake
def _(x):
    return torch.empty_like(x)


class Pausing(torch.nn.Linear):
    def forward(self, x):
        return paused(super().forward(x))


def test_compiled():
    def work(rank, size):
        x = ranks.inputs(rank)
        model = ranks.stack()
        model.layers[2].up.__class__ = Pausing
        pause = Pause()
        _pauses[:] = [lambda: None]
        want = compute(model, x)
        sharding.shard(model, **LINEARS, transport="shm:copy")
        run = torch.compile(model, backend="eager", fullgraph=True)
        compute(run, x)
        _pauses[:] = [pause]
        with threads() as pool:
            first = pool.submit(compute, run, x)
            with pause:
                for late in (run, model, model.layers[2]):
                    with pytest.raises(sharding.Refused, match="in thread 'user_0'"):
                        compute(late, torch.ones(2, 37) if late is model.layers[2] else x)
            assert torch.allclose(first.result(LONG_S), want)
        assert torch.allclose(compute(run, x), want) and torch.allclose(compute(model, x), want)

    ranks.run(2, work)


def test_compiled_programs_of_two_models():
    """They share code, and a program's frame lies where the other model's lay before."""

    def work(rank, size):
        x, models, programs = ranks.inputs(rank), [], []
        _pauses[:] = [lambda: None]
        for _ in range(2):
            model = ranks.stack()
            model.layers[2].up.__class__ = Pausing
            want = compute(model, x)
            os.environ["LAYERSHARD_JOB"] += "-next"
            models.append(sharding.shard(model, **LINEARS, transport="shm:copy"))
            programs.append(torch.compile(model, backend="eager", fullgraph=True))
            compute(programs[-1], x)
        for _ in range(3):
            with threads() as pool:
                _pauses[:] = [lambda: None]
                pool.submit(compute, programs[0], x).result(LONG_S)
                pause = Pause()
                _pauses[:] = [pause]
                first = pool.submit(compute, programs[1], x)
                with pause:
                    assert torch.allclose(compute(programs[0], x), want)
                    with pytest.raises(sharding.Refused, match="in thread 'user_0'"):
                        compute(programs[1], x)
                assert torch.allclose(first.result(LONG_S), want)

    ranks.run(2, work)

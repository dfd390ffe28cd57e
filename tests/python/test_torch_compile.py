# SPDX-License-Identifier: Apache-2.0
"""Sharded models under torch.compile: no graph break, no recompilation after warm-up, no copy of a weight, the same
results; compiled before sharding or after; and what would keep a program for later is refused or checked."""

import logging

import pytest
from test_torch_engine import serve
from test_torch_parts import scaled

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

# What compiling imports, seconds of it, is there when ranks are forked.
with torch.no_grad():
    torch.compile(torch.nn.ReLU(), backend="aot_eager")(torch.ones(1))
torch.compiler.reset()

LINEARS = {"modules": ["*.up", "*.down"]}
BLOCKS = {"modules": "layers.*", "scope": "block", "buffers": "*"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where inductor keeps what it has made: the precompiled header above all."""
    return str(tmp_path_factory.mktemp("made"))


def steady(rank, size, how, parts, whole, backend, folder=None):
    import torch._dynamo as dynamo

    if folder is not None:
        ranks.quick_inductor(folder)

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
    ranks.run(2, steady, how, parts, whole, "eager")


@pytest.mark.parametrize("how, parts", [(LINEARS, ("up", "down")), (BLOCKS, ("norm", "up", "down", "scale"))])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_compiled_by_inductor(how, parts, whole, made):
    ranks.run(2, steady, how, parts, whole, "inductor", made)


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_backends_that_copy_weights_are_refused(backend):
    """They would write the copies back, over bytes of another layer or into memory that is read-only."""

    def work(rank, size):
        model, x = ranks.stack(), ranks.inputs(rank)
        with torch.no_grad():
            want = model(x)
            sharding.shard(model, "*.up", transport="shm:copy")
            with pytest.raises(sharding.Refused, match="aot_eager"):
                torch.compile(model, backend=backend)(x)
            assert torch.equal(model(x), want)

    ranks.run(2, work)


def test_freezing_is_refused_when_compiling():
    def work(rank, size):
        import torch._inductor.config as inductor

        model = sharding.shard(ranks.stack(n_layers=2), "*.up", transport="shm:copy")
        with torch.no_grad(), inductor.patch(freezing=True), pytest.raises(Exception, match="freezing is on"):
            torch.compile(model, fullgraph=True, backend="eager")(ranks.inputs(rank))

    ranks.run(2, work)


def peak_bytes(run):
    """What torch has allocated at most while it ran."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def frugal(rank, size, how, folder):
    ranks.quick_inductor(folder)
    model, inputs = ranks.stack(n_layers=4, width=200), [ranks.inputs(rank, rows) for rows in (3, 5, 7)]
    with torch.inference_mode():
        wants = [model(x) for x in inputs]
        sharding.shard(model, **how, transport="shm:copy")
        run = torch.compile(model, fullgraph=True, dynamic=True)
        run(inputs[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for x, want in zip(inputs, wants, strict=True):
                assert torch.allclose(run(x), want, atol=1e-5)
        assert 0 < peak_bytes(lambda: run(inputs[0])) < model.layers[0].down.weight.nbytes / 2


@pytest.mark.parametrize("how", [LINEARS, BLOCKS], ids=["linears", "blocks"])
def test_weights_are_not_copied_and_rows_may_differ(how, made):
    ranks.run(2, frugal, how, made)


# ---- Compiled first ----


def by_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def in_place(model):
    model.compile(backend="eager")
    return model


def by_layers(model):
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


def in_a_function(model):
    return torch.compile(lambda x: 1 * model(x), backend="eager")


def wrapped(model):
    return torch.compile(model, backend="eager")


SPELLINGS = [by_forward, in_place, by_layers, in_a_function, wrapped]


def compiled_first(rank, size, spelling, how):
    """One compiled program through a model's whole life."""
    model, x, said = ranks.stack(), ranks.inputs(rank), []
    handler = logging.Handler()
    handler.addFilter(lambda record: "saves nothing" not in record.getMessage())  # as is true of a model so small
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("layershard").addHandler(handler)
    logging.getLogger("layershard").setLevel(logging.INFO)
    with torch.no_grad():
        want = model(x)
        sharding.shard(model, **how, transport="shm:copy")
        sharding.of(model).detach()
        assert said == []  # nothing was compiled
        run = spelling(model)
        assert torch.allclose(run(x), want, atol=1e-5)
        for _ in range(2):
            given = run if spelling is wrapped else model
            assert sharding.shard(given, **how, transport="shm:copy") is given
            for _ in range(2):
                assert torch.allclose(run(x), want, atol=1e-5)
            handle = sharding.of(given)
            assert {stats.waits for stats in handle.stats().values()} == {2 * len(model.layers)}
            assert handle.detach() is model
            assert torch.allclose(run(x), want, atol=1e-5)
        assert len(said) == 4 and all("torch.compiler.reset()" in each for each in said)


@pytest.mark.parametrize("how", [LINEARS, BLOCKS], ids=["linears", "blocks"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_was_compiled_before_is_compiled_anew(spelling, how):
    ranks.run(2, compiled_first, spelling, how)


# ---- Kept for later ----


def kept_by(maker, name):
    def work(rank, size):
        model, x = ranks.stack(), ranks.inputs(rank)
        with torch.no_grad():
            want = model(x)
            sharding.shard(model, **BLOCKS, transport="shm:copy")
            with pytest.raises(Exception, match=f"{name} makes a program .*detach"):
                maker(model, x)
            assert torch.equal(model(x), want)
            maker(sharding.of(model).detach(), x)

    ranks.run(2, work)


def test_export_is_refused():
    kept_by(lambda model, x: torch.export.export(model, (x,)), "torch.export")


def test_strict_export_is_refused():
    kept_by(lambda model, x: torch.export.export(model, (x,), strict=True), "torch.export")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_is_refused():
    kept_by(lambda model, x: torch.jit.trace(model, x), "torch.jit.trace")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_is_refused():
    kept_by(lambda model, x: torch.jit.script(model), "torch.jit.script")


def test_symbolic_trace_is_refused():
    kept_by(lambda model, x: torch.fx.symbolic_trace(model), "torch.fx.symbolic_trace")


def test_symbolic_trace_of_one_block_is_refused():
    """torch.fx leaves out the hooks of what it is given itself."""

    def work(rank, size):
        model = ranks.stack()
        with torch.no_grad():
            sharding.shard(model, **BLOCKS, transport="shm:copy")
            block, x = model.layers[1], torch.ones(1, 37)
            want = block(x)
            with pytest.raises(sharding.Refused, match=r"torch.fx.symbolic_trace makes a program .*detach"):
                torch.fx.symbolic_trace(block)
            assert "Block(" in repr(model) and torch.equal(block(x), want)
            sharding.of(model).detach()
            assert torch.equal(torch.fx.symbolic_trace(block)(x), want)

    ranks.run(2, work)


def packaged(model, x):
    """A package as another process would load it, made with as little work as can be."""
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), inductor_configs=options)
    return torch._inductor.aoti_load_package(path)


def packed(rank, size, folder):
    ranks.quick_inductor(folder)
    model, x = ranks.stack(n_layers=3, width=5).requires_grad_(False), ranks.inputs(rank)
    programs = {}
    with torch.no_grad():
        want = model(x)
        if rank == 0:
            programs["before"] = packaged(model, x)
        patient = {"timeout_ms": int(1000 * ranks.DEADLINE_S)}  # the other rank waits for a compiler
        sharding.shard(model, **BLOCKS, transport="shm:copy", **patient)
        with pytest.raises(Exception, match="torch.export makes a program .*detach"):
            packaged(model, x)
        for _ in range(3):
            assert all(torch.allclose(program(x), model(x), atol=1e-6) for program in programs.values())
            assert torch.equal(model(x), want)
        sharding.of(model).detach()
        if rank == 0:
            programs["after"] = packaged(model, x)
    assert all(torch.allclose(program(x), want, atol=1e-6) for program in programs.values())
    return len(programs)


def test_packages_of_aot_inductor_are_right_or_refused(made):
    assert ranks.run(2, packed, made) == [2, 0]


def named_inputs(model, x):
    """By identity: what a graph is given."""
    names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return {**names, id(sharding.of(model).token): "token", id(x): "x"}


def keep(rank, size):
    """A graph's text and the names of its inputs, as an engine may keep them."""
    model, x, kept = ranks.stack(), ranks.inputs(rank), []

    def backend(graph, inputs):
        names = named_inputs(model, x)
        kept.append((graph.code, [names[id(each)] for each in inputs]))
        return graph

    with torch.no_grad():
        sharding.shard(model, **BLOCKS, transport="shm:copy")
        torch.compile(model, fullgraph=True, backend=backend)(x)
    (one,) = kept
    return one


def run_kept(rank, size, kept):
    elsewhere = [torch.zeros(1) for _ in range(10)]  # addresses are not those of the other process
    code, names = kept[rank]
    defined = {"torch": torch, "device": torch.device, "inf": float("inf"), "nan": float("nan")}
    exec(code, defined)
    model, x = ranks.stack(seed=2), ranks.inputs(rank)

    def run(model, **others):
        given = {**dict(model.named_parameters()), **dict(model.named_buffers()), "x": x, **others}
        return defined["forward"](None, *(given[name] for name in names))[0]

    with torch.no_grad():
        want = model(x)
        sharding.shard(model, **BLOCKS, transport="shm:copy")
        token = sharding.of(model).token
        for _ in range(3):
            assert torch.allclose(run(model, token=token), want, atol=1e-5)
        with pytest.raises(sharding.Refused, match="compile it again"):
            run(model, token=elsewhere[0])
        with pytest.raises(sharding.Refused, match="other weights"):
            run(ranks.stack(), token=token)
        sharding.of(model).detach()
        with pytest.raises(sharding.Refused, match="compile it again"):
            run(model, token=token)
        others = [sharding.shard(ranks.stack(seed=seed), **BLOCKS, transport="shm:copy") for seed in (3, 4)]
        for other, beside in (others, reversed(others)):
            assert torch.allclose(run(other, token=sharding.of(other).token), other(x), atol=1e-5)
            with pytest.raises(sharding.Refused, match="other weights"):
                run(beside, token=sharding.of(other).token)
        halves = {"modules": ["*.up", "*.down"], "scope": "block"}  # of the same shapes
        names = [name.replace("layers.4.", "layers.3.") for name in names]  # which every one of them has
        for other, how in ((ranks.stack(width=36), BLOCKS), (ranks.stack(n_layers=4), BLOCKS), (ranks.stack(), halves)):
            sharding.shard(other, **how, transport="shm:copy")
            with pytest.raises(sharding.Refused, match="compile it again"):
                run(other, token=sharding.of(other).token)


def test_a_graph_of_another_process_runs_the_model_it_is_given_or_raises():
    ranks.run(2, run_kept, ranks.run(2, keep))


def cached(rank, size, folder):
    """How often a graph came from inductor's cache."""
    from torch._dynamo.utils import counters

    ranks.quick_inductor(folder)
    model, x = ranks.stack(seed=3, width=5), ranks.inputs(rank)
    with torch.inference_mode():
        want = model(x)
        sharding.shard(model, **BLOCKS, transport="shm:copy")
        run = torch.compile(model, fullgraph=True)
        for _ in range(3):
            assert torch.allclose(run(x), want, atol=1e-5)
    return counters["inductor"]["fxgraph_cache_hit"]


def test_a_graph_from_inductor_s_cache_runs_this_process_s_model(made):
    ranks.run(2, cached, made)
    assert ranks.run(2, cached, made) == [1, 1]


def test_a_pass_that_ends_in_join_and_begins_in_prepare(made):
    """What a captured region does, without a device to capture on."""

    def work(rank, size):
        ranks.quick_inductor(made)
        model, x = ranks.stack(), ranks.inputs(rank)
        with torch.no_grad():
            want = model(x)
            sharding.shard(model, "*.up", transport="shm:copy")
            handle = sharding.of(model)

            def step(x):
                y = model(x)
                handle.join(y)
                return y

            run = torch.compile(step, fullgraph=True, backend="inductor")
            for _ in range(3):
                handle.prepare()
                assert torch.allclose(run(x), want, atol=1e-5)
            assert torch.equal(step(x), want)

    ranks.run(2, work)


def test_an_engines_own_modules(tmp_path):
    """By public names alone; in eager mode and by backend "eager" see test_torch_engine."""
    ranks.run(2, serve, "shm:copy", "inductor", tmp_path)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_weights_that_wrap_others_are_compiled_by_backend_eager_alone(backend):
    def work(rank, size):
        model = sharding.shard(scaled(), **BLOCKS, transport="shm:copy")
        with torch.no_grad():
            with pytest.raises(Exception, match="wrap other tensors.* cannot be compiled by this backend"):
                torch.compile(model, backend=backend)(ranks.inputs(rank))
            assert torch.equal(model(ranks.inputs(rank)), scaled()(ranks.inputs(rank)))

    ranks.run(2, work)

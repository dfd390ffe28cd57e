# SPDX-License-Identifier: Apache-2.0
"""layershard.torch.check: programs that read weights at the wrong time, or write them, are told where."""

import contextlib
import ctypes
import os
import random
import re

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

with contextlib.suppress(ImportError):  # seconds of imports, before ranks are forked
    from transformers import DynamicCache, LlamaForCausalLM  # noqa: F401

LINEARS = {"modules": ["*.up", "*.down"]}
BLOCKS = {"modules": "layers.*", "scope": "block"}
AS_USUAL = {"LAYERSHARD_POISON": "0"}


def sharded(model=None, **options):
    return sharding.shard(model or ranks.stack(), **{"transport": "shm:copy", **BLOCKS, **options})


def run(work, *arguments, size=2, **environment):
    return ranks.run(size, work, *arguments, **{**AS_USUAL, **environment})


def failure(rank, model, **options):
    """The text of what check raises; passes go on after it."""
    with torch.inference_mode(), pytest.raises(sharding.CheckFailed) as caught:
        sharding.check(model, ranks.inputs(rank), **options)
    return str(caught.value)


def same(texts):
    assert len(set(texts)) == 1, texts
    return texts[0]


# ---- What is right ----


def right(rank, size, options):
    model, want, x = sharded(**options), ranks.stack(), ranks.inputs(rank, rows=3 + rank)
    handle = sharding.of(model)
    small = {name: each.window_bytes for name, each in handle.stats().items()}
    with torch.inference_mode():
        for _ in range(2):
            found = sharding.check(model, x)
            assert torch.equal(model(x), want(x))
    assert found.is_equal and found.seen == found.layers == 5 * len(handle.shared), str(found)
    assert not any(each.series.is_poisoned for each in handle.shared)
    assert all(each.window_bytes > small[name] or not each.windows for name, each in handle.stats().items())
    return str(found)


@pytest.mark.parametrize(
    "options",
    [LINEARS, BLOCKS, {**BLOCKS, "placement": "striped"}, {**BLOCKS, "prefetch": 0}],
    ids=["linears", "blocks", "striped", "no prefetch"],
)
def test_a_right_program_is_equal(options):
    assert same(run(right, options)).startswith("equal with poison: ")


def test_layers_that_no_window_brings_are_told():
    def work(rank, size):
        model = sharded(resident="50%")
        with torch.inference_mode():
            found = sharding.check(model, ranks.inputs(rank))
        assert found.is_equal and 0 < found.seen < found.layers == 5
        return str(found)

    assert "the others are read in place, or resident" in same(run(work))


def still(rank, size, options):
    with torch.inference_mode():
        found = sharding.check(sharded(**options), ranks.inputs(rank))
    assert not found.is_equal
    return str(found)


def test_where_nothing_moves_it_says_so():
    assert same(run(still, {"transport": "shm"})).startswith("nothing was compared: no layer is fetched into a window")
    assert same(run(still, {"resident": "all"})).startswith("nothing was compared")
    assert run(still, {}, size=1)[0].startswith("nothing was compared")


def test_a_call_that_uses_no_window_is_not_equal():
    def work(rank, size):
        model = sharded()
        found = sharding.check(model, ranks.inputs(rank), call=model.embed)
        assert not found.is_equal
        return str(found)

    assert "waited for none" in same(run(work))


class Moody(torch.nn.Module):
    """Random numbers of all kinds, a buffer and attributes that count, a cache that is handed over."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(5))
        self.register_buffer("calls", torch.zeros(()))
        self.kept, self.count = [], 0

    def forward(self, x, cache, noise):
        for layer in self.layers:
            x = torch.nn.functional.dropout(layer(x), 0.3)
        self.calls += 1
        self.count += 1
        self.kept.append(x.mean())
        self.late = self.count
        cache["seen"] = cache["seen"] + 1
        x = x * self.calls + self.count + cache["seen"] + sum(self.kept) + random.random()
        return x + torch.rand(8, generator=noise)


def test_state_is_put_back_between_and_after():
    def work(rank, size):
        import numpy

        model = sharded(Moody().eval(), modules="layers.*", scope="linear")
        cache, noise = {"seen": torch.zeros(8)}, torch.Generator().manual_seed(rank)
        before = (torch.get_rng_state(), random.getstate(), noise.get_state())
        call = lambda *given: model(*given) + float(numpy.random.rand())  # noqa: E731
        with torch.inference_mode():
            assert sharding.check(model, torch.ones(8), cache, noise, call=call).is_equal
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        assert torch.equal(noise.get_state(), before[2]) and not cache["seen"].any()
        assert (model.calls.item(), model.count, model.kept, hasattr(model, "late")) == (0, 0, [], False)

    run(work)


def test_generate_and_a_cache_among_the_arguments():
    pytest.importorskip("transformers")

    def work(rank, size):
        import transformers

        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        torch.manual_seed(0)
        model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[5, 7, 11, 2 + rank]])
        greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            want = model.generate(tokens, **greedy)
            sharding.shard(model, "model.layers.*", scope="block", transport="shm:copy")
            assert sharding.check(model, tokens, call=model.generate, **greedy).is_equal
            assert sharding.check(model, tokens, call=model.generate, max_new_tokens=4, do_sample=True).is_equal
            cache = transformers.DynamicCache()
            model(tokens, past_key_values=cache)
            assert sharding.check(model, tokens, past_key_values=cache).is_equal
            assert cache.get_seq_length() == 4
            assert torch.equal(model.generate(tokens, **greedy), want)

    run(work)


def test_over_collectives(tmp_path):
    def work(rank, size, path):
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
        for placement in ("whole", "striped"):
            model = sharded(transport="callback", placement=placement, group=dist.group.WORLD)
            with torch.inference_mode():
                assert sharding.check(model, ranks.inputs(rank)).is_equal
                assert torch.equal(model(ranks.inputs(rank)), ranks.stack()(ranks.inputs(rank)))
            sharding.of(model).close()
        dist.barrier()
        dist.destroy_process_group()

    with pytest.importorskip("layershard").Group(0, 1):  # a copy of it is no rank of a forked child
        run(work, str(tmp_path / "store"))


# ---- What is wrong ----


class Peeking(ranks.Block):
    """Reads a weight of another layer between its own modules."""

    def forward(self, x):
        y = self.up(self.norm(x))
        y = y + self.__dict__["other"][0].up.bias
        return x + self.scale * self.down(torch.relu(y))


def peeking(at=2, of=0):
    model = ranks.stack()
    model.layers[at].__class__ = Peeking
    model.layers[at].__dict__["other"] = (model.layers[of],)
    return model


@pytest.mark.parametrize("how", [LINEARS, BLOCKS], ids=["linears", "blocks"])
@pytest.mark.parametrize("poison", ["0", "1"])
def test_the_module_that_reads_other_weights_is_named(how, poison):
    def work(rank, size):
        model = sharded(peeking(), **how)
        text = failure(rank, model)
        assert all(each.series.is_poisoned == (poison == "1") for each in sharding.of(model).shared)
        return text

    # layers 0 and 2 have one window on rank 1, so that poison cannot tell; rank 0 stores the one
    assert same(run(work, LAYERSHARD_POISON=poison)) == "layers.0.up.bias is read outside its view, in layers.2"


@pytest.mark.parametrize("how", [LINEARS, BLOCKS], ids=["linears", "blocks"])
def test_what_is_read_past_torch_is_found_by_poison(how):
    """Between a module's beginning and its first child: the child begins otherwise, so the module is it."""

    def work(rank, size):
        model = ranks.stack()
        model.layers[2].forward = lambda x: ranks.Block.forward(
            model.layers[2], x + ctypes.c_float.from_address(model.layers[1].up.bias.data_ptr()).value
        )
        return failure(rank, sharded(model, **how))

    text = same(run(work))  # layer 1 is stored on rank 1, and has a window of its own on rank 0
    assert text.startswith("rank 0: weights are read outside their view") and "layers.2 is the first" in text
    assert "rank 1" not in text


def test_what_is_read_outside_of_all_modules_is_told():
    def work(rank, size):
        model = sharded()
        return failure(rank, model, call=lambda x: model(x) + model.layers[1].up.bias.sum())

    text = same(run(work))
    assert text.startswith("layers.1.up.bias is read outside its view, in the call itself; rank 0: ")
    assert "the call, outside of the model's modules" in text


def test_metadata_and_views_are_no_reads_and_layers_read_in_their_turn_are_right():
    def work(rank, size):
        model = ranks.stack()

        def look(layer, args):
            first = model.layers[0].up.weight
            return (args[0].to(first.dtype) + (layer.up.bias.sum() + layer.up.weight.t()[0, 0]) * first.data.dim(),)

        for layer in model.layers:
            layer.register_forward_pre_hook(look)
        with torch.inference_mode():
            return str(sharding.check(sharded(model), ranks.inputs(rank)))

    assert same(run(work)).startswith("equal with poison: 5 of 5")


def test_an_error_that_only_poison_makes_names_its_module():
    def work(rank, size):
        model = ranks.stack()
        for layer in model.layers:
            layer.register_buffer("order", torch.arange(37))
            layer.register_forward_hook(lambda layer, args, output: output[:, model.layers[1].order])
        return failure(rank, sharded(model, buffers="*.order"))

    assert "rank 0: weights are read outside their view" in same(run(work))


def test_what_a_pass_writes_is_named():
    def work(rank, size):
        model = ranks.stack()

        def write(layer, args):
            if rank == 1:
                layer.down.weight.data[0, 0] += 1

        model.layers[3].register_forward_pre_hook(write)
        return failure(rank, sharded(model))

    assert "rank 1: layers.3.down.weight is written by the call" in same(run(work))


def test_written_where_nothing_moves():
    def work(rank, size):
        model = ranks.stack()
        if rank == 0:
            model.layers[2].register_forward_pre_hook(lambda layer, args: layer.norm.bias.data.add_(1))
        return failure(rank, sharded(model, transport="shm"))

    assert same(run(work)) == (
        "rank 0: layers.2.norm.bias is written by the call: what is stored of it is not what it was before"
    )


def test_a_call_that_is_never_the_same_is_not_blamed_on_weights():
    def work(rank, size):
        model, turns = sharded(), iter(range(9))
        return failure(rank, model, call=lambda x: model(x + (next(turns) if rank == 0 else 0)))

    text = same(run(work))
    assert text.startswith("rank 0: the call does not give the same bits twice") and "rank 1" not in text


def test_a_call_that_fails_on_one_rank_is_told_to_all():
    def work(rank, size):
        model = sharded()
        text = failure(rank, model, call=lambda x: model(x if rank == 0 else x[:, :3]))
        with torch.inference_mode():
            assert torch.equal(model(ranks.inputs(rank)), ranks.stack()(ranks.inputs(rank)))
        return text

    assert same(run(work)).startswith("rank 1: the call itself fails, without poison: RuntimeError: ")


def test_a_call_that_is_refused_is_no_failure_of_the_call():
    def work(rank, size):
        model = sharded()
        return failure(rank, model, call=lambda x: model(x) + model.layers[0].norm(model.embed(x)).sum())

    text = same(run(work))
    assert re.match(r"rank \d: the call is refused: Refused: layers\.0\.norm was called without", text)
    assert "scope='linear'" in text


def test_arguments_that_cannot_be_copied_are_refused_on_all():
    def work(rank, size):
        model = sharded()
        extra = {"extra": iter([1])} if rank == 0 else {"extra": (each for each in [1])}
        with pytest.raises(sharding.Refused) as caught:
            sharding.check(model, ranks.inputs(rank), call=lambda x, extra: model(x), **extra)
        return str(caught.value)

    texts = run(work)
    assert "cannot be copied" in texts[1] and texts[0].startswith("rank 1 cannot take part: ")


# ---- Compiled ----


def compiled(rank, size, model, backend):
    model = sharded(model() if model else None)
    with torch.inference_mode():
        step = torch.compile(model, backend=backend)
        try:
            found = str(sharding.check(step, ranks.inputs(rank)))
        except sharding.CheckFailed as error:
            found = str(error)
    return found


def test_compiled():
    assert same(run(compiled, None, "eager")).startswith("equal with poison: 5 of 5")
    assert same(run(compiled, peeking, "eager")) == "layers.0.up.bias is read outside its view, in layers.2"


def late_at(number):
    """A backend that makes one module's weights arrive only when it has computed from them."""

    def backend(graph, inputs):
        kinds = [(str(each.target).split(".")[1:2], each) for each in graph.graph.nodes]
        ends = [place for place, (kind, _) in enumerate(kinds) if kind == ["settle"]]
        begin = max(place for place, (kind, _) in enumerate(kinds[: ends[number]]) if kind == ["arrive"])
        kinds[ends[number]][1].prepend(kinds[begin][1])
        graph.recompile()
        return graph

    return backend


@pytest.mark.parametrize(
    "how, number, name", [(BLOCKS, 2, "layers.2"), ({**LINEARS, "scope": "linear"}, 5, "layers.2.down")]
)
def test_the_compiled_module_that_reads_too_early_is_named(how, number, name):
    def work(rank, size):
        model = sharded(**how, prefetch=0)  # else the layer may have come by luck
        step = torch.compile(model, fullgraph=True, backend=late_at(number))
        with torch.inference_mode():
            step(ranks.inputs(rank))  # the window has been used before
        return failure(rank, model, call=step)

    text = same(run(work))  # layer 2 is stored on rank 0
    assert text.startswith("rank 1: weights are read outside their view: ")
    assert f" {name} is the first to give another result" in text
    assert "rank 0" not in text


def test_a_compiled_module_in_eager_surroundings_is_named():
    def work(rank, size):
        model = sharded(prefetch=0)
        late = torch.compile(lambda x: model.layers[3](x), fullgraph=True, backend=late_at(0))

        def call(x):
            x = model.embed(x)
            for number, layer in enumerate(model.layers):
                x = late(x) if number == 3 else layer(x)
            return model.head(x)

        with torch.inference_mode():
            call(ranks.inputs(rank))
        return failure(rank, model, call=call)

    assert "rank 0: weights are read outside their view: with poison in the windows layers.3 is" in same(run(work))


def test_the_call_may_be_a_compiled_model():
    """Which has no truth value where the model has no length."""

    def work(rank, size):
        model = sharded()
        with torch.inference_mode():
            return str(sharding.check(model, ranks.inputs(rank), call=torch.compile(model, backend="eager")))

    assert same(run(work)).startswith("equal with poison: 5 of 5")


# ---- Memory ----


def touched(pid):
    """Of the memory in which windows lie, in bytes; reserved large pages, too, which are not in Rss."""
    total, within = 0, False
    for line in open(f"/proc/{pid}/smaps").read().splitlines():
        if not line.split()[0].endswith(":"):
            within = "layershard:" in line and ":windows" in line
        elif within and line.startswith(("Rss:", "Shared_Hugetlb:", "Private_Hugetlb:")):
            total += 1024 * int(line.split()[1])
    return total


def test_a_model_takes_no_memory_for_a_check_before_it():
    def work(rank, size):
        model = sharded(ranks.stack(n_layers=4, width=400), prefetch=0)
        (series,) = (each.series for each in sharding.of(model).shared)
        with torch.inference_mode():
            model(ranks.inputs(rank))
            before = touched(os.getpid()) / series.stats().layer_bytes
            sharding.check(model, ranks.inputs(rank))
        return before, touched(os.getpid()) / series.stats().layer_bytes

    for before, after in run(work):
        assert 0.9 < before < 1.1 and 2.9 < after < 3.1  # one window; beside it a spare one, and the poison

# SPDX-License-Identifier: Apache-2.0
"""layershard.torch.check and programs made by inductor on an NVIDIA GPU: two processes on one, by the copying mode of
the transport, with poison in the windows.

Needs a GPU and its driver, and Triton for what is compiled.
"""

import ctypes
import os
import pathlib

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

# Asking torch would start the driver in this process, after which no forked one can use it.
if not list(pathlib.Path("/dev").glob("nvidia[0-9]*")) or torch.version.cuda is None:
    pytest.skip("there is no NVIDIA GPU, or torch is built without CUDA", allow_module_level=True)

import random_runs  # noqa: E402

DEVICE, TRANSPORT = "cuda", "cuda:copy"
READY = {"LAYERSHARD_POISON": "ready"}
LINEARS = {"modules": ["*.up", "*.down"]}
BLOCKS = {"modules": "layers.*", "scope": "block"}
SEEDS = range(int(os.environ.get("LAYERSHARD_TEST_SEEDS", 20)))


def sharded(model, **options):
    return sharding.shard(model.to(DEVICE), **{"transport": TRANSPORT, **BLOCKS, **options})


def inputs(rank):
    return ranks.inputs(rank, rows=64).to(DEVICE)


def same(texts):
    assert len(set(texts)) == 1, texts
    return texts[0]


def failure(model, *given, **options):
    with torch.inference_mode(), pytest.raises(sharding.CheckFailed) as caught:
        sharding.check(model, *given, **options)
    return str(caught.value)


# ---- Right ----


def right(rank, size, options, compiled):
    model, x = ranks.stack().to(DEVICE), inputs(rank)
    with torch.inference_mode():
        want = model(x)
        run = sharded(model, **options)
        if compiled:
            run = torch.compile(model, fullgraph=True)
        for _ in range(2):
            found = sharding.check(run, x)
            assert torch.allclose(run(x), want, atol=1e-4)
    assert found.is_equal and found.seen == found.layers == 5 * len(sharding.of(model).shared), str(found)
    assert not any(each.series.is_poisoned for each in sharding.of(model).shared)
    return str(found)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "options",
    [LINEARS, BLOCKS, {**BLOCKS, "placement": "striped"}, {**BLOCKS, "prefetch": 0}],
    ids=["linears", "blocks", "striped", "no prefetch"],
)
def test_a_right_program_is_equal(options, compiled):
    assert same(ranks.run(2, right, options, compiled, **READY)).startswith("equal with poison: ")


def test_generate():
    transformers = pytest.importorskip("transformers")

    def work(rank, size):
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval().to(DEVICE)
        tokens = torch.tensor([[5, 7, 11, 2 + rank]], device=DEVICE)
        greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            want = model.generate(tokens, **greedy)
            sharded(model, modules="model.layers.*")
            assert sharding.check(model, tokens, call=model.generate, **greedy).is_equal
            assert torch.equal(model.generate(tokens, **greedy), want)

    ranks.run(2, work, **READY)


# ---- Wrong ----


class Peeking(ranks.Block):
    """Reads a weight of another layer between its own modules."""

    def forward(self, x):
        y = self.up(self.norm(x)) + self.__dict__["other"].up.bias
        return x + self.scale * self.down(torch.relu(y))


def peeking():
    model = ranks.stack()
    model.layers[2].__class__ = Peeking
    model.layers[2].__dict__["other"] = model.layers[0]
    return model


@pytest.mark.parametrize("how", [LINEARS, BLOCKS], ids=["linears", "blocks"])
def test_the_module_that_reads_other_weights_is_named(how):
    def work(rank, size):
        return failure(sharded(peeking(), **how), inputs(rank))

    assert same(ranks.run(2, work, **READY)) == "layers.0.up.bias is read outside its view, in layers.2"


def copy_of(address, like):
    """Through the driver, past torch: what lies there, in the order of torch's stream."""
    copy = torch.empty_like(like)
    driver = ctypes.CDLL("libcuda.so.1")
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    assert (
        driver.cuMemcpyDtoDAsync_v2(
            ctypes.c_uint64(copy.data_ptr()), ctypes.c_uint64(address), ctypes.c_size_t(copy.nbytes), stream
        )
        == 0
    )
    return copy


def test_what_is_read_past_torch_is_found_by_poison():
    def work(rank, size):
        model = ranks.stack()
        bias = model.layers[1].up.bias

        def forward(x):
            return ranks.Block.forward(model.layers[2], x + copy_of(bias.data_ptr(), bias)[0])

        model.layers[2].forward = forward
        return failure(sharded(model), inputs(rank))

    text = same(ranks.run(2, work, **READY))  # layer 1 is stored on rank 1
    assert text.startswith("rank 0: weights are read outside their view") and "layers.2 is the first" in text


def test_what_a_pass_writes_is_named():
    def work(rank, size):
        model = ranks.stack()

        def write(layer, args):
            if rank == 1:
                layer.down.weight.data[0, 0] += 1

        model.layers[3].register_forward_pre_hook(write)
        return failure(sharded(model), inputs(rank))

    assert "rank 1: layers.3.down.weight is written by the call" in same(ranks.run(2, work, **READY))


def test_windows_without_room_for_poison_are_told():
    def work(rank, size):
        with torch.inference_mode(), pytest.raises(Exception, match="LAYERSHARD_POISON=ready") as caught:
            sharding.check(sharded(ranks.stack()), inputs(rank))
        return str(caught.value)

    ranks.run(2, work, LAYERSHARD_POISON="0")


# ---- Made by inductor ----


def eager(model, xs):
    """What random_runs.passes gives, not compiled."""
    return [each.clone() for x in xs for each in (*model(x), *model.buffers())]


def off_by(got, want):
    """By how much at most; NaN, which is poison, if any is."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(got, want, strict=True)]).max())


def on_device(mode, seed):
    """A sharded model, inputs, and what it computes from them."""
    xs = [x.to(DEVICE) for x in random_runs.inputs(mode, seed)]
    with random_runs.gradients_off(seed):
        wants = eager(random_runs.model_of(seed).to(DEVICE), xs)
        model = sharded(random_runs.model_of(seed), scope=("block", "linear")[seed % 2], prefetch=seed % 3)
    return model, xs, wants


def all_wrong(rank, size, mode, seeds):
    """How far each is off that differs from eager mode; refused is what keeps in an attribute what it computes."""
    found, models = {}, [(seed, *on_device(mode, seed)) for seed in seeds]
    for seed, model, xs, wants in models if rank == 0 else ():
        try:
            with random_runs.gradients_off(seed):
                error = off_by(random_runs.passes(mode, model, xs), wants)
            if not error < 1e-3:
                found[seed] = error
        except sharding.Refused:
            if seed % 10 != 9:
                raise
    for _, model, *_ in models:
        sharding.of(model).close()
    return found


@pytest.mark.parametrize("mode", [*random_runs.MODES, random_runs.GRAPHS])
def test_random_models(mode):
    torch.backends.cuda.matmul.allow_tf32 = False
    assert ranks.run(2, all_wrong, mode, SEEDS) == [{}, {}]

# SPDX-License-Identifier: Apache-2.0
"""Text from sharded models on an NVIDIA GPU, one word after the other from a cache of fixed size, in the modes of
torch.compile that make CUDA graphs, by programs that say nothing of them: the words of the replicated model. Two
processes on one GPU, by the copying mode of the transport; prompts of each rank's own, of several lengths.
"""

import pathlib
from importlib.util import find_spec

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

import static_decoder as decoders  # noqa: E402

# Asking torch would start the driver in this process, after which no forked one can use it.
if not list(pathlib.Path("/dev").glob("nvidia[0-9]*")) or torch.version.cuda is None:
    pytest.skip("there is no NVIDIA GPU, or torch is built without CUDA", allow_module_level=True)

N_LAYERS = 6  # three are the other rank's, and there are two windows: layers are fetched anew in each pass
WORDS = 9
BLOCKS = {"modules": "layers.*", "scope": "block", "transport": "cuda:copy"}
LINEARS = {"modules": ["*.qkv", "*.out", "*.up", "*.down"], "transport": "cuda:copy"}


def recorded():
    """The graphs that torch has recorded in this thread, those of all programs."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    nodes = [] if manager is None else [node for each in manager.roots.values() for node in each]
    for node in nodes:
        nodes.extend(child for each in node.children.values() for child in each)
    return nodes


def graphs_are_used(least):
    """Of the library's calls none is in a graph: it would have been refused."""
    from torch._dynamo.utils import counters

    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_partitions"] > least and len(recorded()) >= least


def prompts(rank):
    return [decoders.prompt(10 * rank + number, 3 + number + 2 * rank) for number in range(3)]


def words(rank, size, how, mode, makes_graphs):
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        whole, model = decoders.decoder(N_LAYERS).cuda(), decoders.decoder(N_LAYERS).cuda()
        sharding.shard(model, **how)
        run = torch.compile(model, mode=mode)
        caches = decoders.empty_cache(whole), decoders.empty_cache(model)
        for prompt in prompts(rank):
            want = decoders.generate(whole, whole, caches[0], prompt, WORDS)
            assert decoders.generate(model, run, caches[1], prompt, WORDS) == want
            assert decoders.generate(model, model, caches[1], prompt, WORDS) == want  # in eager mode between
        if makes_graphs:
            graphs_are_used(N_LAYERS)
        n_passes = len(prompts(rank)) * 2 * WORDS
        assert all(each.fetches >= 2 * n_passes for each in sharding.of(model).stats().values())
        sharding.of(model).close()


@pytest.mark.parametrize(
    "how, mode, makes_graphs",
    [
        (BLOCKS, "reduce-overhead", True),
        (LINEARS, "reduce-overhead", True),
        (BLOCKS, "max-autotune", True),
        (BLOCKS, "max-autotune-no-cudagraphs", False),
    ],
    ids=["blocks", "linears", "max-autotune", "max-autotune-no-cudagraphs"],
)
def test_words_are_the_replicated_model_s(how, mode, makes_graphs, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS", "ATEN")  # nothing to try out: that takes minutes
    ranks.run(2, words, how, mode, makes_graphs)


def language_model():
    import transformers

    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=decoders.WORDS,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    ).eval()


def static_cache(rank, size):
    torch.backends.cuda.matmul.allow_tf32 = False
    how = {"do_sample": False, "max_new_tokens": WORDS, "min_new_tokens": WORDS}
    with torch.no_grad():
        whole, model = language_model().cuda(), language_model().cuda()
        sharding.shard(model, "model.layers.*", scope="block", transport="cuda:copy")
        for prompt in prompts(rank):
            want = whole.generate(prompt.cuda(), **how).tolist()
            assert model.generate(prompt.cuda(), cache_implementation="static", **how).tolist() == want
        graphs_are_used(N_LAYERS)


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_with_a_static_cache():
    """It compiles by itself, in mode reduce-overhead."""
    ranks.run(2, static_cache)

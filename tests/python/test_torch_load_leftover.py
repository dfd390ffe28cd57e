# SPDX-License-Identifier: Apache-2.0
"""What layershard.torch.load does with tensors of a checkpoint that nobody takes: it tells of them, and refuses those
that say that the weights are quantised."""

import json
import logging

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

FP8 = torch.float8_e4m3fn
WEIGHT = "layers.1.up.weight"  # [75, 37]; rank 1 is its source


class Scaled(ranks.Stack):
    """Keeps the scales of its own, as a quantised model does."""

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.up.weight = torch.nn.Parameter(layer.up.weight.to(FP8), requires_grad=False)
            layer.up.register_buffer("weight_scale_inv", torch.ones(1))


class Rotary(ranks.Stack):
    def __init__(self):
        super().__init__()
        self.rotary_emb = torch.nn.Module()
        self.rotary_emb.register_buffer("inv_freq", torch.ones(3), persistent=False)
        self.tail = torch.nn.Linear(8, 37)
        self.tail.weight = self.embed.weight


def load(directory, state, model=ranks.Stack):
    """What each rank was told: the refusal or None, the lines in the log."""
    safetensors_torch.save_file({name: each.contiguous() for name, each in state.items()}, directory / "w.safetensors")

    def work(rank, size):
        lines = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: lines.append(record.getMessage())
        with sharding.empty_weights():
            built = model()
        if model is Rotary:
            built.tail.weight = built.embed.weight
        sharding.shard(built.eval(), "layers.*", scope="block", transport="shm:copy")
        logging.getLogger("layershard").addHandler(handler)
        try:
            sharding.load(built, directory)
        except Exception as error:
            return f"{error}{error.__cause__}", lines
        loaded = sharding.of(built).state_dict()
        assert all(torch.equal(loaded[name].float(), state.get(name, loaded[name]).float()) for name in loaded)
        return None, lines

    return ranks.run(2, work)


def plain():
    return ranks.stack().state_dict()


# ---- Quantised ----


@pytest.mark.parametrize(
    "dtype, scale",
    [
        (FP8, "up.weight_scale_inv"),
        (FP8, "up.weight_scale"),
        (torch.int8, "up.scales"),
        (torch.int8, "up.SCB"),
        (torch.uint8, "up.weight.absmax"),
        (torch.float32, "up.weight_scale_inv"),
    ],
)
def test_a_weight_with_a_scale_that_nobody_takes_is_refused(tmp_path, dtype, scale):
    state = plain()
    state |= {WEIGHT: (state[WEIGHT] * 100).to(dtype), f"layers.1.{scale}": torch.ones(1)}
    for text, _ in load(tmp_path, state):
        assert text is not None and f"layers.1.{scale}" in text and "quantised" in text, text


@pytest.mark.parametrize("scale", ["up.scale", "up.weights_zero", "up.wscale"])
def test_bytes_with_any_scale_beside_them_are_refused(tmp_path, scale):
    state = plain()
    state |= {WEIGHT: state[WEIGHT].to(FP8), f"layers.1.{scale}": torch.ones(1)}
    (first, _), (second, _) = load(tmp_path, state)
    assert first is not None and second is not None and f"layers.1.{scale}" in second, (first, second)


@pytest.mark.parametrize("kind", ["gptq", "awq", "hqq"])
def test_what_is_packed_instead_of_a_weight_is_refused_as_what_it_is(tmp_path, kind):
    state = plain()
    packed = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales"), "hqq": ("W_q",)}
    for name in [name for name in state if name.endswith(("up.weight", "down.weight"))]:
        del state[name]
        for part in packed[kind]:
            state[name.replace("weight", part)] = torch.ones(8, 37, dtype=torch.int32)
    for text, _ in load(tmp_path, state):
        assert text is not None and "layers.0.down." in text and "quantised" in text, text


def test_a_quantised_model_takes_its_scales(tmp_path):
    torch.manual_seed(1)
    assert load(tmp_path, Scaled().state_dict(), Scaled)[0][0] is None


# ---- Not quantised ----


def test_what_is_left_is_told_once_by_count_and_the_first(tmp_path):
    more = {f"extra.{i}.bias": torch.ones(1) for i in range(9)}
    more |= {"layers.1.k_scale": torch.ones(1), "layers.1.up._extra_state": torch.ones(1), "logit_scale": torch.ones(1)}
    (refused, lines), (also, none) = load(tmp_path, plain() | more)
    assert refused is None and also is None and not none
    assert len(lines) == 1 and lines[0].startswith("12 tensors") and "extra.0.bias" in lines[0], lines
    assert not load(tmp_path, plain())[0][1]


def test_what_a_model_computes_or_ties_is_not_told(tmp_path):
    state = plain()
    more = {"tail.weight": state["embed.weight"].clone(), "tail.bias": torch.ones(37)}
    more |= {"layers.0.rotary_emb.inv_freq": torch.ones(3), "rotary_emb.inv_freq": torch.ones(3)}
    more |= {"layers.0.scratch": torch.zeros(3)}
    ((refused, lines), _) = load(tmp_path, state | more, Rotary)
    assert refused is None and not lines, (refused, lines)


def test_bytes_without_a_scale_are_values(tmp_path):
    state = {name: each.to(FP8) if each.ndim > 1 else each for name, each in plain().items()}
    assert load(tmp_path, state)[0][0] is None


# ---- transformers' ----

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "dtype": "bfloat16",
}


def fp8(name, tensor):
    if "_proj." not in name and ".experts." not in name:
        return {name: tensor}
    rows, columns = (size // 8 for size in tensor.shape)
    return {name: (torch.rand(tensor.shape) * 400).to(FP8), f"{name}_scale_inv": torch.rand(rows, columns) / 100}


def mxfp4(name, tensor):
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    n_experts, columns, rows = tensor.shape
    blocks = torch.randint(0, 255, (n_experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (n_experts, rows, columns // 32), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


METHODS = {
    "fp8": (fp8, "FineGrainedFP8Config", {"weight_block_size": [8, 8], "activation_scheme": "dynamic"}, "_scale_inv"),
    "mxfp4": (mxfp4, "Mxfp4Config", {"modules_to_not_convert": ["lm_head", "model.embed_tokens"]}, "_proj_blocks"),
}


@pytest.mark.parametrize("kind, method", [("Llama", "fp8"), ("Mixtral", "fp8"), ("GptOss", "mxfp4")])
def test_the_lines_that_are_told_make_plain_weights(tmp_path, kind, method):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    quantised, config_class, told, word = METHODS[method]
    config, model_class = getattr(transformers, f"{kind}Config")(**SIZES), getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(5)
    model_class(config).to(torch.bfloat16).save_pretrained(tmp_path)
    state = {}
    for name, tensor in safetensors_torch.load_file(tmp_path / "model.safetensors").items():
        state |= quantised(name, tensor)
    safetensors_torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["quantization_config"] = {"quant_method": method, **told}
    (tmp_path / "config.json").write_text(json.dumps(saved))

    def work(rank, size):
        with sharding.empty_weights():
            model = model_class(config).to(torch.bfloat16)
        sharding.shard(model.eval(), "model.layers.*", scope="block", transport="shm:copy")
        with pytest.raises(sharding.Refused, match=word) as caught:
            sharding.load(model, tmp_path)
        lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("    ")]
        assert len(lines) == 3
        exec("\n".join(lines), {"model": model, "layershard": __import__("layershard.torch")})
        plain = getattr(transformers, config_class)(dequantize=True)
        want = model_class.from_pretrained(tmp_path, quantization_config=plain).state_dict()
        found = sharding.of(model).state_dict()
        assert all(torch.equal(found[name], want[name]) for name in want)
        if kind == "Llama":
            name = "model.layers.1.self_attn.q_proj.weight"
            scale = state[f"{name}_scale_inv"].repeat_interleave(8, 0).repeat_interleave(8, 1)
            assert torch.allclose(found[name].float(), state[name].float() * scale, rtol=0.01)

    ranks.run(2, work)

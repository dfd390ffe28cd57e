# SPDX-License-Identifier: Apache-2.0
"""What layershard.torch.shard refuses, with which reason; and that the model is as it was then."""

import copy
import pickle
import types

import pytest
from patience import LONG_MS

import layershard
import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
sharding = pytest.importorskip("layershard.torch")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        monkeypatch.delenv(name, raising=False)


def refuse(model, modules, *words, **options):
    """Refused, all words in the text, nothing changed."""
    before = {name: (tensor, tensor.data_ptr(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    with pytest.raises(sharding.Refused) as caught:
        sharding.shard(model, modules, **options)
    for word in words:
        assert word in str(caught.value)
    assert before == {name: (t, t.data_ptr(), t.requires_grad) for name, t in model.named_parameters()}
    with pytest.raises(sharding.Refused, match="has not been sharded"):
        sharding.of(model)


def test_unknown_pattern_lists_near_names():
    refuse(ranks.stack(), "*.dwon", "'*.dwon' matches no module", "*.down")


def test_every_pattern_must_match():
    refuse(ranks.stack(), ["*.down", "*.gate_proj"], "'*.gate_proj' matches no module")


def test_module_without_a_number():
    refuse(ranks.stack(), "head", "matches head", "without a number")


def test_no_pattern():
    refuse(ranks.stack(), [], "no pattern was given")


@pytest.mark.parametrize("modules", [None, 3, b"*.up", ["*.up", 3], ranks.stack().layers], ids=repr)
def test_modules_that_are_no_patterns(modules):
    refuse(ranks.stack(), modules, f"modules is of type {type(modules).__name__}: give names or patterns")


@pytest.mark.parametrize(
    "options",
    [
        {"prefetch": "1"},
        {"prefetch": 1.5},
        {"prefetch": None},
        {"timeout_ms": "5"},
        {"timeout_ms": 1.5},
        {"transport": 5},
        {"placement": ["whole"]},
        {"scope": None},
        {"resident": "a%"},
        {"resident": None},
        {"stripe": "rows"},
    ],
    ids=repr,
)
def test_arguments_of_another_type(options):
    (name, value), *_ = options.items()
    model = ranks.stack()
    with pytest.raises((layershard.Invalid, sharding.Refused)) as caught:
        sharding.shard(model, "*.up", **options)
    assert f"{name} is " in str(caught.value) and str(value) in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: sharding.shard("*.up", model),
        lambda model: sharding.load("/somewhere", model),
        lambda model: sharding.fill(dict, model),
        lambda model: sharding.of(None),
    ],
)
def test_arguments_in_another_order(call):
    with pytest.raises(TypeError, match=r"\(model.*\): model is of type \w+; give a torch\.nn\.Module"):
        call(ranks.stack())


def test_a_transport_of_other_memory_says_what_to_do():
    model = ranks.stack()
    with pytest.raises(layershard.NotSupported, match="device memory only.*are on cpu: move .* cuda first, or .*'shm'"):
        sharding.shard(model, "*.up", transport="cuda")
    sharding.of(sharding.shard(model, "*.up", transport="shm")).detach()


def test_stripe_pattern_that_matches_nothing():
    text = "stripe's pattern '*.upp.weight' matches no shared tensor; they are: layers.*.up.weight, layers.*.up.bias"
    refuse(ranks.stack(), "*.up", text, stripe={"*.upp.weight": "rows"}, placement="striped")


def test_unknown_scope():
    refuse(ranks.stack(), "*.up", "scope is 'layer'", "linear, block", scope="layer")


def test_tied_parameters():
    model = ranks.stack()
    model.layers[3].down.weight = model.layers[1].down.weight
    refuse(model, "*.down", "layers.1.down.weight is tied to layers.3.down.weight")


def test_tensor_that_shares_memory_with_one_outside():
    model = ranks.stack()
    model.register_buffer("peek", model.layers[2].up.bias.data[:4])
    refuse(model, "*.up", "layers.2.up.bias is tied to peek")


def test_module_used_twice():
    model = ranks.stack()
    model.layers[4] = model.layers[0]
    refuse(model, "*.up", "tied to")


def test_gradients():
    model = ranks.stack()
    model(ranks.inputs(0)).sum().backward()
    refuse(model, "*.up", "has a gradient")


def test_accelerate_hooks():
    hooks = pytest.importorskip("accelerate.hooks")
    model = ranks.stack()
    hooks.add_hook_to_module(model.layers[0], hooks.AlignDevicesHook("cpu"))
    refuse(model, "*.up", "layers.0 has accelerate's hooks")


def test_freezing():
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        refuse(ranks.stack(), "*.up", "freezing")


def test_child_that_its_parent_never_calls():
    model = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))
    refuse(model, "*.out_proj", "without being called")


def test_container_that_is_never_called():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(3, 3)}) for _ in range(2))
    refuse(model, "layers.*", "ModuleDict, which is never called")


def test_tensor_that_is_no_plain_memory():
    model = ranks.stack()
    for layer in model.layers:
        layer.down.weight = nn.Parameter(torch.zeros(1, 1).expand(37, 75), requires_grad=False)
    refuse(model, "*.down", "layers.0.down.weight is an expanded tensor")


def test_batch_norm_in_train_mode():
    model = ranks.stack()
    for layer in model.layers:
        layer.norm = nn.BatchNorm1d(37)
    how = {"scope": "block", "buffers": "*.running_*"}
    refuse(model.train(), "layers.*", "BatchNorm1d in train mode writes to layers.0.norm.running_mean", **how)
    sharding.shard(model.eval(), "layers.*", **how)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embedding_that_shortens_its_rows(kind):
    """It would write to memory that is read-only, which ends the process. What the text says to do gives the same."""
    model = nn.ModuleList(kind(10, 8, max_norm=0.5) for _ in range(3))
    refuse(model, "*", "0.weight is written by every pass", "max_norm=0.5", "renorm_(2.0, 0, 0.5)", "max_norm to None")
    rows = torch.arange(10)[:, None]
    with torch.no_grad():
        want = [each(rows) for each in copy.deepcopy(model)]
        for each in model:
            each.weight.data.renorm_(2.0, 0, 0.5)
            each.max_norm = None
        sharding.shard(model, "*")
        assert all(torch.allclose(each(rows), one) for each, one in zip(model, want, strict=True))


@pytest.mark.parametrize("modules", ["layers.*", "*.up"])
def test_parameters_without_a_shape(modules):
    model = ranks.stack()
    model.layers[1].down = nn.LazyLinear(37)
    with pytest.raises(sharding.Refused, match=r"layers\.1\.down\.weight has no shape.*make one pass"):
        sharding.shard(model, modules)
    with torch.no_grad():
        model(ranks.inputs(0))
    sharding.shard(model, modules)


def test_resident_that_makes_no_sense():
    refuse(ranks.stack(), "*.up", "resident is 'much'", resident="much")
    refuse(ranks.stack(), "*.up", "resident is '200%'", "at most 1.0 or 100%", resident="200%")
    refuse(ranks.stack(), "*.up", "resident is 1.5: ", resident=1.5)


def test_the_placements_that_are_told_have_the_default_among_them():
    with pytest.raises(layershard.Invalid, match="placement is 'owner': .* one of 'auto', 'whole', 'striped'"):
        sharding.shard(ranks.stack(), "*.up", placement="owner")


@pytest.mark.parametrize("modules", ["*.up", "layers.*", ["*.down", "layers.2.up"]])
def test_shared_already(modules):
    model = sharding.shard(ranks.stack(), "*.up")
    with pytest.raises(sharding.Refused, match=r"layers.[02].up.weight is shared already.*leave layers.[02]"):
        sharding.shard(model, modules, scope="block")
    assert list(sharding.of(model).stats()) == ["layers.*.up"]


def test_shared_already_by_a_call_for_a_module_in_it_or_round_it():
    model = ranks.stack()
    sharding.shard(model.layers, "*.up")
    with pytest.raises(sharding.Refused, match="layers.0.up.weight is shared already"):
        sharding.shard(model, "*.up")
    with pytest.raises(sharding.Refused, match="0.up.weight is shared already"):
        sharding.shard(nn.ModuleList([model.layers[3]]), "*")


# ---- Writes, once it is sharded ----


def guarded(action, words, model=None):
    model = model or sharding.shard(ranks.stack(), "*.up")
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(sharding.Guarded, match=words):
        action(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


def test_load_state_dict_is_guarded():
    guarded(lambda model: model.load_state_dict(ranks.stack(seed=2).state_dict()), r"load_state_dict.*update\(\)")
    bias = {"bias": torch.ones(75)}
    guarded(lambda model: model.layers[1].up.load_state_dict(bias, strict=False), r"load_state_dict \(bias\)")


def test_conversions_are_guarded():
    guarded(lambda model: model.half(), "float32 on cpu to torch.float16")
    guarded(lambda model: model.to(torch.float64), "float64")
    guarded(lambda model: model.to("meta"), "meta")
    guarded(lambda model: model.layers.double(), "float64")
    guarded(lambda model: model.layers[0].up.bfloat16(), "bfloat16")
    model = sharding.shard(ranks.stack(), "*.up")
    guarded(lambda model: model.layers.double(), "float64", model)
    assert model.layers[0].norm.weight.dtype == torch.float32  # nothing beside it either


def test_conversions_to_what_it_is_are_allowed():
    model = sharding.shard(ranks.stack(), "*.up")
    model.embed.double()
    assert model.to("cpu") is model and model.float() is model and model.cpu() is model
    assert model.embed.weight.dtype == torch.float32
    address = model.layers[0].up.weight.data_ptr()
    model.share_memory()
    assert model.layers[0].up.weight.data_ptr() == address


def test_copies_are_guarded(tmp_path):
    guarded(copy.deepcopy, "deepcopy")
    guarded(lambda model: copy.deepcopy(model.layers[0].up), "deepcopy")
    guarded(lambda model: pickle.dumps(model.layers), "pickling")
    guarded(lambda model: torch.save(model, tmp_path / "model.pt"), "pickling")


def test_gradients_through_windows_are_refused():
    def work(rank, size):
        model = sharding.shard(ranks.stack(), "*.up", transport="shm:copy")
        with pytest.raises(sharding.Refused, match="gradient is wanted through a Linear"):
            model(ranks.inputs(rank))
        with torch.no_grad():
            model(ranks.inputs(rank))

    ranks.run(2, work)


def test_state_dict_does_not_save_windows():
    def work(rank, size):
        model = sharding.shard(ranks.stack(), "*.up", transport="shm:copy")
        with pytest.raises(sharding.Guarded, match="state_dict"):
            model.state_dict()
        whole = sharding.of(model).state_dict()
        want = ranks.stack().state_dict()
        assert list(whole) == list(want) and all(torch.equal(whole[name], want[name]) for name in want)

    ranks.run(2, work)


def test_ranks_with_different_models_are_told_apart():
    def work(rank, size):
        model = ranks.stack(width=37 + rank)
        with pytest.raises(Exception, match="up.weight") as caught:
            sharding.shard(model, "*.up", transport="shm", timeout_ms=LONG_MS)
        assert caught.type.__name__ == "Mismatch"
        with torch.no_grad():
            model(ranks.inputs(rank))

    ranks.run(2, work)


def test_sharding_that_failed_on_one_rank_fails_on_all_and_can_be_made_again():
    def work(rank, size):
        model, want = ranks.stack(), ranks.stack()
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(sharding.layout.Layout, "view", lambda *_: 1 / 0)
            with pytest.raises(Exception) as caught:
                sharding.shard(model, "*.up", transport="shm:copy", timeout_ms=LONG_MS)
        assert caught.type.__name__ == "CallbackFailed" and "rank 1" in str(caught.value)
        sharding.shard(model, "*.up", transport="shm:copy")
        with torch.no_grad():
            assert torch.equal(model(ranks.inputs(rank)), want(ranks.inputs(rank)))

    ranks.run(2, work)


def test_original_refusals_name_what_is_wrong():
    from layershard.torch import vllm_ascend

    layer = nn.Linear(3, 3)
    layer.prefix = "model.head"
    layer.quant_method = types.SimpleNamespace(process_weights_after_loading=lambda layer: None)
    with pytest.raises(sharding.Refused, match="'model.head' has no number"):
        vllm_ascend.register_layer_to_shared_weight_series("heads", None, layer)
    with pytest.raises(sharding.Refused, match="has not been registered"):
        vllm_ascend.reach_layer_for_shared_weight_series(layer)

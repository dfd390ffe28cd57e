# SPDX-License-Identifier: Apache-2.0
"""What wraps a sharded model: of() sees through it, adapters are saved and loaded alone, the whole is still refused."""

import logging

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
peft = pytest.importorskip("peft")  # before ranks are forked: it takes seconds
safetensors_torch = pytest.importorskip("safetensors.torch")
load_file, save_file = safetensors_torch.load_file, safetensors_torch.save_file


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.getLogger("peft").setLevel(logging.ERROR)


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel's."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


def shard(model=None, transport="shm:copy"):
    return sharding.shard(model or ranks.stack(), "layers.*", scope="block", transport=transport)


def adapted(model, **options):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).eval()


# ---- of ----


def test_of_sees_through_wrappers():
    model = sharding.shard(ranks.stack(), "layers.*")
    handle = sharding.of(model)
    around = [Wrapper(model), torch.compile(Wrapper(model)), Wrapper(torch.compile(model)), Wrapper(Wrapper(model))]
    assert all(sharding.of(each) is handle for each in around)
    assert sharding.of(Wrapper(adapted(model))) is handle and handle.model is model
    handle.close()
    with pytest.raises(sharding.Refused, match=r"given up by close\(\)"):
        sharding.of(Wrapper(model))


def test_of_guesses_nothing():
    both = torch.nn.ModuleDict({"one": ranks.stack(), "two": ranks.stack()})
    with pytest.raises(sharding.Refused, match="this ModuleDict has not been sharded"):
        sharding.of(both)
    sharding.shard(both["one"], "layers.*")
    assert sharding.of(both) is sharding.of(both["one"])
    sharding.shard(both["two"], "layers.*")
    with pytest.raises(sharding.Refused, match=r"2 sharded models in it \(one, two\)"):
        sharding.of(both)
    with pytest.raises(sharding.Refused, match="has not been sharded"):
        sharding.of(both["one"].layers)
    third = torch.nn.ModuleDict({"both": both, "own": ranks.stack()})
    sharding.shard(third, "own.layers.*")
    assert sharding.of(Wrapper(third)) is sharding.of(third) is not sharding.of(both["one"])


def use_wrapped(rank, size):
    model, x = adapted(shard()), ranks.inputs(rank)
    want = adapted(ranks.stack())
    with torch.inference_mode():
        assert torch.equal(model(x), want(x))
        assert sharding.check(model, x).is_equal
        with sharding.of(model).update() as update:
            new = {name: tensor + 1 for name, tensor in update.parameters()}
            update.copy(new)
        for name, tensor in want.base_model.model.named_parameters():
            if "lora" not in name and name.startswith("layers."):
                tensor.add_(1)
        assert torch.equal(model(x), want(x))
    state, expected = sharding.of(model).state_dict(), want.base_model.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    sharded = sharding.of(model).state_dict("sharded")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sharded.items())
    stored = [f"layers.{index}.up.base_layer.weight" in sharded for index in range(5)]
    assert stored == [index % size == rank for index in range(5)]


def test_what_is_asked_of_a_wrapped_model_is_about_its_present_names():
    ranks.run(2, use_wrapped)


def fill_wrapped(rank, size, path):
    want, x = ranks.stack(), ranks.inputs(rank)
    values = want.state_dict()
    with sharding.empty_weights():
        model = ranks.stack()
    wrapped = Wrapper(sharding.shard(model, "layers.*", scope="block", transport="shm:copy", device="cpu"))
    assert sharding.fill(wrapped, lambda name, like: values[name]) is wrapped
    with torch.inference_mode():
        assert torch.equal(wrapped(x), want(x))
        sharding.load(wrapped, path)
        assert torch.equal(wrapped(x), ranks.stack(seed=2)(x))


def test_a_wrapped_model_is_filled_and_loaded(tmp_path):
    save_file(ranks.stack(seed=2).state_dict(), tmp_path / "model.safetensors")
    ranks.run(2, fill_wrapped, tmp_path)


def load_adapted(rank, size, path):
    model, want = adapted(shard()), adapted(ranks.stack())
    with pytest.raises(sharding.Refused, match="lora"):
        sharding.load(model, path)
    with torch.inference_mode():
        assert torch.equal(model(ranks.inputs(rank)), want(ranks.inputs(rank)))  # nothing was touched
    values = ranks.stack(seed=2).state_dict()
    sharding.fill(model, lambda name, like: values[name])
    sharded = adapted(ranks.stack(seed=2))
    with torch.inference_mode():
        assert torch.equal(model.base_model.model.embed.weight, want.base_model.model.embed.weight)
        state = sharding.of(model).state_dict()
        for name, tensor in sharded.base_model.model.state_dict().items():
            assert not name.startswith("layers.") or torch.equal(state[name], tensor)


def test_a_checkpoint_without_the_adapter_is_refused_and_nothing_is_written(tmp_path):
    save_file(ranks.stack(seed=2).state_dict(), tmp_path / "model.safetensors")
    ranks.run(2, load_adapted, tmp_path)


# ---- Adapters alone ----


def save(rank, size, path):
    model, want = adapted(shard()), adapted(ranks.stack())
    with torch.inference_mode():
        assert torch.equal(model(ranks.inputs(rank)), want(ranks.inputs(rank)))
    model.save_pretrained(path / f"{rank}")
    want.save_pretrained(path / f"want{rank}")
    saved, expected = (load_file(path / each / "adapter_model.safetensors") for each in (f"{rank}", f"want{rank}"))
    assert saved.keys() == expected.keys() and len(saved) == 20
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())
    model.save_pretrained(path / f"{rank}", safe_serialization=False)
    assert len(torch.load(path / f"{rank}" / "adapter_model.bin")) == 20
    for part in (model, model.base_model.model, model.base_model.model.layers[0]):
        with pytest.raises(sharding.Guarded, match="state_dict"):
            torch.save(part.state_dict(), path / "whole")


def test_an_adapter_is_saved_alone(tmp_path):
    ranks.run(2, save, tmp_path)


def save_with_shared(rank, size, path):
    model = adapted(shard(), bias="all")
    for is_safe in (True, False):
        with pytest.raises(sharding.Guarded, match=r"bias is shared by layershard and would be saved"):
            model.save_pretrained(path / f"{rank}", safe_serialization=is_safe)
    assert not list(path.rglob("*.safetensors"))


def test_an_adapter_that_holds_a_shared_weight_is_not_saved(tmp_path):
    ranks.run(2, save_with_shared, tmp_path)


def load_adapter(rank, size, path):
    want, x = adapted(ranks.stack()), ranks.inputs(rank)
    want.save_pretrained(path / f"{rank}")
    model = peft.PeftModel.from_pretrained(shard(), path / f"{rank}").eval()
    with torch.inference_mode():
        assert torch.equal(model(x), want(x))
        model.load_adapter(path / f"{rank}", "second", low_cpu_mem_usage=True)
        model.set_adapter("second")
        assert torch.equal(model(x), want(x))


def test_an_adapter_is_loaded_onto_a_sharded_model(tmp_path):
    ranks.run(2, load_adapter, tmp_path)


def load_parts(rank, size):
    model, new = shard(), ranks.stack(seed=2).state_dict()
    x, before = ranks.inputs(rank), model.head.weight.clone()
    shared = {"head.weight": new["head.weight"], "layers.3.up.bias": new["layers.3.up.bias"]}
    unknown = {"head.weight": new["head.weight"], "layers.3.up.gamma": new["layers.3.up.bias"]}
    for state in (shared, unknown, new):
        with pytest.raises(sharding.Guarded, match="load_state_dict"):
            Wrapper(model).load_state_dict({f"module.{name}": tensor for name, tensor in state.items()}, strict=False)
        with pytest.raises(sharding.Guarded, match="load_state_dict"):
            model.load_state_dict(state, strict=False)
    assert torch.equal(model.head.weight, before)
    head = {name: tensor for name, tensor in new.items() if name.startswith("head")}
    model.load_state_dict({**head, "layers.1.scale": torch.tensor(2.0)}, strict=False)
    want = ranks.stack()
    want.load_state_dict({**head, "layers.1.scale": torch.tensor(2.0)}, strict=False)
    with torch.inference_mode():
        assert torch.equal(model(x), want(x))


def test_what_is_not_shared_may_be_loaded_by_itself():
    ranks.run(2, load_parts)


# ---- Merged ----


def merge_outside(rank, size, is_before, transport):
    """Each call that writes is refused before it writes; what writes nothing shared is not, nor is it in an update."""
    model, want, x = ranks.stack(), adapted(ranks.stack()), ranks.inputs(rank)
    base = model if is_before else shard(model, transport)
    model = adapted(model)
    if is_before:
        shard(base, transport)
    with torch.no_grad():
        for call in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(sharding.Guarded, match=r"merge\(\) of an adapter would write to layers\.0.*update\(\)"):
                call()
            assert torch.equal(model(x), want(x))
        model.merge_adapter(adapter_names=["another"])
        with sharding.of(model).update():
            model.merge_adapter()
        want.merge_adapter()
        assert torch.equal(model(x), want(x))
        with pytest.raises(sharding.Guarded, match=r"unmerge\(\) of an adapter would write to layers\.0"):
            model.unmerge_adapter()
        model.merge_adapter()  # it is
        unloaded = model.merge_and_unload()
        assert torch.equal(unloaded(x), want(x))


@pytest.mark.parametrize("is_before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_an_adapter_is_merged_in_an_update_alone(is_before, transport):
    ranks.run(2, merge_outside, is_before, transport)


def merge_elsewhere(rank, size):
    """An adapter round what is not shared, and any when the model is shared no more."""
    model = sharding.shard(ranks.stack(), "*.up", transport="shm:copy")
    model, want, x = adapted(model), adapted(ranks.stack()), ranks.inputs(rank)
    with torch.no_grad():
        for layer, other in zip(model.base_model.model.layers, want.base_model.model.layers, strict=True):
            layer.down.merge()
            other.down.merge()
        assert torch.equal(model(x), want(x))
        sharding.of(model).detach()
        model.merge_adapter()
        want.merge_adapter()
        assert torch.equal(model(x), want(x))
        assert "merge" not in vars(model.base_model.model.layers[0].up)


def test_an_adapter_is_merged_where_nothing_is_shared():
    ranks.run(2, merge_elsewhere)


def test_one_rank_alone_merges_as_it_likes():
    model, want, x = adapted(sharding.shard(ranks.stack(), "layers.*")), adapted(ranks.stack()), ranks.inputs(0)
    with torch.no_grad():
        model.merge_adapter()
        want.merge_adapter()
        assert torch.equal(model(x), want(x))

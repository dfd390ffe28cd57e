# SPDX-License-Identifier: Apache-2.0
"""layershard.torch.load: models built without memory, filled from safetensors, each rank from its own files only."""

import json
import os

import pytest

import layershard
import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


def save(directory, state, by_file):
    """A checkpoint of several files with an index, as Hugging Face's are."""
    files = {}
    for name, tensor in state.items():
        files.setdefault(by_file(name), {})[name] = tensor.contiguous()
    for file, tensors in files.items():
        safetensors_torch.save_file(tensors, directory / file)
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def file_per_layer(name):
    parts = name.split(".")
    return f"layer{parts[1]}.safetensors" if parts[0] == "layers" else "rest.safetensors"


def empty_stack(**options):
    with sharding.empty_weights():
        return ranks.stack(**options)


def only_own_files(rank, size, directory, options):
    for index in range(5):
        if index % size != rank:
            os.rename(directory / str(rank) / f"layer{index}.safetensors", directory / str(rank) / f"gone{index}")
    model = empty_stack()
    assert all(each.is_meta for each in model.parameters())
    sharding.shard(model, "layers.*", scope="block", buffers="*", **options)
    addresses = [each.data_ptr() for each in model.layers.parameters()]
    assert all(addresses)  # final before anything is loaded
    assert sharding.load(model, directory / str(rank)) is model
    assert [each.data_ptr() for each in model.layers.parameters()] == addresses
    with torch.inference_mode():
        assert torch.equal(model(ranks.inputs(rank)), ranks.stack()(ranks.inputs(rank)))


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
@pytest.mark.parametrize("placement", ["whole", "striped"])
def test_a_rank_opens_the_files_of_its_own_layers_only(tmp_path, transport, placement):
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        save(tmp_path / str(rank), ranks.stack().state_dict(), file_per_layer)
    ranks.run(3, only_own_files, tmp_path, {"transport": transport, "placement": placement})


def test_one_file_and_other_dtypes(tmp_path):
    want = {name: tensor.bfloat16() for name, tensor in ranks.stack().state_dict().items()}
    safetensors_torch.save_file(want, tmp_path / "weights.safetensors")

    def work(rank, size, path):
        model = empty_stack()
        sharding.load(sharding.shard(model, "*.up", transport="shm:copy"), path)
        state = sharding.of(model).state_dict()
        assert state.keys() == want.keys()
        assert all(torch.equal(state[name], want[name].float()) for name in want)

    ranks.run(2, work, tmp_path)
    ranks.run(2, work, tmp_path / "weights.safetensors")


def test_no_pass_before_the_weights_are_there():
    def work(rank, size):
        model = sharding.shard(empty_stack(), "layers.*", scope="block", transport="shm")
        with pytest.raises(sharding.Guarded, match=r"layershard\.torch\.load"):
            model(ranks.inputs(rank))
        with pytest.raises(sharding.Guarded, match="nothing to update"):
            sharding.of(model).update()

    ranks.run(2, work)


def test_loading_again_replaces_in_place(tmp_path):
    save(tmp_path, ranks.stack(seed=7).state_dict(), file_per_layer)

    def work(rank, size):
        model, x = ranks.stack(), ranks.inputs(rank)
        sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
        addresses = [each.data_ptr() for each in model.parameters()]
        sharding.load(model, tmp_path)
        with torch.inference_mode():
            assert torch.equal(model(x), ranks.stack(seed=7)(x))
        assert [each.data_ptr() for each in model.parameters()] == addresses

    ranks.run(2, work)


def test_tied_weights_that_are_not_shared(tmp_path):
    class Tied(ranks.Stack):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Linear(37, 37, bias=False)
            self.head = torch.nn.Linear(37, 37, bias=False)
            self.head.weight = self.embed.weight

    def work(rank, size):
        torch.manual_seed(3)
        want = Tied()
        state = {name: tensor for name, tensor in want.state_dict().items() if name != "head.weight"}
        if rank == 0:
            save(tmp_path, state, file_per_layer)
        with sharding.empty_weights():
            model = Tied()
        model.head.weight = model.embed.weight
        sharding.shard(model, "layers.*", scope="block", transport="shm")  # meets: the files are there then
        sharding.load(model, tmp_path)
        assert model.head.weight is model.embed.weight
        x = torch.randn(2, 37)
        with torch.inference_mode():
            assert torch.equal(model(x), want(x))

    ranks.run(2, work)


def test_tied_weights_that_the_checkpoint_has_twice(tmp_path):
    class Tied(ranks.Stack):
        def __init__(self):
            super().__init__()
            self.tail = torch.nn.Linear(8, 37)
            self.tail.weight = self.embed.weight

    def work(rank, size):
        with sharding.empty_weights():
            model = Tied()
        model.tail.weight = model.embed.weight
        sharding.shard(model, "layers.*", scope="block", transport="shm")
        sharding.load(model, tmp_path / "same")
        with pytest.raises((sharding.Refused, layershard.CallbackFailed)) as caught:
            sharding.load(model, tmp_path / "other")
        return str(caught.value)

    torch.manual_seed(3)
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, state, file_per_layer)
        state["tail.weight"] = state["tail.weight"] + 1
    for text in ranks.run(2, work):
        assert "embed.weight and tail.weight are one tensor in the model" in text, text


def refused(tmp_path, state, *words, model=None):
    save(tmp_path, state, file_per_layer)

    def work(rank, size):
        with pytest.raises(Exception) as caught:
            sharding.load(sharding.shard(model or empty_stack(), "layers.*", scope="block", transport="shm"), tmp_path)
        texts = [str(caught.value), str(caught.value.__cause__)]
        return all(any(word in text for text in texts) for word in words)

    return ranks.run(2, work)


def test_missing_weights_are_named_on_every_rank(tmp_path):
    state = ranks.stack().state_dict()
    state["layers.3.downs.weight"] = state.pop("layers.3.down.weight")
    assert all(refused(tmp_path, state, "no layers.3.down.weight", "layers.3.downs.weight"))


def test_wrong_shape_is_told_to_every_rank(tmp_path):
    state = ranks.stack().state_dict() | {"layers.1.up.bias": torch.zeros(1)}  # would broadcast
    words = "layers.1.up.bias is F32 [1] in", "layer1.safetensors", "float32 [75] in the model"
    assert all(refused(tmp_path, state, *words))


def test_buffers_that_no_file_holds_must_be_real(tmp_path):
    with torch.device("meta"):
        model = ranks.Stack()
    assert all(refused(tmp_path, ranks.stack().state_dict(), "scratch", "empty_weights()", model=model))


def test_no_checkpoint(tmp_path):
    def work(rank, size):
        with pytest.raises(sharding.Refused, match="no safetensors files"):
            sharding.load(sharding.shard(empty_stack(), "*.up", transport="shm"), tmp_path)

    ranks.run(2, work)


# ---- What fails on one rank fails on all, with its reason ----


def each_fails(size, spoil, *words):
    """load fails on all ranks with the same words when @spoil(rank) gives one of them other files to read; then, with
    files that are whole, it is right."""

    def work(rank, size):
        model = empty_stack(n_layers=2)
        sharding.shard(model, "layers.*", scope="block", placement="whole", transport="shm:copy")
        with pytest.raises((sharding.Refused, layershard.Error)) as caught:
            sharding.load(model, spoil(rank))
        with pytest.raises(sharding.Guarded), torch.inference_mode():
            model(ranks.inputs(rank))
        sharding.load(model, spoil(0))
        with torch.inference_mode():
            assert torch.equal(model(ranks.inputs(rank)), ranks.stack(n_layers=2)(ranks.inputs(rank)))
        return str(caught.value)

    for text in ranks.run(size, work):
        assert all(word in text for word in words), text


def test_a_rank_that_alone_cannot_read_tells_all_why(tmp_path):
    """Of three ranks and two layers the last is source of nothing, and was not noticed."""
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        save(tmp_path / str(rank), ranks.stack(n_layers=2).state_dict(), file_per_layer)
    (tmp_path / "2" / "rest.safetensors").write_bytes(b"cut off")
    each_fails(3, lambda rank: tmp_path / str(rank), "rest.safetensors", "no whole safetensors file")


def test_ranks_that_would_read_other_checkpoints_are_told(tmp_path):
    for name in ("plain/model", "half/model.fp16", "half/model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        safetensors_torch.save_file(ranks.stack(n_layers=2).state_dict(), tmp_path / f"{name}.safetensors")
    (tmp_path / "half" / "model.safetensors").unlink()  # on that host somebody has fetched the other variant only
    spoil = ["plain", "half"]
    each_fails(2, lambda rank: tmp_path / spoil[rank], "rank 0 has model of", "rank 1 a checkpoint of")


def test_a_rank_that_fails_while_it_reads_tells_all_why(tmp_path):
    save(tmp_path, ranks.stack(seed=7).state_dict(), file_per_layer)

    def work(rank, size, name):
        from layershard.torch.tensor_files import Checkpoint

        model, x, read = ranks.stack(), ranks.inputs(rank), Checkpoint.read
        sharding.shard(model, "layers.*", scope="block", transport="shm:copy")

        def broken(self, key):
            if rank == 1 and key == name:
                raise OSError(f"input/output error at {key}")
            return read(self, key)

        Checkpoint.read = broken
        with pytest.raises((OSError, layershard.CallbackFailed)) as caught:
            sharding.load(model, tmp_path)
        with pytest.raises(sharding.Guarded, match="have failed|has failed"):
            sharding.of(model).update()
        Checkpoint.read = read
        sharding.load(model, tmp_path)
        with torch.inference_mode():
            assert torch.equal(model(x), ranks.stack(seed=7)(x))
        return str(caught.value)

    for name in ("layers.3.up.bias", "head.weight"):
        for text in ranks.run(2, work, name):
            assert f"input/output error at {name}" in text, text


@pytest.mark.parametrize("kind", [KeyError, layershard.WrongState])
def test_a_function_that_fails_on_one_rank_fails_fill_on_all_with_its_reason(kind):
    def work(rank, size):
        model = sharding.shard(empty_stack(), "layers.*", scope="block", transport="shm")

        def give(name, like):
            if rank == 1 and name == "head.bias":
                raise kind("no head here")
            return torch.zeros(like.shape)

        with pytest.raises((kind, layershard.CallbackFailed), match="no head here"):
            sharding.fill(model, give)

    ranks.run(2, work)

# SPDX-License-Identifier: Apache-2.0
"""Which files layershard.torch.load reads, what it says where there is no telling, and of files that are not whole."""

import json
import logging

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
save_file = pytest.importorskip("safetensors.torch").save_file


def state_of(value):
    return {name: torch.full_like(tensor, value) for name, tensor in ranks.stack(n_layers=2).state_dict().items()}


def single(path, value):
    """A file all of whose tensors hold one value, by which to tell it from others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state_of(value), path)
    return path


def indexed(index, value, *files):
    """An index and its files, over which the tensors go round."""
    index.parent.mkdir(parents=True, exist_ok=True)
    state = sorted(state_of(value).items())
    where = {name: files[i % len(files)] for i, (name, _) in enumerate(state)}
    for file in files:
        save_file({name: tensor for name, tensor in state if where[name] == file}, index.parent / file)
    index.write_text(json.dumps({"weight_map": where}))
    return index


def load(path, **options):
    """The value that was loaded, or what the refusal says; and what was logged."""

    def work(rank, size):
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("layershard").addHandler(handler)
        logging.getLogger("layershard").setLevel(logging.INFO)
        with sharding.empty_weights():
            model = ranks.Stack(n_layers=2)
        sharding.shard(model.eval(), "layers.*", scope="block", transport="shm")
        try:
            sharding.load(model, path, **options)
        except sharding.Refused as refused:
            return str(refused), lines
        values = {tensor.flatten()[0].item() for tensor in sharding.of(model).state_dict().values()}
        assert len(values) == 1, values
        return values.pop(), lines

    (result,) = ranks.run(1, work)
    return result


def value(path, **options):
    return load(path, **options)[0]


def refusal(path, *words, **options):
    said = value(path, **options)
    assert isinstance(said, str), f"{said} has been loaded"
    assert all(word in said for word in words), said


# ---- Which files ----


@pytest.mark.parametrize("plain", ["model", "diffusion_pytorch_model"])
def test_the_plain_name_is_what_the_hub_means(tmp_path, plain):
    single(tmp_path / f"{plain}.safetensors", 1)
    for other, name in enumerate(("consolidated", f"{plain}_ema", f"{plain}.fp16", "original", "zz.fp16"), 2):
        single(tmp_path / f"{name}.safetensors", other)
    found, lines = load(tmp_path)
    assert found == 1
    assert any(f"{plain}.safetensors" in line and f"{plain}_ema.safetensors" in line for line in lines)
    assert value(tmp_path, variant="fp16") == 4
    assert value(tmp_path, variant="ema") == 3
    assert value(tmp_path, variant="consolidated") == 2
    assert value(tmp_path, files="zz.fp16.safetensors") == 6
    refusal(tmp_path, "bf16", "consolidated.safetensors", variant="bf16")


def test_an_index_is_read_for_all_of_its_files_and_no_other(tmp_path):
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    indexed(tmp_path / "model.safetensors.index.json", 1, *parts)
    halves = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half_index = indexed(tmp_path / "model.safetensors.index.fp16.json", 2, *halves)
    single(tmp_path / "consolidated.safetensors", 3)
    assert value(tmp_path) == 1
    assert value(tmp_path, variant="fp16") == 2
    assert value(half_index) == 2
    assert value(tmp_path, files=half_index.name) == 2
    assert value(tmp_path, files=parts) == 1
    assert value(tmp_path / "consolidated.safetensors") == 3
    half_index.unlink()  # what is left of it can be read as well
    assert value(tmp_path, variant="fp16") == 2
    (tmp_path / halves[0]).unlink()
    refusal(tmp_path, "only 1 of the 2 parts of model.fp16", variant="fp16")
    assert value(tmp_path) == 1


def test_two_that_may_be_meant_are_named(tmp_path):
    single(tmp_path / "a" / "original.safetensors", 1)
    single(tmp_path / "a" / "model_ema.safetensors", 2)
    refusal(tmp_path / "a", "original.safetensors", "model_ema.safetensors", "files=")
    indexed(tmp_path / "b" / "model.safetensors.index.json", 1, "model-00001-of-00001.safetensors")
    single(tmp_path / "b" / "model.safetensors", 2)  # transformers would read this one, diffusers the other
    refusal(tmp_path / "b", "model.safetensors.index.json", "model.safetensors", "files=")
    assert value(tmp_path / "b", files="model.safetensors") == 2
    indexed(tmp_path / "c" / "model.fp16.safetensors.index.json", 1, "half.safetensors")
    indexed(tmp_path / "c" / "model.safetensors.index.bf16.json", 2, "brain.safetensors")
    refusal(tmp_path / "c", "model.fp16.safetensors.index.json", "model.safetensors.index.bf16.json", "variant=")
    assert value(tmp_path / "c", variant="bf16") == 2
    refusal(tmp_path / "c", "give one of them", variant="bf16", files="half.safetensors")


def test_one_file_of_any_name_and_parts_without_an_index(tmp_path):
    single(tmp_path / "a" / "model.fp16.safetensors", 1)
    assert value(tmp_path / "a") == 1
    index = indexed(tmp_path / "b" / "model.safetensors.index.json", 2, "any.safetensors", "name.safetensors")
    index.unlink()
    assert value(tmp_path / "b") == 2


def test_a_directory_of_the_hubs_cache(tmp_path):
    cached = tmp_path / "models--org--name"
    for number, commit in enumerate(("aaaa", "bbbb"), 1):
        blob = single(cached / "blobs" / f"blob{number}", number)
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    refusal(cached, "2 snapshots", "aaaa, bbbb", "refs/main")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("bbbb")
    assert value(cached) == 2
    assert value(cached / "snapshots" / "aaaa") == 1
    (cached / "refs" / "main").write_text("../../elsewhere")
    refusal(cached, "refs/main", "../../elsewhere")


def test_where_there_is_nothing_the_next_step_is_said(tmp_path):
    single(tmp_path / "pipeline" / "transformer" / "model.safetensors", 1)
    refusal(tmp_path / "pipeline", "no safetensors files", "transformer")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").touch()
    refusal(tmp_path / "old", "no safetensors files", "pytorch_model.bin")
    refusal("org/name", "neither a directory nor a file", "snapshot_download('org/name')")
    refusal(tmp_path / "old", "gone.safetensors", "not there", files=["gone.safetensors"])


# ---- Files that are not what they should be ----


@pytest.mark.parametrize(
    "text, word",
    [
        ("{", "JSON"),
        (b"\xff\xfe{}", "JSON"),
        ("[" * 100000, "JSON"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": {"head.bias": 3}}', "head.bias in 3"),
        ('{"weight_map": {"head.bias": "a.safetensors", "head.bias": "b.safetensors"}}', "head.bias is there twice"),
        ('{"weight_map": {"head.bias": ""}}', "head.bias in ''"),
        ('{"weight_map": {"head.bias": "../outside.safetensors"}}', "head.bias in '../outside.safetensors'"),
        ('{"weight_map": {"head.bias": "/etc/outside.safetensors"}}', "head.bias in '/etc/outside.safetensors'"),
        ('{"weight_map": {"head.bias": "a/../../outside.safetensors"}}', "head.bias in 'a/../../outside.safetensors'"),
    ],
)
def test_what_is_wrong_with_an_index_is_said_and_it_is_named(tmp_path, text, word):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text if isinstance(text, bytes) else text.encode())
    single(tmp_path.parent / "outside.safetensors", 1)
    refusal(tmp_path, str(index), word)


def test_an_index_that_leads_nowhere_names_the_tensor_and_the_file(tmp_path):
    index = indexed(tmp_path / "model.safetensors.index.json", 1, "one.safetensors", "two.safetensors")
    content = json.loads(index.read_text())
    (name,) = [name for name, file in content["weight_map"].items() if name == "layers.0.norm.bias"]
    said = content["weight_map"][name]
    content["weight_map"][name] = "three.safetensors"
    index.write_text(json.dumps(content))
    refusal(tmp_path, name, "three.safetensors", "no such file", index.name)
    content["weight_map"][name] = {"one.safetensors": "two.safetensors"}.get(said, "one.safetensors")
    index.write_text(json.dumps(content))
    refusal(tmp_path, name, content["weight_map"][name], "no such tensor", index.name)


def test_one_tensor_in_two_files_is_named(tmp_path):
    single(tmp_path / "left.safetensors", 1)
    single(tmp_path / "right.safetensors", 2)
    refusal(tmp_path, "left.safetensors", "right.safetensors", "files=")
    refusal(tmp_path, "is in both", files=["left.safetensors", "right.safetensors"])


@pytest.mark.parametrize("cut", [0, 5, 40, -1, None])
def test_a_file_that_is_cut_off_or_no_safetensors_file_is_named(tmp_path, cut):
    file = single(tmp_path / "model.safetensors", 1)
    file.write_bytes(b"\xff" * 100 if cut is None else file.read_bytes()[:cut])
    refusal(tmp_path, str(file), f"({file.stat().st_size} bytes)", "no whole safetensors file")


def test_integers_for_a_weight_name_both_dtypes(tmp_path):
    state = state_of(1) | {"layers.1.up.weight": torch.ones(75, 37, dtype=torch.int8)}
    save_file(state, tmp_path / "model.safetensors")
    refusal(tmp_path, "layers.1.up.weight is I8 [75, 37]", "model.safetensors", "torch.float32 [75, 37] in the model")


def test_only_weights_are_asked_what_kind_of_number_they_are(tmp_path):
    class Counted(ranks.Stack):
        def __init__(self):
            super().__init__(n_layers=2)
            self.table = torch.nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
            self.register_buffer("count", torch.zeros(2))

    def work(rank, size, words):
        model = sharding.shard(Counted().eval(), "layers.*", scope="block", transport="shm")
        if not words:
            return sharding.load(model, tmp_path).count.tolist()
        with pytest.raises(sharding.Refused) as caught:
            sharding.load(model, tmp_path)
        assert all(word in str(caught.value) for word in words), caught.value

    state = state_of(1) | {"count": torch.tensor([3, 4]), "table": torch.ones(3)}
    save_file(state, tmp_path / "model.safetensors")
    ranks.run(1, work, ["table is F32 [3]", "torch.int64 [3] in the model"])
    save_file(state | {"table": torch.ones(3, dtype=torch.int32)}, tmp_path / "model.safetensors")
    assert ranks.run(1, work, []) == [[3, 4]]

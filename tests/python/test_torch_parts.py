# SPDX-License-Identifier: Apache-2.0
"""Weights that wrap other tensors (torchao's, quanto's) are shared by what they wrap: the same bits, or refused."""

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
layershard = pytest.importorskip("layershard")
two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")

BLOCKS = {"modules": "layers.*", "scope": "block"}


class Scaled(torch.Tensor):
    """As quantising libraries make them: bytes and scales, multiplied out when it is used."""

    @staticmethod
    def __new__(cls, bits, scale, kind):
        return torch.Tensor._make_wrapper_subclass(cls, bits.shape, dtype=torch.float32, device=bits.device)

    def __init__(self, bits, scale, kind):
        self.bits, self.scale, self.kind = bits, scale, kind

    @classmethod
    def of(cls, weight, kind="int8"):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale, kind)

    def __tensor_flatten__(self):
        return ["bits", "scale"], {"kind": self.kind, "made by": object}

    @classmethod
    def __tensor_unflatten__(cls, inner, rest, size, stride):
        return cls(inner["bits"], inner["scale"], rest["kind"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].bits, args[0].scale, args[0].kind)
        plain = torch.utils._pytree.tree_map_only(cls, lambda each: each.bits * each.scale, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


class Anew(Scaled):
    """Its parts are other tensors each time."""

    bits = property(lambda self: self.__dict__["kept"].clone(), lambda self, bits: self.__dict__.update(kept=bits))


def scaled(seed=1, make=Scaled.of, requires_grad=False):
    model = ranks.stack(seed)
    for layer in model.layers:
        for linear in (layer.up, layer.down):
            linear.weight = torch.nn.Parameter(make(linear.weight.detach()), requires_grad=requires_grad)
    return model


def two(seed=1):
    """Of parts that wrap others themselves, and are trainable."""
    return scaled(seed, lambda weight: two_tensor.TwoTensor(weight, weight + 1), requires_grad=True)


def nested(seed=1):
    return scaled(seed, lambda weight: two_tensor.TwoTensor(Scaled.of(weight), Scaled.of(weight + 1)))


MODELS = pytest.mark.parametrize("make", [scaled, two, nested])


def bits(tensor):
    parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return [each for name in parts for each in bits(getattr(tensor, name))] or [tensor]


def same(one, other):
    pairs = list(zip(bits(one), bits(other), strict=True))
    return type(one) is type(other) and all(torch.equal(*pair) for pair in pairs)


def spoil(model, rank, size):
    for index, layer in enumerate(model.layers):
        for tensor in bits(layer.up.weight) + bits(layer.down.weight) if index % size != rank else ():
            tensor.detach().view(torch.uint8).fill_(77)


def use(rank, size, make, transport):
    want, model, x = make(), make(), ranks.inputs(rank)
    spoil(model, rank, size)
    weights = [layer.up.weight for layer in model.layers]
    sharding.shard(model, **BLOCKS, transport=transport)
    handle = sharding.of(model)
    assert all(layer.up.weight is weight for layer, weight in zip(model.layers, weights, strict=True))
    for around in (torch.inference_mode, torch.no_grad):
        with around():
            for _ in range(2):
                assert same(model(x), want(x))
            checked = sharding.check(model, x)
            assert checked.is_equal == (transport == "shm:copy")
            if transport == "shm:copy" and make is scaled:
                assert same(torch.compile(model, backend="eager", fullgraph=True)(x), want(x))
    state, expected = handle.state_dict(), want.state_dict()
    assert state.keys() == expected.keys() and all(same(state[name], each) for name, each in expected.items())
    stored = handle.state_dict("sharded")
    assert [f"layers.{index}.up.weight" in stored for index in range(5)] == [i % size == rank for i in range(5)]
    handle.detach()
    with torch.no_grad():
        assert same(model(x), want(x))
    assert [each.requires_grad for each in model.parameters()] == [each.requires_grad for each in want.parameters()]


@MODELS
def test_weights_that_wrap_others_are_shared_by_their_parts(make):
    if make is scaled:  # it compiles: what that imports is there when ranks are forked
        torch.compile(torch.nn.ReLU(), backend="eager")(torch.ones(1))
        torch.compiler.reset()
    ranks.run(2, use, make, "shm:copy")


def test_they_are_read_in_place():
    ranks.run(2, use, scaled, "shm")


def guard(rank, size):
    model, x = scaled(), ranks.inputs(rank)
    sharding.shard(model, **BLOCKS, transport="shm:copy")
    weight = model.layers[1].up.weight
    with pytest.raises(sharding.Guarded, match="float32 on cpu to torch.float16"):
        model.half()
    with pytest.raises(sharding.Refused, match=r"layers\.0\.up\.weight\.bits is a part of a Scaled"):
        sharding.of(model).update()
    with pytest.raises(sharding.Refused, match="a gradient is wanted"):
        model.layers[1](torch.ones(2, 37, requires_grad=True))
    with torch.no_grad():
        own, weight.scale = weight.scale, weight.scale.clone()
        with pytest.raises(sharding.Guarded, match=r"layers\.1\.up\.weight\.scale is no longer"):
            model(x)
        weight.scale = own
        assert same(model(x), scaled()(x))
        model.layers[1].up.weight = torch.nn.Parameter(torch.ones(75, 37), requires_grad=False)
        with pytest.raises(sharding.Guarded, match=r"layers\.1\.up\.weight\.bits is no longer"):
            model(x)
        model.layers[1].up.weight = weight
        weight.bits.add_(1)
        with pytest.raises(sharding.Guarded, match=r"layers\.1\.up\.weight\.bits was written"):
            model(x)


def test_what_is_done_to_a_part_is_noticed():
    ranks.run(2, guard)


def fill(rank, size):
    model, x, new = scaled(), ranks.inputs(rank), scaled(seed=2)
    sharding.shard(model, **BLOCKS, transport="shm:copy")
    values = dict(new.named_parameters()) | dict(new.named_buffers())
    for name in [name for name, each in values.items() if type(each.data) is Scaled]:
        whole = values.pop(name)
        values |= {f"{name}.bits": whole.bits, f"{name}.scale": whole.scale}
    sharding.fill(model, lambda name, like: values[name])
    want = scaled()
    want.layers.load_state_dict(new.layers.state_dict(), assign=True)
    with torch.no_grad():
        assert same(model(x), want(x))


def test_new_weights_are_given_part_by_part():
    ranks.run(2, fill)


class Reader(torch.nn.Module):
    """Reads a later block's weight."""

    def __init__(self, block, other):
        super().__init__()
        self.block, self.other = block, [other]

    def forward(self, x):
        return self.block(x) + self.other[0].up.weight.bits.sum()


def read_early(rank, size):
    model = scaled()
    model.layers[1] = Reader(model.layers[1], model.layers[3])
    sharding.shard(model, **BLOCKS, transport="shm:copy")
    with torch.no_grad(), pytest.raises(sharding.CheckFailed, match=r"layers\.3\.up\.weight"):
        sharding.check(model, ranks.inputs(rank))


def test_a_part_that_is_read_early_is_found():
    ranks.run(2, read_early)


class SavesParts(torch.nn.Linear):
    """As quanto's."""

    names = ("weight.bits", "weight.scale")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, part in zip(self.names, (self.weight.bits, self.weight.scale), strict=True):
            destination[prefix + name] = part


class SavesOtherwise(SavesParts):
    names = ("packed", "scales")


def save_by_parts(rank, size, kind):
    model, want = scaled(), scaled()
    for each in (model, want):
        for layer in each.layers:
            layer.down.__class__ = kind
    sharding.shard(model, **BLOCKS, transport="shm:copy")
    if kind is SavesOtherwise:
        with pytest.raises(sharding.Refused, match=r"down\.packed of a module's own state_dict is layers\.\d\.down"):
            sharding.of(model).state_dict()
        return
    state, expected = sharding.of(model).state_dict(), want.state_dict()
    assert state.keys() == expected.keys() and all(same(state[name], each) for name, each in expected.items())


@pytest.mark.parametrize("kind", [SavesParts, SavesOtherwise])
def test_modules_that_save_parts_by_themselves(kind):
    ranks.run(2, save_by_parts, kind)


# ---- Refused ----


def shard_other_kinds(rank, size):
    """Ranks that hold other kinds of weights under one name."""
    model = scaled(make=lambda weight: Scaled.of(weight, kind=f"kind {rank}"))
    with pytest.raises(layershard.Mismatch, match="kind"):
        sharding.shard(model, "*.up", transport="shm:copy")
    assert torch.equal(model(ranks.inputs(rank)), scaled()(ranks.inputs(rank)))


def test_ranks_with_other_kinds_are_told():
    with torch.no_grad():
        ranks.run(2, shard_other_kinds)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Anew.of, "makes its parts anew"),
        (lambda weight: Scaled.of(weight).__class__(weight.to("meta"), weight.to("meta"), ""), "on the meta device"),
        (lambda weight: two_tensor.TwoTensor(weight[:1].expand(75, 37), weight[:1].expand(75, 37)), "expanded"),
    ],
)
def test_what_cannot_be_shared_by_its_parts_is_refused(make, words):
    model = ranks.stack()
    for layer in model.layers:
        layer.up.weight = torch.nn.Parameter(make(layer.up.weight.detach()), requires_grad=False)
    with pytest.raises(sharding.Refused, match=rf"layers\.0\.up\.weight.*{words}"):
        sharding.shard(model, "*.up", device="cpu")


def test_tied_parts_are_refused():
    model = scaled()
    model.layers[3].up.weight.bits = model.layers[1].up.weight.bits
    with pytest.raises(sharding.Refused, match=r"weight\.bits is tied to layers\.\d\.up\.weight\.bits"):
        sharding.shard(model, "*.up")


def test_what_torch_distributed_wraps_is_still_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor

    def work(rank, size):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=size)
        mesh, model = dist.init_device_mesh("cpu", (size,)), ranks.stack()
        for layer in model.layers:
            layer.up.weight = torch.nn.Parameter(distribute_tensor(layer.up.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(sharding.Refused, match="is a DTensor, which is not plain memory"):
            sharding.shard(model, "*.up")

    ranks.run(2, work)

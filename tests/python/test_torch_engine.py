# SPDX-License-Identifier: Apache-2.0
"""A small engine from public names alone: it builds, loads and runs its modules by itself, as vLLM does."""

import ast
import pathlib

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
layershard = pytest.importorskip("layershard")

N_LAYERS, WIDTH, FIRST = 5, 24, 40  # a pipeline stage's layers begin anywhere


class Block(torch.nn.Module):
    """Its second weight lies transposed, as kernels want it, and one is an integer."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH + 1, bias=True)
        self.down = torch.nn.Parameter(torch.empty(WIDTH, 2 * WIDTH + 1).t())
        self.shift = torch.nn.Parameter(torch.zeros(1, dtype=torch.int32), requires_grad=False)
        for name, parameter in self.named_parameters():
            parameter.weight_loader = self.load_weight if name != "up.bias" else None

    @staticmethod
    def load_weight(parameter, loaded, scale=1):
        parameter.data.copy_(loaded * scale)
        return True

    def forward(self, x):
        return x + torch.tanh(self.up(x)) @ self.down + self.shift


class Stage(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(N_LAYERS))
        self.head = torch.nn.Linear(WIDTH, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def checkpoint():
    """Name and values."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in Stage().named_parameters():
        if parameter.dtype == torch.int32:
            yield name, torch.tensor([int(name.split(".")[1])], dtype=torch.int32)
        else:
            yield name, torch.randn(parameter.shape, generator=generator) / 5


def load(model):
    """By loaders where there are any, as engines do; what is passed over is not read twice."""
    with torch.no_grad():
        for name, values in checkpoint():
            parameter = model.get_parameter(name)
            loader = getattr(parameter, "weight_loader", None)
            assert loader(parameter, values, scale=2) if loader else parameter.copy_(values) is not None


class Shared:
    """What an engine does with its blocks before and after loading."""

    def __init__(self, group, blocks):
        self.blocks = blocks
        self.layouts = {name: sharding.Layout.of(each) for name, each in blocks[0].named_parameters()}
        tensors = [sharding.describe(name, layout) for name, layout in self.layouts.items()]
        self.series = group.series("blocks", first_layer=FIRST, layer_count=len(blocks), tensors=tensors)
        for layer, block in enumerate(blocks, FIRST):
            self.give(layer, block, writable=True) if self.series.is_source(layer) else self.give_up(block)

    def give(self, layer, block, writable=False):
        for index, (parameter, layout) in enumerate(zip(block.parameters(), self.layouts.values(), strict=True)):
            parameter.data = sharding.view(self.series, layer, index, layout, writable=writable)
            parameter.requires_grad_(False)

    def give_up(self, block):
        for parameter in block.parameters():
            sharding.without_storage(parameter)

    def commit(self):
        self.series.commit()
        self.arrivals = sharding.Arrivals()
        for layer, block in enumerate(self.blocks, FIRST):
            self.give(layer, block)
            self.arrivals.add(block, waits=[(self.series, layer)])
        self.arrivals.install()


def whole():
    torch.manual_seed(0)
    model = Stage().eval()
    load(model)
    return model


def shared(group, commit=True):
    torch.manual_seed(0)
    model = Stage().eval()
    engine = Shared(group, model.blocks)
    load(model)
    if commit:
        engine.commit()
    return model, engine


def x_of(rank):
    return torch.randn(2 + rank, WIDTH, generator=torch.Generator().manual_seed(rank))


def serve(rank, size, transport, backend, folder):
    if backend == "inductor":
        ranks.quick_inductor(str(folder))
    with layershard.Group(transport=transport) as group:
        model, engine = shared(group)
        want, x = whole(), x_of(rank)
        assert not any(each.requires_grad for each in model.blocks.parameters())
        assert model.blocks[1].down.stride() == want.blocks[1].down.stride() != (WIDTH, 1)
        addresses = [each.data_ptr() for each in model.parameters()]

        def step(x):
            y = model(x)
            engine.arrivals.join(y)
            return y

        run = torch.compile(step, backend=backend, fullgraph=True) if backend else step
        reference = torch.compile(want, fullgraph=True) if backend == "inductor" else want  # it computes otherwise
        with torch.inference_mode():
            for _ in range(2 + rank):
                engine.arrivals.prepare()
                assert torch.equal(run(x), reference(x))
            assert torch.equal(model.blocks[3](x), want.blocks[3](x))
        assert [each.data_ptr() for each in model.parameters()] == addresses
        stats = engine.series.stats()
        assert stats.windows > 0 and stats.waits >= N_LAYERS * (2 + rank)
        engine.arrivals.remove()


@pytest.mark.parametrize("backend", [None, "eager"])  # inductor: see test_torch_compile
def test_an_engine_of_public_names_runs(backend, tmp_path):
    if backend:  # what compiling imports, seconds of it, is there when ranks are forked
        torch.compile(torch.nn.ReLU(), backend=backend)(torch.ones(1))
        torch.compiler.reset()
    ranks.run(3 if backend is None else 2, serve, "shm:copy", backend, tmp_path)


def test_only_public_names_are_used():
    tree = ast.parse(pathlib.Path(__file__).read_text())
    used = {"sharding": set(), "layershard": set()}
    for each in ast.walk(tree):
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id in used:
            used[each.value.id].add(each.attr)
    assert used["sharding"] <= {*sharding.__all__, "__all__"}
    assert used["layershard"] <= {*layershard.__all__, "__all__"}
    assert {"Arrivals", "Layout", "describe", "view", "without_storage"} <= used["sharding"]
    modules = {each.module for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)}
    assert not any("layershard" in each for each in modules)


# ---- Storage that is given up ----


def test_a_parameter_without_storage_keeps_its_shape_and_says_so_when_written():
    parameter = torch.nn.Parameter(torch.ones(300, 7, dtype=torch.bfloat16))
    parameter.weight_loader = Block.load_weight
    kept = parameter
    sharding.without_storage(parameter)
    assert parameter is kept and parameter.shape == (300, 7) and parameter.dtype == torch.bfloat16
    assert parameter.untyped_storage().nbytes() == 2 and parameter.isnan().all() and not parameter.requires_grad
    assert parameter.weight_loader(parameter, torch.ones(5), "q", shard_id=1) is True
    for part in (parameter.data, parameter.data[3], parameter.data.narrow(0, 0, 2)):
        with pytest.raises(RuntimeError, match="single memory location"):
            part.copy_(torch.ones(part.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2fnuz, torch.int8])
def test_every_type_may_be_given_up(dtype):
    parameter = torch.nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    sharding.without_storage(parameter)
    assert parameter.shape == (4, 4) and parameter.untyped_storage().nbytes() == dtype.itemsize
    assert parameter.float().isnan().all() or dtype == torch.int8


class Fixed(torch.nn.Parameter):
    """As vLLM's own kinds of parameters."""

    @property
    def weight_loader(self):
        return self._weight_loader


def test_a_loader_that_is_a_property_is_passed_over():
    parameter = Fixed(torch.ones(3))
    sharding.without_storage(parameter)
    assert parameter.weight_loader(parameter, torch.ones(3)) is True


# ---- What is refused ----


def misuse(rank, size):
    with layershard.Group(transport="shm:copy") as group:
        model, engine = shared(group, commit=False)
        layer = next(each for each in engine.series.layers if not engine.series.is_source(each))
        with pytest.raises(layershard.NotSupported):
            sharding.view(engine.series, layer, 0, next(iter(engine.layouts.values())), writable=True)
        with pytest.raises(layershard.Invalid, match="tensor 0 has"):
            sharding.view(engine.series, layer, 0, sharding.Layout.of(torch.ones(2)))
        with pytest.raises(sharding.Refused, match="call install first"):
            sharding.Arrivals().join()
        with pytest.raises(sharding.Refused, match="no parameter or buffer sideways"):
            sharding.Arrivals().add(model.blocks[0], waits=[(engine.series, FIRST)], tensors=["sideways"])
        engine.commit()
        x = x_of(rank)
        with pytest.raises(sharding.Refused, match="a gradient is wanted"):
            model(x.requires_grad_())
        own = model.blocks[0].up.bias.data
        model.blocks[0].up.bias.data = torch.zeros(2 * WIDTH + 1)
        with torch.inference_mode(), pytest.raises(sharding.Guarded, match="up.bias is no longer"):
            model(x)
        model.blocks[0].up.bias.data = own
        with torch.inference_mode():
            assert torch.equal(model(x), whole()(x))


def test_misuse_is_told():
    ranks.run(2, misuse)

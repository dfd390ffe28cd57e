# SPDX-License-Identifier: Apache-2.0
"""The original's functions: what processing leaves on a layer is there on ranks that did not run it, or is refused."""

import functools
import pathlib
import tempfile
import types

import pytest

import torch_ranks as ranks

torch = ranks.torch
vllm_ascend = pytest.importorskip("layershard.torch.vllm_ascend")

WIDTH = 24


class Method:
    """Changes all that a layer has: the weight's name, its strides, values, a tensor that is no parameter."""

    def process_weights_after_loading(self, layer):
        layer.packed = torch.nn.Parameter((layer.weight * 8).to(torch.int8).t().contiguous().t(), requires_grad=False)
        del layer.weight
        layer.scale = layer.loaded_scale / 8
        layer.register_buffer("zero", torch.full((1,), float(layer.loaded_scale)))
        layer.loaded_scale = None
        layer.shift = 0.25 * int(layer.prefix.split(".")[1])
        layer.notes["dtypes"] = [torch.int8, (layer.shift, "packed")]

    def apply(self, layer, x):
        assert not hasattr(layer, "weight") and layer.loaded_scale is None
        assert layer.notes["dtypes"] == [torch.int8, (layer.shift, "packed")] and layer.packed.stride() == (1, WIDTH)
        return x @ layer.packed.float() * layer.scale + layer.shift + layer.zero


class Leaves(Method):
    """A method that does @what besides."""

    def __init__(self, what):
        self.what = what

    def process_weights_after_loading(self, layer):
        super().process_weights_after_loading(layer)
        self.what(layer)


class Linear(torch.nn.Module):
    def __init__(self, index, method):
        super().__init__()
        self.prefix, self.quant_method, self.notes = f"layers.{index}.proj", method, {}
        generator = torch.Generator().manual_seed(index)
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator), requires_grad=False)
        self.loaded_scale = torch.nn.Parameter(torch.tensor(0.5 + index), requires_grad=False)

    def forward(self, x):
        return self.quant_method.apply(self, x)


def group_of(rank, size, path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    dist.barrier()  # a rank that ends while another still connects would be its failure
    return types.SimpleNamespace(device_group=dist.group.WORLD, cpu_group=None)


def registered(group, method, n_layers=5):
    layers = [Linear(index, method) for index in range(n_layers)]
    for layer in layers:
        vllm_ascend.register_layer_to_shared_weight_series("proj", group, layer)
    return layers


def alike(rank, size, path):
    layers, want = registered(group_of(rank, size, path), Method()), [Linear(index, Method()) for index in range(5)]
    vllm_ascend.post_process_after_loading_for_shared_weight_series(layers[1])
    for layer in want:
        layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2 + rank, WIDTH)
    with torch.inference_mode():
        for _ in range(2):
            for layer, other in zip(layers, want, strict=True):
                vllm_ascend.reach_layer_for_shared_weight_series(layer)
                assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_what_processing_leaves_is_on_all_ranks(transport):
    with tempfile.TemporaryDirectory() as directory:
        ranks.run(3, alike, pathlib.Path(directory) / "store", LAYERSHARD_TRANSPORT=transport)


def a_function(layer):
    layer.kernel = functools.partial(torch.mul, 2)


def a_module(layer):
    layer.rotation = torch.nn.Linear(2, 2)


def another_method(layer):
    layer.quant_method = Method()


def failing(layer):
    if layer.prefix == "layers.1.proj":
        raise OSError("no kernel for layers.1")


def unlike(layer):
    if layer.prefix == "layers.3.proj":
        layer.packed = torch.nn.Parameter(layer.packed[:2].clone(), requires_grad=False)


def nothing(layer):
    del layer.packed, layer.scale, layer.zero


REFUSED = {
    a_function: r"layers.0.proj left 'kernel', a partial, which cannot be sent",
    a_module: r"layers.0.proj changed its child modules",
    another_method: r"layers.0.proj left 'quant_method', a Method",
    failing: r"no kernel for layers.1",
    unlike: r"layers.0.proj and layers.3.proj differ: packed is int8 \[2, 24\]|packed is int8 \[24, 24\]",
    nothing: r"'proj': layers.0.proj has no tensor after its processing",
}


def refused(rank, size, path, what):
    layers = registered(group_of(rank, size, path), Leaves(what))
    with pytest.raises((ValueError, OSError)) as caught:
        vllm_ascend.post_process_after_loading_for_shared_weight_series(layers[0])
    text = str(caught.value)
    caught.match(REFUSED[what] if rank == 0 or what in (failing, unlike, nothing) else "processing the weights of")
    if what is failing and rank != 1:
        assert "'proj' cannot be shared: rank 1:" in text
    return text


@pytest.mark.parametrize("what", REFUSED, ids=lambda what: what.__name__)
def test_what_cannot_be_sent_is_refused_on_all_ranks(what):
    with tempfile.TemporaryDirectory() as directory:
        ranks.run(2, refused, pathlib.Path(directory) / "store", what)

# SPDX-License-Identifier: Apache-2.0
"""The original's functions: a small engine written against their calls, as vLLM's models are."""

import pathlib
import tempfile
import types

import pytest

import torch_ranks as ranks

torch = ranks.torch
vllm_ascend = pytest.importorskip("layershard.torch.vllm_ascend")

N_LAYERS = 5  # and a draft layer after them, which is not shared
WIDTH = 24


class Transposing:
    """A quantisation method: what is stored differs from what is loaded, and has a scale."""

    def __init__(self):
        self.processed = 0

    def process_weights_after_loading(self, layer):
        self.processed += 1
        scale = layer.weight.data.abs().amax()
        layer.weight.data = (layer.weight.data / scale).t().contiguous()
        layer.register_parameter("scale", torch.nn.Parameter(scale.reshape(1), requires_grad=False))

    def apply(self, layer, x):
        return x @ layer.weight * layer.scale


class Linear(torch.nn.Module):
    def __init__(self, prefix):
        super().__init__()
        self.prefix = prefix
        self.quant_method = Transposing()
        self.weight = torch.nn.Parameter(torch.empty(WIDTH, WIDTH), requires_grad=False)
        self.weight.weight_loader = lambda parameter, loaded: parameter.data.copy_(loaded)

    def forward(self, x):
        return self.quant_method.apply(self, x)


class Engine:
    def __init__(self, group, config, first, share):
        self.first, self.share = first, share
        self.layers = [Linear(f"model.layers.{first + i}.self_attn.o_proj") for i in range(N_LAYERS + 1)]
        self.shared = [layer for layer in self.layers if share and vllm_ascend.is_hidden_layer(config, layer)]
        for layer in self.shared:
            vllm_ascend.register_layer_to_shared_weight_series(f"o_proj{first}", group, layer, prefetch_step=1)

    def load(self):
        generator = torch.Generator().manual_seed(4)
        for layer in self.layers:
            layer.weight.weight_loader(layer.weight, torch.randn(WIDTH, WIDTH, generator=generator) / 5)
        for layer in self.layers:
            layer.quant_method.process_weights_after_loading(layer)
        if self.shared:
            for layer in self.shared[:2]:  # once is enough, more do no harm
                vllm_ascend.post_process_after_loading_for_shared_weight_series(layer)

    def step(self, x):
        for layer in self.layers:
            if layer in self.shared:
                vllm_ascend.reach_layer_for_shared_weight_series(layer)
            x = torch.tanh(layer(x))
        return x


def coordinator(rank, size, path):
    """What vLLM calls a GroupCoordinator."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    dist.barrier()  # a rank that ends while another still connects would be its failure
    return types.SimpleNamespace(
        world_size=size, rank_in_group=rank, ranks=list(range(size)), device_group=dist.group.WORLD, cpu_group=None
    )


def serve(rank, size, path, first):
    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(hf_config=types.SimpleNamespace(num_hidden_layers=first + N_LAYERS))
    )
    alone = Engine(None, config, first, share=False)
    alone.load()
    engine = Engine(coordinator(rank, size, path), config, first, share=True)
    stored = [layer.weight.numel() > 0 for layer in engine.layers]
    assert stored == [(first + i) % size == rank for i in range(N_LAYERS)] + [True]
    engine.load()
    processed = [layer.quant_method.processed for layer in engine.layers]
    assert processed == [int(each) for each in stored]
    addresses = [layer.weight.data_ptr() for layer in engine.layers]
    x = torch.randn(2 + rank, WIDTH, generator=torch.Generator().manual_seed(rank))
    with torch.inference_mode():
        for _ in range(2 + rank):
            assert torch.equal(engine.step(x), alone.step(x))
    assert [layer.weight.data_ptr() for layer in engine.layers] == addresses


@pytest.mark.parametrize("first", [0, 40])  # a pipeline stage's layers begin anywhere
@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_an_engine_written_for_the_original_runs(first, transport):
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "store"
        ranks.run(3, serve, path, first, LAYERSHARD_TRANSPORT=transport)


def misuse(rank, size, path):
    group = coordinator(rank, size, path)
    layers = [Linear(f"layers.{index}.o_proj") for index in (0, 1, 3)]
    for layer in layers:
        vllm_ascend.register_layer_to_shared_weight_series("gap", group, layer)
    with pytest.raises(ValueError, match=r"'gap' has layers \[0, 1, 3\]"):
        vllm_ascend.post_process_after_loading_for_shared_weight_series(layers[0])
    with pytest.raises(ValueError, match="post_process_after_loading"):
        vllm_ascend.reach_layer_for_shared_weight_series(layers[0])
    with pytest.raises(ValueError, match="has a layer 1 already"):
        vllm_ascend.register_layer_to_shared_weight_series("gap", group, Linear("layers.1.o_proj"))


def test_misuse_is_told_not_asserted():
    with tempfile.TemporaryDirectory() as directory:
        ranks.run(2, misuse, pathlib.Path(directory) / "store")


def test_layers_may_have_one_quantisation_method(monkeypatch):
    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        monkeypatch.delenv(name, raising=False)
    layers, method = [Linear(f"layers.{index}.o_proj") for index in range(3)], Transposing()
    for layer in layers:
        layer.weight.data.fill_(2)
        layer.quant_method = method
        vllm_ascend.register_layer_to_shared_weight_series("one", None, layer)
        method.process_weights_after_loading(layer)  # the engine's loader: passed over
    vllm_ascend.post_process_after_loading_for_shared_weight_series(layers[0])
    assert method.processed == 3 and all(layer.scale.item() == 2 for layer in layers)

# SPDX-License-Identifier: Apache-2.0
"""Which number in a module's name is its layer's: the one by which layers are alike, or the one that is asked for."""

import pytest

import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
sharding = pytest.importorskip("layershard.torch")
from layershard.torch.patterns import select  # noqa: E402


def named(names, sizes):
    """A model of linears by their names; sizes(name) is a linear's width."""
    model = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        at = model
        for parent in parents:
            if parent not in dict(at.named_children()):
                at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        at.add_module(last, nn.Linear(sizes(name), 2))
    return model


def found(model, pattern="*", **options):
    """Templates, and how many layers each has."""
    counts = {}
    for unit in select(model, pattern, **options):
        counts[unit.template] = counts.get(unit.template, 0) + 1
        assert unit.block_template == unit.template[: len(unit.block_template)]
    return counts


def test_a_number_before_the_layers_is_none():
    """As sentence_transformers names them."""
    names = [f"0.auto_model.encoder.layer.{layer}.query" for layer in range(4)]
    assert found(named(names, lambda name: 3), "*.query") == {"0.auto_model.encoder.layer.*.query": 4}


def test_stages_of_other_widths_are_no_layers():
    names = [f"stages.{stage}.layers.{layer}.up" for stage in range(4) for layer in range(3)]
    model = named(names, lambda name: 3 + int(name.split(".")[1]))
    assert found(model, "*.up") == {f"stages.{stage}.layers.*.up": 3 for stage in range(4)}


def test_experts_are_no_layers_where_there_are_many_layers():
    names = [f"layers.{layer}.experts.{expert}.up" for layer in range(6) for expert in range(9)]
    assert found(named(names, lambda name: 3), "*.up") == {f"layers.*.experts.{expert}.up": 6 for expert in range(9)}


def test_of_numbers_by_which_as_many_are_alike_the_first_counts():
    names = [f"a.{one}.b.{other}" for one in range(3) for other in range(3)]
    assert found(named(names, lambda name: 3), "a.*.b.*") == {f"a.*.b.{other}": 3 for other in range(3)}


def test_a_number_after_an_underscore_counts_where_there_are_siblings():
    """As torchvision names them."""
    names = [f"encoder.layers.encoder_layer_{layer}.mlp.{part}" for layer in range(12) for part in (0, 3)]
    model = named(names, lambda name: 3)
    assert found(model, "*.mlp.*") == {f"encoder.layers.encoder_layer_*.mlp.{part}": 12 for part in (0, 3)}
    with pytest.raises(sharding.Refused, match="matches linear_1, linear_2: without a number"):
        select(named(["linear_1", "linear_2"], lambda name: 3), "*")


def test_the_number_that_is_asked_for():
    names = [f"stages.{stage}.layers.{layer}.up" for stage in range(4) for layer in range(7)]
    model = named(names, lambda name: 3)
    assert len(found(model, "*.up")) == 4
    assert found(model, "*.up", layer="stages.*") == {f"stages.*.layers.{layer}.up": 4 for layer in range(7)}
    assert found(model, "*.up", layer="stages.*.layers.*") == {f"stages.{stage}.layers.*.up": 7 for stage in range(4)}
    assert found(model, "*.up", layer=["stages.0.layers.*", "stages.1.layers.*"]).keys() == {
        "stages.0.layers.*.up",
        "stages.1.layers.*.up",
    }


def test_what_is_asked_for_chooses_the_layers_in_what_has_other_numbers():
    names = [f"0.encoder.layer.{layer}.up" for layer in range(3)] + ["2.dense"]
    model = named(names, lambda name: 3)
    assert found(model, "*", layer="encoder.layer.*") == {"0.encoder.layer.*": 3}


@pytest.mark.parametrize("layer, words", [("block.*", "layer='block.*' finds no number"), ("layers", "put a *")])
def test_a_number_that_is_not_there(layer, words):
    with pytest.raises(sharding.Refused) as caught:
        sharding.shard(ranks.stack(), "*.up", layer=layer)
    assert words in str(caught.value)


# ---- A model whose first number is none ----


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.stages = nn.ModuleList()
        for stage, n_layers in enumerate((3, 3, 9, 3)):
            width = 12 + 6 * stage
            stack = nn.Module()
            stack.grow = nn.Linear(max(12, width - 6), width)
            stack.layers = nn.ModuleList(ranks.Block(width) for _ in range(n_layers))
            self.stages.append(stack)

    def forward(self, x):
        x = self.embed(x)
        for stage in self.stages:
            x = stage.grow(x)
            for layer in stage.layers:
                x = layer(x)
        return x


def staged():
    torch.manual_seed(1)
    return Stages().eval()


def compute_alike(rank, size, modules, options):
    want, model, x = staged(), staged(), ranks.inputs(rank)
    sharding.shard(model, modules, transport="shm:copy", **options)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(model(x), want(x))
    stats = sharding.of(model).stats()
    held = sum(each.shard_bytes + each.windows * each.layer_bytes for each in stats.values())
    return list(stats), held < 9 * next(iter(stats.values())).layer_bytes


@pytest.mark.parametrize("options", [{"scope": "block"}, {"scope": "block", "layer": "layers.*"}], ids=str)
def test_a_model_of_stages_holds_less_than_before(options):
    """Stages of three layers would save nothing on two ranks, and stay as they are."""
    assert ranks.run(2, compute_alike, "stages.*.layers.*", options) == [(["stages.2.layers.*"], True)] * 2

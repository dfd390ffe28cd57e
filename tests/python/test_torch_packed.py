# SPDX-License-Identifier: Apache-2.0
"""Weights that are no tensors of their module cannot be shared: refused by name, or told where the rest is shared. And
what sharing does not save is told, too."""

import logging
import types
import warnings

import pytest

import torch_ranks as ranks

torch = ranks.torch
nn = torch.nn
sharding = pytest.importorskip("layershard.torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that these move to torchao
    mkldnn = pytest.importorskip("torch.utils.mkldnn")
    quantization = pytest.importorskip("torch.ao.quantization")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        monkeypatch.delenv(name, raising=False)


def dynamic(model):
    return quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def one_dnn(model):
    return mkldnn.to_mkldnn(model)


def static(model):
    for layer in model.layers:
        layer.up = nn.Sequential(quantization.QuantStub(), layer.up, quantization.DeQuantStub())
        layer.up.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(model)
    prepared(ranks.inputs(0))
    return quantization.convert(prepared)


PACKING = pytest.mark.parametrize("pack", [dynamic, one_dnn, static], ids=lambda each: each.__name__)


def compute(model, rank=0):
    with torch.no_grad():
        return model(ranks.inputs(rank))


@PACKING
@pytest.mark.parametrize("modules", ["*.up", ["*.norm", "*.up"]], ids=str)
def test_packed_weights_are_refused_by_name(pack, modules):
    model = pack(ranks.stack())
    with pytest.raises(sharding.Refused, match=r"layers\.0\.up is a \w+ whose weights are packed.*Leave it out"):
        sharding.shard(model, modules, buffers="*")
    assert torch.equal(compute(model), compute(pack(ranks.stack())))


def told(caplog, model, modules, **options):
    with caplog.at_level(logging.WARNING, "layershard"):
        sharding.shard(model, modules, **options)
    return caplog.messages


def test_packed_weights_beside_others_are_told(caplog):
    (line,) = told(caplog, dynamic(ranks.stack()), "*.*.*")
    assert "layers.0.up is a DynamicQuantizedLinear" in line and "10 chosen modules" in line


@pytest.mark.parametrize("pack", [dynamic, one_dnn], ids=lambda each: each.__name__)
def test_a_block_with_packed_weights_says_that_little_is_shared(pack, caplog):
    (line,) = told(caplog, pack(ranks.stack()), "layers.*", scope="block")
    assert "only 0.0 MiB of the chosen modules'" in line and ".weight and the like are not parameters" in line


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_what_is_beside_packed_weights_is_shared_rightly(transport):
    def work(rank, size):
        for pack in (dynamic, one_dnn):
            model, want = pack(ranks.stack()), pack(ranks.stack())
            sharding.shard(model, "layers.*", scope="block", transport=transport)
            assert torch.equal(compute(model, rank), compute(want, rank))
            sharding.of(model).verify()

    ranks.run(2, work)


# ---- Marks of bitsandbytes' Linear4bit, which is not installed here ----


class Linear4bit(nn.Linear):
    """It packs its weight in its first pass, and unpacks it when a state_dict is asked for."""

    support_avx512bf16_for_cpu = True

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=False)

    def pack(self, is_packed):
        if self.weight.quant_state.packing_format_for_cpu != is_packed:
            self.weight.data = self.weight.data.t().contiguous()
            self.weight.quant_state.packing_format_for_cpu = is_packed

    def forward(self, x):
        if self.support_avx512bf16_for_cpu:
            self.pack(True)
        is_packed = self.weight.quant_state.packing_format_for_cpu
        return nn.functional.linear(x, self.weight.t() if is_packed else self.weight, self.bias)

    def _save_to_state_dict(self, *arguments):
        self.pack(False)
        super()._save_to_state_dict(*arguments)


def of_4bit(packs):
    model = ranks.stack()
    for layer in model.layers:
        layer.up = Linear4bit(37, 75).requires_grad_(False)
        layer.up.support_avx512bf16_for_cpu = packs
    return model


@pytest.mark.parametrize("has_run", [False, True])
def test_weights_that_are_packed_in_the_first_pass_are_refused_by_name(has_run):
    model = of_4bit(packs=True)
    want = compute(model) if has_run else None
    for how in ({"modules": "*.up"}, {"modules": "layers.*", "scope": "block"}):
        with pytest.raises(sharding.Refused, match=r"layers\.0\.up is a Linear4bit that packs.*_for_cpu = False"):
            sharding.shard(model, **how)
    assert want is None or torch.equal(compute(model), want)


def test_weights_that_are_no_longer_packed_are_shared():
    def work(rank, size):
        for has_run in (False, True):
            torch.manual_seed(2)
            model = of_4bit(packs=False)
            want = compute(model, rank)
            if not has_run:
                torch.manual_seed(2)
                model = of_4bit(packs=False)
            sharding.shard(model, "*.up", transport="shm:copy")
            for _ in range(2):
                assert torch.equal(compute(model, rank), want)

    ranks.run(2, work)


# ---- What is saved ----


def told_of_savings(rank, size, n_layers, options, modules="*.up"):
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("layershard").addHandler(handler)
    model = sharding.shard(ranks.stack(n_layers=n_layers), modules, **options)
    report = sharding.of(model).report()
    assert all(line in report for line in lines)
    return [line for line in lines if "saves nothing" in line]


def test_series_that_saves_nothing_is_named():
    few = ranks.run(2, told_of_savings, 3, {"transport": "shm:copy"})
    assert all(len(lines) == 1 and "layers.*.up" in lines[0] for lines in few)
    assert "its 3 layers" in few[1][0] and "2 windows" in few[1][0] and "smaller prefetch" in few[1][0]


def test_series_that_save_nothing_are_counted():
    for lines in ranks.run(2, told_of_savings, 3, {"transport": "shm:copy"}, ["*.up", "*.down", "*.norm"]):
        assert len(lines) == 1 and "and so do 2 series more" in lines[0]


@pytest.mark.parametrize(
    ("size", "n_layers", "options"),
    [(2, 9, {"transport": "shm:copy"}), (2, 3, {"transport": "shm"}), (1, 3, {}), (2, 9, {"resident": "all"})],
    ids=["many layers", "in place", "alone", "all kept"],
)
def test_series_that_saves_says_nothing(size, n_layers, options):
    assert not any(ranks.run(size, told_of_savings, n_layers, options))

# SPDX-License-Identifier: Apache-2.0
"""What programs do to shared tensors from outside is told at the next pass, by the tensor's name."""

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
mkldnn = pytest.importorskip("torch.utils.mkldnn")

NEW = torch.zeros(75, 37)


def compute(model, rank):
    with torch.inference_mode():
        return model(ranks.inputs(rank))


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def assign(module):
    module.weight = torch.nn.Parameter(NEW.clone(), requires_grad=False)


def give_data(module):
    module.weight.data = NEW.clone()


def swap(module):
    torch.utils.swap_tensors(module.weight, torch.nn.Parameter(NEW.clone(), requires_grad=False))


def wrap(module):
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


def delete(module):
    del module.weight
    module.weight = NEW.clone()


def write(module):
    with torch.no_grad():
        module.weight.add_(1)


REPLACE = [assign, give_data, swap, wrap, delete]


def refused(rank, size, spoil, how, words):
    model, want = sharding.shard(ranks.stack(), **how, transport="shm:copy"), ranks.stack()
    assert torch.equal(compute(model, rank), compute(want, rank))
    spoil(model.layers[rank].up)
    with pytest.raises(sharding.Guarded, match=rf"layers\.{rank}\.up\.weight .*{words}.*update\(\)"):
        compute(model, rank)


@pytest.mark.parametrize("spoil", REPLACE, ids=lambda each: each.__name__)
def test_what_is_replaced_or_wrapped_is_named(spoil):
    for how in ({"modules": "*.up"}, {"modules": "layers.*", "scope": "block"}):
        ranks.run(2, refused, spoil, how, "no longer what layershard put there")


def test_what_is_written_in_place_is_named():
    for how in ({"modules": "*.up"}, {"modules": "layers.*", "scope": "block"}):
        ranks.run(2, refused, write, how, "written in place outside an update")


def test_buffers_are_looked_at_too():
    def work(rank, size):
        model = sharding.shard(ranks.stack(), "layers.*", scope="block", transport="shm:copy", buffers="*.scale")
        model.layers[rank].scale.mul_(2)
        with pytest.raises(sharding.Guarded, match=rf"layers\.{rank}\.scale was written"):
            for _ in range(3):
                compute(model, rank)

    ranks.run(2, work)


def test_an_update_mends_it():
    def work(rank, size):
        model, new = sharding.shard(ranks.stack(), "*.up", transport="shm:copy"), ranks.stack()
        for layer in new.layers:
            layer.up.weight.data.fill_(0.25)
        for spoil in (write, assign):
            spoil(model.layers[rank].up)
            with pytest.raises(sharding.Guarded):
                compute(model, rank)
            with sharding.of(model).update() as update:
                update.copy((name, tensor) for name, tensor in new.state_dict().items() if "up.weight" in name)
            for _ in range(2):
                assert torch.equal(compute(model, rank), compute(new, rank))

    ranks.run(2, work)


def test_what_is_put_back_is_right_again():
    def work(rank, size):
        model, want = sharding.shard(ranks.stack(), "*.up", transport="shm:copy"), ranks.stack()
        up = model.layers[2].up
        weight = up.weight
        assign(up)
        with pytest.raises(sharding.Guarded):
            compute(model, rank)
        up.weight = weight
        assert torch.equal(compute(model, rank), compute(want, rank))

    ranks.run(2, work)


def test_replaced_under_compile_is_named():
    def work(rank, size):
        model = sharding.shard(ranks.stack(), "*.up", transport="shm:copy")
        run = torch.compile(model, backend="eager")
        for _ in range(3):
            compute(run, rank)
        assign(model.layers[1].up)
        with pytest.raises(sharding.Guarded, match=r"layers\.1\.up\.weight is no longer"):
            compute(run, rank)

    ranks.run(2, work)


def test_passes_in_every_mode_are_no_writes():
    def work(rank, size):
        model = sharding.shard(ranks.stack(), "layers.*", scope="block", transport="shm:copy")
        want, run = compute(ranks.stack(), rank), torch.compile(model, backend="eager")
        for _ in range(3):
            assert torch.equal(compute(model, rank), want)
            with torch.no_grad():
                assert torch.equal(model(ranks.inputs(rank)), want)
                assert torch.allclose(run(ranks.inputs(rank)), want, atol=1e-5)

    ranks.run(2, work)


# ---- Modules that are replaced ----


class Fused(torch.nn.Module):
    """Reads the weights of a linear that is never called again."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


class Beside(torch.nn.Module):
    """Calls it, as adapters do."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear

    def forward(self, x):
        return self.base(x)


def fuse(layer):
    layer.up = Fused(layer.up)


def pack(layer):
    layer.up = mkldnn.to_mkldnn(layer.up)


def convert(layer):
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(layer)


def of_norms():
    model = ranks.stack()
    for layer in model.layers:
        layer.norm = torch.nn.BatchNorm1d(37).eval()
    return model


def test_modules_whose_weights_are_taken_over_are_refused():
    def work(rank, size):
        model, want = sharding.shard(of_norms(), ["*.up", "*.norm"], transport="shm:copy"), of_norms()
        for replace, name in ((fuse, "up"), (pack, "up"), (convert, "norm")):
            with pytest.raises(sharding.Guarded, match=rf"layers\.1\.{name} would be replaced by a \w+ that takes"):
                replace(model.layers[1])
            assert torch.equal(compute(model, rank), compute(want, rank))
        sharding.of(model).detach()
        fuse(model.layers[1])
        assert torch.equal(compute(model, rank), compute(want, rank))

    ranks.run(2, work)


def test_modules_may_be_replaced_where_others_wait_or_nothing_is_taken_over():
    def replaced(model):
        for layer in model.layers:
            layer.up = Beside(layer.up)
            layer.up = layer.up.base
        model.layers[2].up = torch.nn.Identity()
        model.layers[2].down = torch.nn.Identity()
        return model

    def work(rank, size):
        want = compute(replaced(ranks.stack()), rank)
        model = replaced(sharding.shard(ranks.stack(), "*.up", transport="shm:copy"))
        assert torch.equal(compute(model, rank), want)
        model, want = sharding.shard(of_norms(), "layers.*", scope="block", transport="shm:copy"), of_norms()
        for layer in model.layers:
            fuse(layer)
            convert(layer)
        assert torch.equal(compute(model, rank), compute(want, rank))

    ranks.run(2, work)


# ---- Packed ----


def quantise(model):
    """Puts what packs the weights straight where the linears were."""
    torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)


def pack_by_name(model):
    for layer in model.layers:
        layer.up = mkldnn.to_mkldnn(layer.up)


def packed(rank, size, replace, warm):
    """In the next pass at the latest, by every rank, and by check; right again when the module is back."""
    model, x = sharding.shard(nested(), "layers.*", scope="block", transport="shm:copy"), ranks.inputs(rank)
    want = compute(nested(), rank)
    linears = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    for _ in range(warm):
        compute(model, rank)
    words = r"layers\.0\.\S+ is replaced by a \w+, which packs weights of its own"
    with pytest.raises(sharding.Guarded, match=words):
        replace(model)
        compute(model, rank)
    if replace is quantise:
        with pytest.raises(sharding.Guarded, match=words):
            compute(model, rank)
        with pytest.raises(sharding.CheckFailed, match=words), torch.inference_mode():
            sharding.check(model, x)
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    assert torch.equal(compute(model, rank), want)


class Within(torch.nn.Module):
    """A block in a block: what is replaced lies further down."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def nested():
    model = ranks.stack()
    for layer in model.layers:
        layer.down = Within(layer.down)
    return model


@pytest.mark.parametrize("replace, warm", [(quantise, 0), (quantise, 3), (pack_by_name, 0)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_modules_in_a_block_are_not_replaced_by_such_as_pack_weights(replace, warm):
    ranks.run(2, packed, replace, warm)


def packed_in_place(rank, size):
    """Where nothing moves, and of what is not shared, it is right."""
    model, want = sharding.shard(ranks.stack(), "layers.*", scope="block", transport="shm"), ranks.stack()
    quantise(model)
    quantise(want)
    assert torch.equal(compute(model, rank), compute(want, rank))
    model, want = sharding.shard(ranks.stack(), "*.norm", scope="block", transport="shm:copy"), ranks.stack()
    quantise(model)
    quantise(want)
    assert torch.equal(compute(model, rank), compute(want, rank))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_is_read_in_place_or_not_shared_may_be_packed():
    ranks.run(2, packed_in_place)

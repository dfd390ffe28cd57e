# SPDX-License-Identifier: Apache-2.0
"""Inside update() every way to write weights arrives on all ranks, or is refused by name on all of them."""

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
peft = pytest.importorskip("peft")  # before ranks are forked: it takes seconds

BY = [{"transport": "shm"}, {"transport": "shm:copy", "placement": "striped"}]


def sharded(**options):
    return sharding.shard(ranks.stack(), "layers.*", scope="block", buffers="*", **options)


def compute(model, rank):
    with torch.inference_mode():
        return model(ranks.inputs(rank))


def parameter(new):
    return torch.nn.Parameter(new, requires_grad=False)


def deleted_first(module, new):
    del module.weight
    module.weight = parameter(new)


def made_a_buffer(module, new):
    del module.weight
    module.register_buffer("weight", new)


def merged_safely(module, new):
    """As adapters are merged: a copy is changed, looked at, and put in place."""
    merged = module.weight.data.clone()
    norms = torch.linalg.norm(merged, dim=1, keepdim=True)
    assert torch.isfinite(merged).all() and torch.isfinite(merged / norms).all()
    module.weight.data = merged.copy_(new)


def turned_in_place(module, new):
    """The weight's own memory, read by columns: what is copied to it overlaps it."""
    module.weight.view(-1).copy_(new.t().reshape(-1))
    module.weight.data = module.weight.data.as_strided(new.shape, (1, new.shape[0]))


ARRIVE = {
    "copy_": lambda module, new: module.weight.data.copy_(new),
    "data": lambda module, new: setattr(module.weight, "data", new),
    "data, columns first": lambda module, new: setattr(module.weight, "data", new.t().contiguous().t()),
    "set_": lambda module, new: module.weight.set_(new),
    "Parameter": lambda module, new: setattr(module, "weight", parameter(new)),
    "Parameter, deleted first": deleted_first,
    "buffer": made_a_buffer,
    "plain attribute": lambda module, new: (delattr(module, "weight"), setattr(module, "weight", new)),
    "swap_tensors": lambda module, new: torch.utils.swap_tensors(module.weight, parameter(new)),
    "load_state_dict": lambda module, new: module.load_state_dict({"weight": new}, strict=False),
    "assign": lambda module, new: module.load_state_dict({"weight": new}, strict=False, assign=True),
    "merged": merged_safely,
    "turned in place": turned_in_place,
}


def every_idiom(rank, size, options):
    model, want = sharded(**options), ranks.stack()
    objects = [id(each) for each in model.parameters()]
    addresses = [each.data_ptr() for each in model.parameters()]
    names = sorted(name for name, _ in model.named_parameters())
    for seed, (name, idiom) in enumerate(ARRIVE.items(), 10):
        new = ranks.stack(seed=seed)
        with torch.no_grad(), sharding.of(model).update():
            for layer, source in zip(model.layers, new.layers, strict=True):
                idiom(layer.up, source.up.weight.detach().clone())
        for layer, source in zip(want.layers, new.layers, strict=True):
            layer.up.weight = source.up.weight
        assert torch.equal(compute(model, rank), compute(want, rank)), name
        assert sorted(id(each) for each in model.parameters()) == sorted(objects), name
        assert sorted(each.data_ptr() for each in model.parameters()) == sorted(addresses), name
        assert sorted(name for name, _ in model.named_parameters()) == names, name
        assert all(not each.requires_grad for each in model.layers.parameters()), name


@pytest.mark.parametrize("options", BY, ids=str)
def test_every_way_to_write_a_weight_arrives(options):
    ranks.run(2, every_idiom, options)


def parametrized(model, index):
    torch.nn.utils.parametrizations.weight_norm(model.layers[index].up, "weight")


def exchanged(model, index):
    mine, other = model.layers[index].up.weight, model.layers[index + 2].up.weight  # of one source
    mine.data, other.data = other.data, mine.data


def of_another_dtype(model, index):
    model.layers[index].up.weight.data = model.layers[index].up.weight.data.half()


def of_another_shape(model, index):
    model.layers[index].up.weight = parameter(torch.zeros(3, 4))


def deleted(model, index):
    del model.layers[index].up.weight


def on_meta(model, index):
    model.layers[index].up.weight = parameter(torch.empty(75, 37, device="meta"))


REFUSED = {
    of_another_dtype: r"layers.1.up.weight is now float16 \[75, 37\]; the shared weight is float32 \[75, 37\]",
    of_another_shape: r"layers.1.up.weight is now float32 \[3, 4\]",
    exchanged: r"layers.1.up.weight is now memory of layers.3.up.weight.*clone it",
    deleted: "layers.1.up.weight is gone",
    on_meta: "layers.1.up.weight is now a Tensor on meta",
    parametrized: "layers.1.up.weight is gone",
}


def every_refusal(rank, size, options):
    for spoil, text in REFUSED.items():
        model = sharded(**options)
        handle, want = sharding.of(model), ranks.stack()
        with pytest.raises(Exception) as caught, torch.no_grad(), handle.update():
            if rank == 1:  # where layer 1 is stored
                spoil(model, 1)
        assert caught.type.__name__ == ("Refused" if rank == 1 else "CallbackFailed")
        if rank == 1:
            caught.match(text)
        with pytest.raises(sharding.Guarded, match="update has failed"):
            compute(model, rank)
        if spoil is not parametrized:
            with handle.update() as update:
                update.copy((name, tensor) for name, tensor in want.state_dict().items() if "layers." in name)
            assert torch.equal(compute(model, rank), compute(want, rank)), text
        handle.close()


@pytest.mark.parametrize("options", BY, ids=str)
def test_what_cannot_be_taken_is_refused_by_name_and_the_next_update_mends_it(options):
    ranks.run(2, every_refusal, options)


def compiled_after_a_failure(rank, size, options):
    model, want = sharded(**options), ranks.stack()
    program = torch.compile(lambda x: model(x), backend="eager")  # to dynamo, the model's hooks are part of a function
    assert torch.equal(compute(program, rank), compute(want, rank))
    with pytest.raises(sharding.Refused, match="is now float16"), sharding.of(model).update():
        of_another_dtype(model, rank)
    with pytest.raises(sharding.Guarded, match="update has failed"):
        compute(program, rank)
    with sharding.of(model).update() as update:
        update.copy((name, tensor) for name, tensor in want.state_dict().items() if "layers." in name)
    assert torch.equal(compute(program, rank), compute(want, rank))


@pytest.mark.parametrize("options", BY, ids=str)
def test_a_compiled_program_makes_no_pass_after_a_failed_update(options):
    ranks.run(2, compiled_after_a_failure, options)


def compiled_in_an_update(rank, size, options, whole):
    model, want = sharded(**options), ranks.stack()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    program = torch.compile(lambda x: model(x), fullgraph=whole, backend=backend)
    for _ in range(3):
        assert torch.equal(compute(program, rank), compute(want, rank))
        with sharding.of(model).update() as update:
            # with fullgraph, dynamo has an exception of its own that quotes ours
            with pytest.raises(Exception if whole else sharding.Guarded, match="update of the shared|put there"):
                compute(program, rank)
            with torch.no_grad():
                for layer in want.layers:
                    layer.up.weight *= 1.5
            update.copy((name, tensor) for name, tensor in want.state_dict().items() if "layers." in name)
    assert torch.equal(compute(program, rank), compute(want, rank))
    assert len(made) <= 2  # the gate is in it from the first update on


@pytest.mark.parametrize("options", BY, ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["", "fullgraph"])
def test_a_compiled_program_makes_no_pass_in_an_update(options, whole):
    ranks.run(2, compiled_in_an_update, options, whole)


# ---- peft ----


def adapted(dora):
    model = ranks.stack()
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["up", "down"], use_dora=dora, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def merged_adapter(rank, size, dora, safe, options):
    model, want = adapted(dora), adapted(dora)
    base = model.base_model.model
    sharding.shard(base, "layers.*base_layer", **options)
    for call, arguments in (("merge_adapter", {"safe_merge": safe}), ("unmerge_adapter", {})):
        with torch.no_grad(), sharding.of(base).update():
            getattr(model, call)(**arguments)
        getattr(want, call)(**arguments)
        assert torch.equal(compute(model, rank), compute(want, rank)), call


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("safe", [False, True], ids=["in place", "safe_merge"])
@pytest.mark.parametrize("options", BY, ids=str)
def test_an_adapter_is_merged_and_taken_out_again(dora, safe, options):
    ranks.run(2, merged_adapter, dora, safe, options)

# SPDX-License-Identifier: Apache-2.0
"""Inside update() own weights computed from another rank's are refused by name; what only looks like it is right."""

import sys
import threading

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
nn = torch.nn

BY = [
    {"transport": "shm"},
    {"transport": "shm:copy", "placement": "striped"},
    {"transport": "shm:copy", "scope": "linear"},
]


def stack():
    return ranks.stack(n_layers=4, width=6)


def sharded(scope="block", **options):
    patterns = "layers.*" if scope == "block" else ["layers.*.up", "layers.*.down"]
    return sharding.shard(stack(), patterns, scope=scope, **options)


def compute(model, rank):
    with torch.inference_mode():
        return model(ranks.inputs(rank))


def weights(model):
    return [layer.up.weight for layer in model.layers]


def averaged(model):
    first, second, *_ = weights(model)
    first.copy_((first + second) / 2)


def cloned(model):
    first, second, *_ = weights(model)
    first.data = second.data.clone()


def by_state(model):
    shifted = {f"{index}.up.weight": each.clone() for index, each in enumerate(weights(model)[1:])}
    model.layers.load_state_dict(shifted, strict=False, assign=True)


def replaced(model):
    first, second, *_ = weights(model)
    model.layers[0].up.weight = nn.Parameter(second * 2, requires_grad=False)


def swapped(model):
    first, second, *_ = weights(model)
    torch.utils.swap_tensors(first, nn.Parameter(second.t().contiguous().t(), requires_grad=False))


def by_global_norm(model):
    norm = torch.stack([each.norm() for each in weights(model)]).norm()
    for each in weights(model):
        each.div_(norm)


def by_its_own_columns(model):
    first, second, *_ = weights(model)
    first.view(-1)[5:9].copy_(second.t()[0, :4])


def joined(model):
    values = torch.stack(weights(model))
    weights(model)[0].copy_(values.mean(0))


def vector_normalized(model):
    values = nn.utils.parameters_to_vector(weights(model))
    nn.utils.vector_to_parameters(values / values.norm(), weights(model))


def by_a_list(model):
    first, second, third, *_ = weights(model)
    torch._foreach_add_([third, first], [third.clone(), second])


def by_out(model):
    first, second, *_ = weights(model)
    torch.add(first, first, out=first)
    torch.sub(second, first, out=first)


def through_sparse(model):
    first, second, *_ = weights(model)
    first.copy_((second.to_sparse() * 2).to_dense())


def through_a_map(model):
    first, second, *_ = weights(model)
    first.copy_(torch.vmap(lambda a, b: a + b)(first, second))


def written_too_early(model):
    """Scratch is one layer's worth: what was written to the second is gone when the fourth is written."""
    for each in weights(model):
        each.fill_(0.5)
    weights(model)[0].copy_(weights(model)[1])


def by_compiled_code(model):
    first, second, *_ = weights(model)
    torch.compile(lambda a, b: a.mul_(b), backend="eager")(first, second)


MIXED = [
    averaged,
    cloned,
    by_state,
    replaced,
    swapped,
    by_global_norm,
    by_its_own_columns,
    joined,
    vector_normalized,
    by_a_list,
    by_out,
    through_sparse,
    through_a_map,
    written_too_early,
]


def every_mix(rank, size, options, mixes):
    model, want = sharded(**options), stack()
    handle = sharding.of(model)
    values = {place.name: want.get_parameter(place.name) for place in handle.all_places()}
    for mix in mixes:
        with pytest.raises(Exception) as caught, torch.no_grad(), handle.update():
            mix(model)
        if rank == 0:  # where layers 0 and 2 are stored
            assert caught.type is sharding.Refused, mix
            caught.match(r"layers\.[02]\.\w+\.\w+ was computed from layers\.[13]\.\w+\.\w+, .*state_dict\(\)")
        else:
            assert caught.type.__name__ in ("Refused", "CallbackFailed"), mix
        with pytest.raises(sharding.Guarded, match="update has failed"):
            compute(model, rank)
        with handle.update() as update:
            update.copy(values)
        assert torch.equal(compute(model, rank), compute(want, rank)), mix


@pytest.mark.parametrize("options", BY, ids=str)
def test_own_weights_computed_from_another_rank_s_are_refused_by_name(options):
    ranks.run(2, every_mix, options, MIXED)


def test_compiled_code_is_followed_too():
    ranks.run(2, every_mix, BY[0], [by_compiled_code, averaged, by_compiled_code])


# ---- What is not shared ----


def norms_by_weights(model):
    for layer in model.layers:
        size = layer.up.weight.abs().amax(0)
        layer.up.weight.div_(size)
        layer.norm.weight.mul_(size)
        layer.norm.bias.mul_(size)


def scales_by_weights(model):
    for layer in model.layers:
        layer.scale.mul_(layer.down.weight.abs().max())


def head_by_a_weight(model):
    for each in weights(model)[:2]:
        model.head.weight[0] = each.mean(0)


def registered(model):
    for layer in model.layers:
        layer.register_buffer("size", layer.up.weight.norm())


def attributes(model):
    for layer in model.layers:
        layer.size = layer.up.weight.norm()


def listed(model):
    for layer in model.layers:
        layer.sizes = {"all": [layer.up.weight.norm()]}


def gradients(model):
    model.embed.weight.grad = torch.ones_like(model.embed.weight) * weights(model)[0].sum() * weights(model)[1].sum()


def wrapped(model):
    first, second, *_ = weights(model)
    model.rows = torch.nested.nested_tensor([first[0], second[0]], layout=torch.jagged)


NOT_SHARED = {
    norms_by_weights: "norm.(weight|bias)",
    scales_by_weights: "scale",
    head_by_a_weight: "head.weight",
    registered: "size",
    attributes: "size",
    listed: "sizes",
    gradients: "embed.weight.grad",
    wrapped: "rows",
}


def every_unshared(rank, size, options):
    model, want = sharded(**options), stack()
    values = dict(want.state_dict())
    handle = sharding.of(model)
    shared = {place.name for place in handle.all_places()}
    for change, name in NOT_SHARED.items():
        with pytest.raises(Exception) as caught, torch.no_grad(), handle.update():
            change(model)
        if rank == 0 or change is not head_by_a_weight:  # there the last that was read is rank 1's own
            assert caught.type is sharding.Refused, change
            caught.match(rf"{name}.*: not shared, and computed from layers\.\d.*in the same pattern.*state_dict\(\)")
        with pytest.raises(sharding.Guarded, match="update has failed"):
            compute(model, rank)
        with torch.no_grad(), handle.update() as update:  # the ranks' own tensors stayed as they were left
            update.copy({name: value for name, value in values.items() if name in shared})
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name in values and name not in shared:
                    tensor.copy_(values[name])
                    tensor.grad = None
            for each in model.modules():
                vars(each).pop("sizes", None)
                vars(each).pop("rows", None)
        assert torch.equal(compute(model, rank), compute(want, rank)), change


def test_what_is_not_shared_but_computed_from_another_rank_s_weight_is_refused_by_name():
    ranks.run(2, every_unshared, {"transport": "shm:copy", "scope": "linear"})


# ---- What stays right ----


def vector_scaled(model):
    every = list(model.layers.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(every) * 0.5 + 1, every)


def stacked(model):
    values = torch.stack(weights(model)).mul_(2).half().float()
    for each, value in zip(weights(model), values, strict=True):
        each.copy_(value)


def by_lists(model):
    every = list(model.layers.parameters())
    torch._foreach_mul_(every, 0.5)
    torch._foreach_lerp_(every, torch._foreach_neg(every), 0.1)


def by_optimizers(model):
    every = list(model.layers.parameters())
    for each in every:
        each.grad = torch.ones_like(each)
    torch.optim.AdamW(every, lr=0.1, foreach=True).step()
    torch.optim.SGD(every, lr=0.1, fused=True).step()
    for each in every:
        each.grad = None


def by_one_buffer(model):
    buffer, other = torch.empty_like(weights(model)[0]), torch.empty_like(weights(model)[0])
    for each in weights(model):
        buffer.copy_(each).mul_(2)
        torch.add(buffer, 1, out=other)
        each.copy_(other)


def repaired(model):
    averaged(model)
    for each in weights(model):
        nn.init.uniform_(each, 0.5, 0.5)


def only_looked_at(model):
    sizes = torch.stack([each.norm() for each in weights(model)]).sum()
    assert torch.isfinite(sizes).item()
    for each in weights(model):
        each.copy_(torch.zeros_like(each + sizes))


def unshared_with_all(model):
    """Each tensor by itself, shared or not."""
    every = list(model.parameters())
    torch._foreach_mul_(every, 0.5)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(every) * 0.5 + 1, every)


def given_memory_first(model):
    """What was put in the place of another rank's weight is the same on all ranks."""
    for layer in model.layers:
        layer.up.weight.data = torch.full_like(layer.up.weight.data, 0.25)
    averaged(model)


def kept_in_lists(model):
    """As recurrent modules keep their weights."""
    for layer in model.layers:
        layer.every = [layer.up.weight]
        layer.every[0].mul_(2)


def written_before_it_is_read(model):
    first, second, third, *_ = weights(model)
    new = torch.linspace(-1, 1, second.numel()).view(second.shape)
    second.copy_(new).mul_(2)
    first.copy_(second + 1)
    third.fill_(0.25)
    second.sub_(third)


RIGHT = [vector_scaled, stacked, by_lists, by_one_buffer, repaired, only_looked_at]
RIGHT += [unshared_with_all, given_memory_first, kept_in_lists, written_before_it_is_read]


def every_right_way(rank, size, options, changes):
    model, want, compiler = sharded(**options), stack(), "torch._dynamo" in sys.modules
    for change in changes:
        with torch.no_grad(), sharding.of(model).update():
            change(model)
        with torch.no_grad():
            change(want)
        assert torch.equal(compute(model, rank), compute(want, rank)), change
    assert compiler or changes != RIGHT or "torch._dynamo" not in sys.modules  # to import it takes seconds


@pytest.mark.parametrize("options", BY, ids=str)
def test_what_goes_through_one_tensor_or_one_call_but_does_not_mix_stays_right(options):
    ranks.run(2, every_right_way, options, RIGHT)


def test_steps_of_optimizers_stay_right():
    ranks.run(2, every_right_way, BY[0], [by_optimizers])


def taken_before(rank, size, options):
    model, want = sharded(**options), stack()
    before = sharding.of(model).state_dict()
    mean = sum(before[f"layers.{index}.up.weight"] for index in range(4)) / 4
    with torch.no_grad(), sharding.of(model).update() as update:
        weights(model)[0].copy_(mean)
        update.copy({f"layers.{index}.up.weight": mean for index in (1, 2)})
    with torch.no_grad():
        for each in weights(want)[:3]:
            each.copy_(mean)
    assert torch.equal(compute(model, rank), compute(want, rank))
    with pytest.raises(Exception, match="layers.0.up.weight was computed from layers.3|rank 0"):
        with sharding.of(model).update() as update:
            update.copy({"layers.0.up.weight": weights(model)[3] * 2})


@pytest.mark.parametrize("options", BY, ids=str)
def test_what_is_needed_of_other_ranks_is_taken_before_the_update(options):
    ranks.run(2, taken_before, options)


# ---- Compiled and sent ----


def by_conditions(model):
    for each in weights(model):
        each.copy_(torch.cond(torch.tensor(True), lambda a: a * 2, lambda a: a + 1, (each,)))


def by_whole_graphs(model):
    for each in weights(model):
        each.copy_(torch.compile(lambda a: a * 2, backend="eager", fullgraph=True)(each))


def mixed_by_conditions(model):
    first, second, *_ = weights(model)
    first.copy_(torch.cond(torch.tensor(True), lambda a, b: a * b, lambda a, b: a + b, (first, second)))


def closed_over(model):
    first, second, *_ = weights(model)
    first.copy_(torch.cond(torch.tensor(True), lambda a: a * second, lambda a: a + 1, (first,)))


def closed_over_in_each(model):
    from torch._higher_order_ops.map import map

    first, second, *_ = weights(model)
    first.copy_(map(lambda row: row * second.sum(), first))


def compiling(rank, size):
    """In the first body the compiler is imported, where no other test has done so."""
    every_right_way(rank, size, BY[0], [by_conditions, by_whole_graphs])
    every_mix(rank, size, BY[0], [mixed_by_conditions, closed_over, closed_over_in_each])
    assert torch.compile(lambda a: a * 2, backend=lambda graph, _: graph.forward, fullgraph=True)(torch.ones(1)) == 2


def test_what_the_compiler_must_not_break_up_runs_in_eager_mode():
    ranks.run(2, compiling)


def one_by_one(model, rank):
    new = dict(ranks.stack(seed=7, n_layers=4, width=6).named_parameters())
    for name, each in model.named_parameters():
        each.copy_(new[name]) if rank == 0 else None
        torch.distributed.broadcast(each.data, 0)


def gathered(model, rank):
    """What each rank stores, wherever it is written."""
    for index, each in enumerate(weights(model)):
        given = each * 2 if rank == index % 2 else torch.ones_like(each)
        torch.distributed.all_reduce(given)
        each.copy_(given - 1)


def all_before(model, rank):
    if rank == 0:
        model.load_state_dict(ranks.stack(seed=7, n_layers=4, width=6).state_dict(), strict=False)
    for each in model.parameters():
        torch.distributed.broadcast(each.data, 0)


def still_under_way(model, rank):
    for each in weights(model):
        each.fill_(0.5)
        torch.distributed.broadcast(each.data, 0, async_op=True).wait()


def reduced(model, rank):
    for each in weights(model):
        torch.distributed.all_reduce(each.data)


def all_gathered(model, rank):
    for each in weights(model):
        torch.distributed.all_gather([torch.empty_like(each) for _ in range(2)], each.data)


def functional(model, rank):
    from torch.distributed._functional_collectives import all_reduce

    for each in weights(model):
        each.copy_(all_reduce(each.data, "sum", torch.distributed.group.WORLD))


def every_collective(rank, size, store):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for change in (one_by_one, gathered):
        model, want = sharded(**BY[1]), stack()
        with torch.no_grad(), sharding.of(model).update():
            change(model, rank)
        with torch.no_grad():
            change(want, rank)
        assert torch.equal(compute(model, rank), compute(want, rank)), change
    model = sharded(**BY[1])
    for change in (all_before, still_under_way, reduced, all_gathered, functional):
        with pytest.raises(Exception) as caught, torch.no_grad(), sharding.of(model).update():
            change(model, rank)
        if rank == 0:
            assert caught.type is sharding.Refused, change
            caught.match(r"(broadcast|all_?reduce|all_?gather) gave other ranks what was computed from layers\.[13]\.")
        else:
            assert caught.type.__name__ in ("Refused", "CallbackFailed"), change


def test_what_is_given_to_other_ranks_is_not_computed_from_scratch(tmp_path):
    ranks.run(2, every_collective, tmp_path / "store")


# ---- Words ----


def memory_of_one_s_own(rank, size):
    model = sharded(transport="shm:copy")
    with pytest.raises(sharding.Refused) as caught, sharding.of(model).update():
        for layer in model.layers:
            layer.norm.weight.data = layer.norm.bias.data
    caught.match("layers.0.norm.weight is now memory of layers.0.norm.bias")


def test_of_weights_that_share_scratch_the_one_that_is_meant_is_named():
    ranks.run(2, memory_of_one_s_own)


def nested(rank, size, is_caught):
    model, want = sharded(transport="shm:copy"), stack()
    handle = sharding.of(model)
    if is_caught:
        with handle.update():
            weights(model)[rank].data.fill_(0.5)
            with pytest.raises(sharding.Refused, match="under way already: end it"), handle.update():
                pass
            weights(model)[rank + 2].data.fill_(0.5)
        for each in weights(want):
            each.data.fill_(0.5)
        assert torch.equal(compute(model, rank), compute(want, rank))
        return
    with pytest.raises(sharding.Refused, match="under way already: end it"), handle.update(), handle.update():
        pass
    with pytest.raises(sharding.Guarded, match="update has failed"):
        compute(model, rank)
    with handle.update() as update:
        update.copy(want.layers.named_parameters(prefix="layers"))
    assert torch.equal(compute(model, rank), compute(want, rank))


@pytest.mark.parametrize("is_caught", [False, True])
def test_an_update_within_an_update_is_refused(is_caught):
    ranks.run(2, nested, is_caught)


# ---- Following ----


def test_nothing_followed_is_kept_alive():
    from layershard.torch.updates.origins import Origins

    finders = list(sys.meta_path)
    with Origins() as origins:
        source = torch.ones(3)
        origins.follow(source, "there")
        for _ in range(3000):
            result = source * 2
        assert origins.source_of(result[1:]) == "there"
        assert len(origins._storages.known) < 1100
        sparse = result.to_sparse()
        assert origins.source_of(sparse) == "there"
        address = result.data_ptr()
        del source, result, sparse
        new = torch.ones(3)
        assert origins.source_of(new) is None
    assert address and sys.meta_path == finders


def test_other_threads_are_not_followed_and_do_not_break():
    from layershard.torch.updates.origins import Origins

    found = []
    with Origins() as origins:
        source = torch.ones(3)
        origins.follow(source, "there")
        thread = threading.Thread(target=lambda: found.append(source * 2))
        thread.start()
        thread.join()
        assert origins.source_of(found[0]) is None

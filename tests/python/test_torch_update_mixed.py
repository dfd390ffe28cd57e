# SPDX-License-Identifier: Apache-2.0
"""Inside update() tensors of several layers go through one operator: what keeps the layers apart is right."""

import sys
import warnings

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
F = torch.nn.functional

BY = [{"transport": "shm"}, {"transport": "shm:copy", "placement": "striped"}]
WIDTH = 6
TURN = torch.linspace(-1, 1, WIDTH * WIDTH).view(WIDTH, WIDTH)
BACKWARDS = torch.arange(WIDTH - 1, -1, -1).view(1, -1, 1)
FACTORS = torch.tensor([1.0, 2.0, 3.0, 4.0])


# What these import, seconds of it, is there when ranks are forked.
torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged).unbind()


def stack():
    return ranks.stack(n_layers=4, width=WIDTH)


def compute(model, rank):
    with torch.inference_mode():
        return model(ranks.inputs(rank))


def weights(model):
    return [layer.up.weight for layer in model.layers]


# ---- Ways from the weights of all layers to new ones ----


def by_largest(values):
    every = torch.stack(values)
    return every / every.abs().amax((1, 2), keepdim=True)


def by_deviation(values):
    every = torch.stack(values)
    return (every - every.mean(2, True)) / every.std(2, keepdim=True)


def quantised(values):
    every = torch.stack(values)
    size = every.abs().amax(-1, keepdim=True) / 127
    return (every / size).round().clamp(-127, 127).to(torch.int8) * size


def by_columns(values):
    buffer = torch.zeros(len(values[0]), 4 * WIDTH)
    for index, each in enumerate(values):
        buffer[:, index::4] = each
    return [buffer[:, index::4] * 2 for index in range(4)]


def by_index_copy(values):
    buffer = torch.zeros(4, *values[0].shape)
    for index, each in enumerate(values):
        buffer.index_copy_(0, torch.tensor([3 - index]), each[None] * 2)
    return buffer.flip(0)


def by_index(values):
    buffer, order = torch.stack(values), torch.tensor([2, 0, 3, 1])
    buffer[order] = buffer[order] * 2
    return buffer[order][torch.argsort(order)]


def by_bytes(values):
    return torch.cat(values, 1).view(torch.uint8).clone().view(torch.float32).chunk(4, 1)


def looked_at_by_more(values):
    """By elements that begin in one layer and end in the next."""
    flat = torch.cat([each.view(-1)[:-1] for each in values])
    flat[: len(flat) // 2 * 2].view(torch.float64).isfinite().all()
    flat.view(torch.uint8).sum()
    return [torch.cat([part, part[:1]]).view(values[0].shape) for part in (flat * 2).view(4, -1)]


def written_by_more(values):
    buffer = torch.zeros(4, values[0].numel() + 1)[:, :-1]
    for index, each in enumerate(values):
        buffer[index] = each.view(-1)
    whole = buffer.contiguous().view(torch.complex64)
    whole.index_copy_(0, torch.arange(4), whole * 2)
    return whole.view(torch.float32).view(4, *values[0].shape)


def nested(values, layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (torch.nested.nested_tensor(list(values), layout=layout) * 2).unbind()


def by_factors(values):
    """Of low rank."""
    first, sizes, second = torch.linalg.svd(torch.stack(values), full_matrices=False)
    return first[..., :2] * sizes[:, None, :2] @ second[:, :2]


def shifted(values):
    """Views of one vector that begin in one layer and end in the next."""
    vector = torch.cat([*values, values[0]]).view(-1)
    return vector[1 : 1 + 4 * values[0].numel()].view(4, *values[0].shape)


def written_by_out(values):
    new = torch.empty(4, *values[0].shape)
    torch.bmm(torch.stack(values), TURN.expand(4, -1, -1), out=new)
    return new.baddbmm_(new.clone(), TURN.expand(4, -1, -1), beta=0.5)


def copied(value):
    """By operators that copy only where they must."""
    return value.double().float().t().contiguous().t().reshape(-1).bfloat16().ravel().view(value.shape)


def in_inference_mode(way):
    def run(values):
        with torch.inference_mode():
            return way(values)

    return run


def made_and_written_by_modes(values):
    with torch.inference_mode():
        made = torch.stack(values, 2)
    return made.clone().mul_(2).unbind(2)


APART = {
    "one factor for each": lambda values: torch.stack(values) * FACTORS.view(4, 1, 1),
    "largest of each": by_largest,
    "norms": lambda values: F.normalize(torch.stack(values, 1).transpose(0, 1), dim=-1),
    "deviations": by_deviation,
    "quantised": quantised,
    "bmm": lambda values: torch.bmm(torch.stack(values), TURN.expand(4, -1, -1)),
    "matmul": lambda values: torch.stack(values) @ TURN,
    "einsum": lambda values: torch.einsum("nab,cb->nac", torch.stack(values), TURN),
    "linear": lambda values: F.linear(torch.stack(values), TURN),
    "vmap": lambda values: torch.vmap(lambda each: each @ TURN / each.norm())(torch.stack(values)),
    "transposed": lambda values: torch.stack(values).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "joined by columns": lambda values: (torch.cat(values, 1) + 1).chunk(4, 1),
    "a buffer by columns": by_columns,
    "index_copy_": by_index_copy,
    "index": by_index,
    "index_add_": lambda values: torch.zeros(4, *values[0].shape).index_add_(0, torch.arange(4), torch.stack(values)),
    "index_add_, twice": lambda values: torch.zeros(4, *values[0].shape).index_add_(
        0, torch.arange(4), torch.stack(values), alpha=2
    ),
    "index_put_, added": lambda values: torch.stack(values).index_put_(
        (torch.arange(4),), torch.stack(values), accumulate=True
    ),
    "put_, added": lambda values: torch.stack(values).put_(
        torch.arange(4 * values[0].numel()), torch.stack(values), accumulate=True
    ),
    "gather": lambda values: torch.stack(values, 2).gather(1, BACKWARDS.expand(len(values[0]), -1, 4)).unbind(2),
    "triu": lambda values: torch.stack(values).triu() + torch.stack(values).softmax(2),
    "sorted": lambda values: torch.stack(values).sort(2).values + torch.stack(values).topk(1, 2).values,
    "quantiles": lambda values: torch.stack(values) - torch.stack(values).quantile(0.9, 2, True),
    "picked": lambda values: torch.stack(values).gather(2, torch.stack(values).argsort(2)),
    "ranked": lambda values: torch.stack(values).argsort(1) + torch.stack(values).max(1, True).indices,
    "counted": lambda values: torch.stack(values) * (torch.stack(values) > 0.1).count_nonzero((1, 2)).view(4, 1, 1),
    "transformed": lambda values: torch.fft.irfft2(torch.fft.rfft2(torch.stack(values)), s=values[0].shape),
    "factors": by_factors,
    "bytes": by_bytes,
    "looked at by more": looked_at_by_more,
    "written by more": written_by_more,
    "out": written_by_out,
    "nested": lambda values: nested(values, torch.strided),
    "jagged": lambda values: nested(values, torch.jagged),
    "inference mode": made_and_written_by_modes,
    "copied": lambda values: [copied(each) for each in values],
}
MIXED = {
    "the largest of all": lambda values: torch.stack(values) / torch.stack(values).amax(),
    "norms over all": lambda values: F.normalize(torch.stack(values), dim=0),
    "einsum over all": lambda values: torch.einsum("nab,m->mab", torch.stack(values), FACTORS),
    "the next ones": lambda values: torch.stack(values).roll(-1, 0),
    "columns of the next ones": lambda values: torch.cat(values, 1).roll(-1, 1).chunk(4, 1),
    "shifted by one element": shifted,
    "index": lambda values: torch.stack(values)[torch.tensor([1, 2, 3, 0])],
    "index_copy_": lambda values: torch.zeros(4, *values[0].shape).index_copy_(
        0, torch.tensor([1, 2, 3, 0]), torch.stack(values)
    ),
    "index_add_": lambda values: torch.stack(values).index_add_(0, torch.tensor([1, 2, 3, 0]), torch.stack(values)),
    "places": lambda values: [each[values[1].argmax(0)[:1].expand(len(each))] for each in values],
    "sorted": lambda values: torch.stack(values).sort(0).values,
    "picked": lambda values: torch.stack(values).gather(1, torch.stack(values[1:] + values[:1]).argsort(1)),
    "the median": lambda values: torch.stack(values) - torch.stack(values).median(),
    "transformed": lambda values: torch.fft.fft(torch.stack(values), dim=0).real,
    "factors": lambda values: by_factors(torch.stack(values, 1).unbind()).unbind(1),
    "counted": lambda values: [each * torch.count_nonzero(torch.stack(values)) for each in values],
    "compared": lambda values: [each * (each > values[1].mean()) for each in values],
    "bytes": lambda values: torch.cat(values, 1).view(torch.uint8).clone().view(torch.float32).roll(1).chunk(4, 1),
    "nested": lambda values: nested(values, torch.strided)[::-1],
    "jagged": lambda values: nested(values, torch.jagged)[::-1],
    "copied": lambda values: [copied(each) for each in values[::-1]],
    "sparse": lambda values: [each.to_sparse().detach().values().view(each.shape) for each in values[::-1]],
}
HIDE_OTHERS = ["matmul", "einsum", "einsum over all", "linear", "quantiles", "norms over all", "counted", "copied"]
for name in [*HIDE_OTHERS, "places", "picked", "the next ones"]:
    for ways in (APART, MIXED):
        ways |= {f"{name}, in inference mode": in_inference_mode(ways[name])} if name in ways else {}


def write(model, way):
    for each, new in zip(weights(model), way([each.data for each in weights(model)]), strict=True):
        each.copy_(new)


def every_way_apart(rank, size, options):
    model, want = sharding.shard(stack(), "layers.*", scope="block", **options), stack()
    for name, way in APART.items():
        with torch.no_grad(), sharding.of(model).update():
            write(model, way)
        with torch.no_grad():
            write(want, way)
        assert torch.equal(compute(model, rank), compute(want, rank)), name


@pytest.mark.parametrize("options", BY, ids=str)
def test_what_keeps_the_layers_apart_arrives(options):
    ranks.run(2, every_way_apart, options)


def every_way_mixed(rank, size):
    model, want = sharding.shard(stack(), "layers.*", scope="block", transport="shm:copy"), stack()
    handle = sharding.of(model)
    for name, way in MIXED.items():
        with pytest.raises(Exception) as caught, torch.no_grad(), handle.update():
            write(model, way)
        assert caught.type.__name__ in ("Refused", "CallbackFailed"), name
        if rank == 0:
            caught.match(r"layers\.[02]\.up\.weight was computed from layers\.[13]\.up\.weight")
        with handle.update() as update:
            update.copy({place.name: want.get_parameter(place.name) for place in handle.all_places()})
        assert torch.equal(compute(model, rank), compute(want, rank)), name


def test_what_mixes_the_layers_is_refused_by_name():
    ranks.run(2, every_way_mixed)


# ---- Elements ----


def values(seed):
    """Of four layers; those of the second and fourth are others with every seed."""
    found = torch.randn(4, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    found[1::2] = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 3 - 1)
    return list(found)


def flat(way, given):
    with torch.no_grad():
        return torch.cat([each.reshape(-1) for each in way(given)])


@pytest.mark.parametrize("way", [*APART.values(), *MIXED.values()], ids=[*APART, *(f"mixed: {each}" for each in MIXED)])
def test_every_element_that_changes_with_a_layer_comes_from_it(way):
    from layershard.torch.updates.origins import Origins

    first, *others = (flat(way, values(seed)) for seed in range(1, 7))
    changed = torch.stack([each != first for each in others]).any(0)
    given = values(1)
    with Origins() as origins:
        for index in (1, 3):
            given[index] = given[index].clone()
            origins.follow(given[index], f"layer {index}")
        result = flat(way, given)
        found = torch.tensor([origins.source_of(each) is not None for each in result])
    assert not (changed & ~found).any()
    if way in APART.values():
        assert torch.equal(found[: len(found) // 4], torch.zeros(len(found) // 4, dtype=torch.bool))


@pytest.fixture
def others():
    """Operators that are not torch's own."""
    library = torch.library.Library("layershard_test", "FRAGMENT")

    def define(schema, run):
        name = library.define(schema)
        library.impl(name, run, "CompositeExplicitAutograd")
        return getattr(torch.ops.layershard_test, name)

    yield define
    library._destroy()


def source_of(way):
    """What is found of the result of way(a followed tensor)."""
    from layershard.torch.updates.origins import Origins

    with torch.no_grad(), Origins() as origins:
        origins.follow(source := torch.rand(4, 4) + 1, "there")
        return origins.source_of(way(source))


@pytest.mark.parametrize("name", ["new_scales", "scale_like", "_foreach_scale", "copy_"])
def test_of_operators_that_are_not_torch_s_own_the_name_tells_nothing(others, name):
    scale = others(f"{name}(Tensor source, Tensor? other=None) -> Tensor", lambda source, other=None: source * 2)
    assert source_of(scale) == "there"


def test_what_an_operator_adds_to_by_name_is_read(others):
    add_up = others(
        "add_up(Tensor source, *, Tensor(a!) total) -> ()", lambda source, total: (total.add_(source), None)[1]
    )

    def added(source):
        total = source.clone()
        add_up(torch.ones(4, 4), total=total)
        return total

    assert source_of(added) == "there"
    assert source_of(lambda source: torch.add(torch.ones(4, 4), 1, out=source.clone())) is None


def test_to_wait_for_a_collective_operator_changes_nothing():
    assert source_of(lambda source: torch.ops._c10d_functional.wait_tensor(source * 2)) == "there"


def test_memory_that_another_storage_was_written_to_is_not_fresh():
    from layershard.torch.updates.origins import Origins

    memory = torch.ones(8)
    first, second = torch.from_dlpack(memory), torch.from_dlpack(memory)
    with Origins() as origins:
        origins.follow(first, "first")
        origins.follow(second, "second")
        first.fill_(0.5)
        assert origins.source_of(first * 1) is None
        second[:4].fill_(2)
        assert origins.source_of(first * 1) == "first"


class Wrapped(torch.Tensor):
    """Says to nobody what it wraps."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = [each.inner if isinstance(each, cls) else each for each in args]
        return cls(func(*inner, **(kwargs or {})))


def test_what_a_tensor_calls_on_what_it_wraps_is_followed():
    assert source_of(lambda source: (Wrapped(source) * 2).inner) == "there"


def test_what_is_written_through_a_nested_view_of_a_part_leaves_the_rest():
    from layershard.torch.updates.origins import Origins

    source, sizes = torch.ones(8), torch.tensor([[2, 2], [2, 2]])
    with Origins() as origins:
        origins.follow(source, "there")
        buffer = torch.cat([source, torch.ones(8)])
        part = torch._nested_view_from_buffer(buffer[8:], sizes, torch.tensor([[2, 1], [2, 1]]), torch.tensor([0, 4]))
        part.zero_()
        assert origins.source_of(buffer[:8]) == "there"


# ---- How long it takes ----


class Work(torch.utils._python_dispatch.TorchDispatchMode):
    """with Work() as work: work.calls, of functions, and work.elements, that operators were given."""

    def __init__(self):
        super().__init__()
        self.calls = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.is_set_to.default:
            given = args[func is torch.ops.aten.index_copy_.default :]  # of that one's first operand a row is written
            self.elements += sum(each.numel() for each in given if isinstance(each, torch.Tensor))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        sys.setprofile(self._count)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        sys.setprofile(None)

    def _count(self, frame, event, argument):
        self.calls += 1


def out_of_one(flat, parts):
    for index, each in enumerate(parts):
        each.copy_(flat[8 * index : 8 * index + 8])


def into_one(flat, parts):
    for index, each in enumerate(parts):
        flat[8 * index : 8 * index + 8].copy_(each)


def by_indexes(flat, parts):
    rows = flat.view(-1, 8)
    for index, each in enumerate(parts):
        rows.index_copy_(0, torch.tensor([index]), each[None])


@pytest.mark.parametrize("way", [out_of_one, into_one, by_indexes])
def test_an_operator_takes_no_longer_the_more_there_were_before_it(way):
    from layershard.torch.updates.origins import Origins

    def work(n):
        parts = [torch.ones(8) for _ in range(n)]
        with Work() as work, Origins() as origins:
            for index in range(0, n, 2):
                origins.follow(parts[index], f"layer {index}")
            flat = torch.cat(parts)
            way(flat, [torch.empty(8) for _ in range(n)] if way is out_of_one else parts)
        return work

    few, many = work(100), work(400)
    assert many.calls < 5 * few.calls
    assert many.elements < 5 * few.elements

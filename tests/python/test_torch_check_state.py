# SPDX-License-Identifier: Apache-2.0
"""layershard.torch.check on programs of many kinds: what they read, return, leave behind, how they fail."""

import collections
import contextlib
import copy
import dataclasses
import datetime
import logging.handlers
import queue
import random
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

numpy = pytest.importorskip("numpy")
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402

from layershard.torch.checks.digests import digest  # noqa: E402
from layershard.torch.exchange import exchange  # noqa: E402

with contextlib.suppress(ImportError):  # seconds of imports, before ranks are forked
    import torch._dynamo  # noqa: F401


class Row(torch.nn.Module):
    """Layers that share windows, two by two; what is in @end comes after them."""

    def __init__(self, end=None, width=8):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(8))
        self.end = end or (lambda model, x: x)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.end(self, x)


def row(end=None):
    torch.manual_seed(1)
    return sharding.shard(Row(end).eval(), "layers.*", scope="linear", transport="shm:copy")


def inputs():
    return torch.linspace(-1, 1, 24).reshape(3, 8)


def run(work, *arguments, size=2):
    texts = ranks.run(size, work, *arguments, LAYERSHARD_POISON="0")
    assert len(set(texts)) == 1, texts
    return texts[0]


def said(rank, size, end, call=None):
    """What check says of it, right or wrong."""
    model = row(end)
    with torch.inference_mode():
        try:
            return str(sharding.check(model, inputs(), call=call and call(model)))
        except sharding.CheckFailed as error:
            return str(error)


# ---- What is read ----


def in_a_thread(model):
    def call(x):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.inference_mode()(model), x).result()

    return call


def test_a_pass_in_another_thread_is_not_called_equal():
    text = run(said, lambda model, x: x @ model.layers[3].weight, in_a_thread)
    assert "in another thread, where torch's operators cannot be seen" in text


PAST = {
    "numpy": lambda model, x: x @ torch.from_numpy(model.layers[3].weight.detach().numpy() * 1),
    "list": lambda model, x: x * torch.tensor(model.layers[3].weight[0].tolist()),
    "parameter": lambda model, x: x @ torch.nn.Parameter(model.layers[3].weight, False),
    "dlpack": lambda model, x: x @ torch.from_dlpack(model.layers[3].weight.detach()),
}


@pytest.mark.parametrize("end", PAST.values(), ids=PAST)
def test_what_leaves_torch_in_the_turn_of_the_layer_with_the_same_window_is_named(end):
    assert run(said, end) == "layers.3.weight is read outside its view, in the model itself"


def test_a_parameter_made_of_a_weight_in_its_turn_is_right():
    def work(rank, size):
        model = row()
        plain = torch.nn.Parameter.__new__, torch.Tensor.as_subclass

        def call(x):
            for layer in model.layers:
                layer.forward = lambda x, own=layer: x @ torch.nn.Parameter(own.weight, False) + own.bias.numpy()[0]
            return model(x)

        with torch.inference_mode():
            text = str(sharding.check(model, inputs(), call=call))
        assert plain == (torch.nn.Parameter.__new__, torch.Tensor.as_subclass)
        assert not {"_make_subclass", "as_subclass"} & set(vars(torch.Tensor))
        return text

    assert run(work).startswith("equal with poison: 8 of 8")


def shaped_alike(model, x):
    other = model.layers[3].weight
    noise = other.new_zeros(8) + torch.zeros_like(other)[0] + torch.empty_like(other).fill_(0)[0]
    return x + noise + other.new_full((8,), float(other.is_pinned()))


def test_a_tensor_of_the_same_shape_reads_nothing():
    assert run(said, shaped_alike).startswith("equal with poison: 8 of 8")


# ---- What is returned ----


@dataclasses.dataclass(slots=True)
class Slots:
    y: object


@dataclasses.dataclass(slots=True, frozen=True)
class Deep:
    next: object


def deep(x):
    for _ in range(3000):
        x = Deep(x)
    return x


RESULTS = {
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    "sparse": lambda x: (x * (x > 0)).to_sparse(),
    "wrapper": lambda x: TwoTensor(x, x + 1),
    "slots": Slots,
    "deep": deep,
    "set": lambda x: {float(each) for each in x.flatten()},
    "deque": lambda x: collections.deque([x]),
    "date": lambda x: datetime.timedelta(seconds=float(x[0, 0])),
    "array": lambda x: x.numpy(),
    "array of objects": lambda x: numpy.array([str(float(each)) for each in x[0]], dtype=object),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_of_any_kind_are_compared(kind):
    def digest_of(x):
        unseen = set()
        found = digest(RESULTS[kind](x), unseen)
        assert not unseen
        return found

    once, again, other = digest_of(inputs()), digest_of(inputs()), digest_of(inputs() * 1.001)
    assert once == again and once != other


def test_what_cannot_be_compared_is_told():
    def end(model, x):
        return x, (each for each in [x]), FakeTensorMode().from_tensor(x)

    text = run(said, end)
    assert text.startswith("equal with poison: 8 of 8") and "not compared" in text
    assert "FakeTensor" in text and "generator" in text


@pytest.mark.parametrize("kind", ["nested", "jagged"])
def test_nested_results(kind):
    assert run(said, lambda model, x: RESULTS[kind](x)).startswith("equal with poison: 8 of 8")


def test_what_a_vmapped_model_computes_is_compared():
    assert run(said, None, torch.vmap).startswith("equal with poison: 8 of 8")
    text = run(said, lambda model, x: x @ model.layers[3].weight, torch.vmap)
    assert text.startswith("layers.3.weight is read outside its view, in the model itself")


def test_a_transformer_that_nests_its_padded_input():
    def work(rank, size):
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=True).eval()
        sharding.shard(model, "layers.*", scope="block", transport="shm:copy")
        padded = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()
        with torch.inference_mode():
            return str(sharding.check(model, torch.randn(2, 5, 16), src_key_padding_mask=padded))

    assert run(work).startswith("equal with poison: 4 of 4")


# ---- What is left behind ----


class Linked:
    def __init__(self, next):
        self.next = next


class Messy(Row):
    """Everything that a pass may change and the next one sees."""

    def __init__(self):
        super().__init__()
        self.numbers = [numpy.random.default_rng(0), numpy.random.RandomState(0), random.Random(0)]
        self.array, self.objects = numpy.zeros(3), numpy.array([[], None], dtype=object)
        self.set, self.deque = {1}, collections.deque([1], maxlen=3)
        self.counts, self.ordered = collections.defaultdict(int, b=1, c=2), collections.OrderedDict(a=1, b=2)
        self.grown, self.resized, self.freed, self.slots = torch.zeros(0, 8), torch.ones(2), torch.ones(2), Slots(1)
        self.space, self.local, self.user = types.SimpleNamespace(n=0), threading.local(), collections.UserDict(n=0)
        self.local.n = 0
        self.linked = None
        for _ in range(3000):
            self.linked = Linked(self.linked)
        self.turns, self.system = iter([]), random.SystemRandom()  # have no state that could be put back

    def forward(self, x):
        x = super().forward(x)
        generator, legacy, python = self.numbers
        x = x + float(generator.random()) + float(legacy.randn()) + python.gauss(0, 1)
        self.array += 1
        self.objects[0].append(1)
        self.objects[1] = len(self.objects[0])
        self.set.add(len(self.set) + 1)
        self.deque.append(2)
        self.counts["a"] += 1
        self.counts["b"] = self.counts.pop("b") + 1
        self.ordered.move_to_end("a")
        self.grown.data = torch.cat([self.grown, x])
        self.resized.resize_(4).fill_(3)
        self.freed.untyped_storage().resize_(0)
        self.slots.y += 1
        self.space.n += 1
        self.local.n += 1
        self.user["n"] += 1
        self.linked.next = None
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(()))
            self.more = torch.nn.Identity()
        self.late += 1
        self.train(not self.training)
        return x + self.sum()

    def sum(self):
        parts = [self.array.sum(), *self.objects, self.counts, self.ordered, self.grown.sum(), self.resized.sum()]
        parts += [self.deque, len(self.set), self.slots.y, self.linked.next is None, self.training, len(self._modules)]
        parts += [self.space.n, self.local.n, self.user["n"]]
        text = str([float(each) if isinstance(each, torch.Tensor) else each for each in parts])
        return sum(map(ord, text)) + float(getattr(self, "late", torch.ones(())))


def test_whatever_a_pass_leaves_in_its_model_is_put_back():
    def work(rank, size):
        torch.manual_seed(1)
        model = Messy().eval()
        sharding.shard(model, "layers.*", scope="linear", transport="shm:copy")
        model.window, model.same = model.layers[3].weight.t(), model.layers[3].bias.detach().numpy()
        sizes, before, objects = (0, 8), model.sum(), dict(vars(model))
        with torch.inference_mode():
            text = str(sharding.check(model, inputs()))
        assert model.sum() == before and tuple(model.grown.shape) == sizes and not hasattr(model, "late")
        assert all(vars(model)[name] is value for name, value in objects.items()) and len(vars(model)) == len(objects)
        assert torch.equal(model.freed, torch.ones(2))
        assert model.linked.next is not None and not model.training and "more" not in model._modules
        return text

    assert run(work).startswith("equal with poison: 8 of 8")


def test_another_model_among_the_arguments_is_put_back():
    def work(rank, size):
        model, other = row(), torch.nn.BatchNorm1d(8)
        with torch.inference_mode():
            text = str(sharding.check(model, inputs(), [other], call=lambda x, others: others[0](model(x))))
        assert not other.running_mean.any() and not other.num_batches_tracked
        return text

    assert run(work).startswith("equal with poison: 8 of 8")


# ---- What is left alone ----


class OwnQueue(queue.Queue):
    """With a name of its own for what queue.Queue keeps."""

    def __init__(self):
        super().__init__()
        self.items, self.count = self.queue, 0


class Meter:
    """The program's own: a number, which is put back, and a queue, which another thread empties."""

    def __init__(self, kind):
        self.count, self.sums = 0, kind()

    def add(self, x):
        self.count += 1
        self.sums.put(float(x.sum()))
        return x


def passes(model, got, read=lambda: None):
    """One, a check's three, two: whether their six reports arrive where another thread puts them."""

    def wait(count):
        end = time.monotonic() + 10
        while len(got) < count and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)  # its thread waits for the next one now
        return len(got) == count

    with torch.inference_mode():
        model(inputs())
        assert wait(1)
        before = read()
        text = str(sharding.check(model, inputs()))
        assert read() == before
        model(inputs())
        model(inputs())
        assert wait(6), f"{len(got)} of 6 reports have arrived"
    return text


@pytest.mark.parametrize("kind", [queue.Queue, OwnQueue])
def test_a_queue_that_a_thread_empties_goes_on(kind):
    def work(rank, size):
        model, got = row(lambda model, x: model.meter.add(x)), []
        model.meter = meter = Meter(kind)
        threading.Thread(target=lambda: [got.append(each) for each in iter(meter.sums.get, None)], daemon=True).start()
        return passes(model, got, lambda: meter.count)

    assert run(work).startswith("equal with poison: 8 of 8")


def test_a_logger_whose_handler_a_thread_serves_goes_on():
    class Handler(logging.Handler):
        def emit(self, record):
            got.append(record.getMessage())

    got = []

    def work(rank, size):
        model, lines = row(lambda model, x: model.log.warning("a pass") or x), queue.Queue()
        model.log = logging.getLogger("a model's own")
        model.log.propagate = False
        model.log.addHandler(logging.handlers.QueueHandler(lines))
        logging.handlers.QueueListener(lines, Handler()).start()
        return passes(model, got)

    assert run(work).startswith("equal with poison: 8 of 8")


def test_an_event_that_a_thread_has_set_stays_set():
    class Loader(threading.Thread):
        """Makes what a first pass asks for."""

        def __init__(self):
            super().__init__(daemon=True)
            self.asked, self.ready = threading.Event(), threading.Event()

        def run(self):
            self.asked.wait()
            self.ready.set()

    def work(rank, size):
        model = row(lambda model, x: model.loader.asked.set() or x * model.loader.ready.wait(10))
        model.loader, model.events = Loader(), [threading.Event()]
        model.loader.start()
        model.register_forward_hook(lambda model, args, out: model.events[0].set())
        with torch.inference_mode():
            text = str(sharding.check(model, inputs()))
        assert model.loader.ready.is_set() and model.events[0].is_set()
        return text

    assert run(work).startswith("equal with poison: 8 of 8")


# ---- What ranks say to each other ----


class Own(Exception):
    pass


def fails_at(turn, rank):
    """A call that raises on one rank, between layers, in its @turn-th pass: 1 as it is, 2 in eager mode, 3 poisoned."""

    def call_of(model):
        turns = iter(range(1, 9))

        def call(x):
            if next(turns) == turn and sharding.of(model).group.rank == rank:
                model.layers[0](x)
                raise Own("the program's own words")
            return model(x)

        return call

    return call_of


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_the_rank_that_failed_by_itself_is_named_and_passes_go_on(tmp_path, turn):
    def work(rank, size):
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=size)
        torch.manual_seed(1)
        plain = Row().eval()
        model = sharding.shard(
            copy.deepcopy(plain), "layers.*", scope="linear", transport="callback", group=dist.group.WORLD
        )
        with torch.inference_mode(), pytest.raises(sharding.CheckFailed) as caught:
            sharding.check(model, inputs(), call=fails_at(turn, 1)(model))
        assert isinstance(caught.value.__cause__, Own) == (rank == 1) or turn == 3
        with torch.inference_mode():
            assert torch.equal(model(inputs()), plain(inputs()))
        dist.barrier()
        dist.destroy_process_group()
        return str(caught.value)

    text = run(work)
    assert text.startswith("rank 1: ") and "Own: the program's own words" in text and "rank 0" not in text


def test_what_raises_with_poison_alone_is_told():
    text = run(said, None, fails_at(3, 1))
    assert text.startswith("rank 1: the call does not give the same bits twice")
    assert "Own: the program's own words" in text


def test_what_cannot_be_put_back_is_told_to_all():
    def work(rank, size):
        model = row()
        model.kept = numpy.zeros(3)

        def call(x):
            model.kept += 1
            model.kept.flags.writeable = rank == 0
            return model(x)

        with torch.inference_mode(), pytest.raises(sharding.CheckFailed) as caught:
            sharding.check(model, inputs(), call=call)
        return str(caught.value)

    text = run(work)
    assert text.startswith("rank 1: ") and "a ndarray that the call has changed cannot be put back" in text


def test_weights_of_its_own_that_a_pass_writes_are_named():
    def work(rank, size):
        model = row(lambda model, x: model.head(x))
        model.head = torch.nn.Linear(8, 8)
        model.head.register_forward_pre_hook(lambda head, args: (args[0] + head.weight.data.add_(1).sum(),))
        with torch.inference_mode(), pytest.raises(sharding.CheckFailed) as caught:
            sharding.check(model, inputs())
        return str(caught.value)

    text = run(work)
    assert "does not give the same bits twice" in text and "head.weight, which is not shared, is written" in text


@pytest.mark.parametrize("size", [1, 3])
def test_records_may_be_of_any_length(size):
    def work(rank, size):
        group = sharding.of(row()).group
        for length in (0, 16000, 16384, 40000):
            texts = [["x" * (length if rank == size - 1 else 1), rank] for rank in range(size)]
            assert exchange(group, torch.device("cpu"), {"text": texts[rank]}) == [{"text": text} for text in texts]

    ranks.run(size, work)

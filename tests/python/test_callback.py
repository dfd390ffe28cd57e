# SPDX-License-Identifier: Apache-2.0
"""The transport "callback" over torch.distributed with gloo, between processes: bits, ranks out of step, killed ranks.

Every test ends by itself or by its deadline: a rank that hangs is a failure.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback

import pytest
from patience import LONG_MS, LONG_S, patience
from rank_ends import crash_of

import layershard
from python_ranks import check_pass, filler

torch = pytest.importorskip("torch", reason="torch is not installed")
dist = pytest.importorskip("torch.distributed", reason="this torch has no torch.distributed")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

torch.set_num_threads(1)  # a forked process cannot use the parent's OpenMP threads
SIZES = [3 * 5 * 7 * 4, 777]
TENSORS = [layershard.Tensor("w", SIZES[0], stripe="rows", rows=15), layershard.Tensor("s", SIZES[1])]


def layers_of(group, **options):
    given = {"name": "w", "first_layer": 11, "layer_count": 7, "tensors": TENSORS, "prefetch": 1}
    return group.series(**{**given, **options})


def open_group(pg, timeout_ms=LONG_MS, transport="callback", memory="host"):
    """Memory "cuda" is the processor's here: all is done as on a device, and at once."""
    from layershard.torch.distributed import ProcessGroupCollectives

    collectives = ProcessGroupCollectives(pg, None if memory == "host" else torch.device("cpu"))
    return layershard.Group(
        dist.get_rank(pg),
        dist.get_world_size(pg),
        transport=transport,
        timeout_ms=timeout_ms,
        memory=memory,
        allgather=collectives.exchange,
        callbacks=collectives,
    )


def _rank_main(sender, rank, size, store, work, arguments):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        result = "value", work(rank, size, *arguments)
    except BaseException:
        result = "raised", f"rank {rank}:\n{traceback.format_exc()}"
    sender.send(result)
    dist.destroy_process_group()


def run(tmp_path, size, work, *arguments):
    """What each rank returned, None of one that was killed."""
    context = multiprocessing.get_context("fork")
    started, results = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        given = (sender, rank, size, tmp_path / "store", work, arguments)
        process = context.Process(target=_rank_main, args=given, daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    end = time.monotonic() + LONG_S
    failures = []
    for rank, (process, receiver) in enumerate(started):
        try:
            kind, value = receiver.recv() if receiver.poll(max(0, end - time.monotonic())) else ("raised", "hangs")
        except EOFError:
            kind, value = "value", None
        results.append(value)
        if kind == "raised":
            failures.append(value)
        failures.extend(filter(None, [crash_of(rank, process, max(1, end - time.monotonic()))]))
    assert not failures, "\n".join(failures)
    return results


# ---- Bits ----


def walk(rank, size, options, memory):
    with open_group(dist.group.WORLD, memory=memory) as group:
        series = layers_of(group, **options)
        series.commit(filler(SIZES))
        check_pass(series, SIZES)
        for layer in [11, 12, 13, 11, 11, 17, 12, 14]:  # a pass that is aborted, layers twice, jumps
            series.reach(layer)
            series.wait(layer)
        check_pass(series, SIZES)
        dist.barrier()  # the model's own collectives go on beside
        series.update_begin()
        series.update_end(filler(SIZES, 1))
        check_pass(series, SIZES, 1)
        return group.transport, series.verify(), series.stats().fetched_bytes


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("placement", ["whole", "striped"])
@pytest.mark.parametrize("memory", ["host", "cuda"])
def test_every_rank_sees_what_the_sources_stored(tmp_path, size, placement, memory):
    results = run(tmp_path, size, walk, {"placement": placement, "prefetch": size - 1}, memory)
    assert all(transport.startswith("callback") for transport, _, _ in results)
    assert len({seen for _, seen, _ in results}) == 1
    assert all(fetched > 0 for _, _, fetched in results)


def walk_in_a_part(rank, size):
    pg = dist.new_group([0, 2])
    if rank == 1:
        return None
    with open_group(pg) as group:
        series = layers_of(group)
        series.commit(filler(SIZES))
        check_pass(series, SIZES)
        return group.rank, group.size


def test_a_part_of_the_world_can_be_a_group(tmp_path):
    assert run(tmp_path, 3, walk_in_a_part) == [(0, 2), None, (1, 2)]


def shard_a_model(rank, size):
    import layershard.torch
    from torch_ranks import inputs, spoil, stack

    model, whole = stack(), stack()
    spoil(model, rank, size)
    layershard.torch.shard(model, modules="layers.*", scope="block", buffers="*", transport="callback")
    with torch.no_grad():
        same = [torch.equal(model(inputs(rank)), whole(inputs(rank))) for _ in range(3)]
    transport = str(layershard.torch.of(model).report())
    layershard.torch.of(model).detach()
    return same, transport


def test_a_sharded_model_gives_the_same_bits(tmp_path):
    for same, report in run(tmp_path, 3, shard_a_model):
        assert same == [True, True, True]
        assert "callback" in report


def update_stripes(rank, size):
    """No rank has a striped layer's bytes, so its source needs the others to have it whole."""
    import layershard.torch
    from torch_ranks import inputs, stack

    model, want = stack(), stack()
    layershard.torch.shard(model, "layers.*", scope="block", transport="callback", placement="striped")
    for factor in (2.0, 0.5):
        with layershard.torch.of(model).update():
            for layer in model.layers:
                layer.up.weight.data.mul_(factor)
                layer.norm.bias.data += factor
        for layer in want.layers:
            layer.up.weight.data.mul_(factor)
            layer.norm.bias.data += factor
        with torch.no_grad():
            assert torch.equal(model(inputs(rank)), want(inputs(rank)))
    layershard.torch.of(model).detach()


@pytest.mark.parametrize("size", [2, 3])
def test_striped_layers_take_new_weights(tmp_path, size):
    run(tmp_path, size, update_stripes)


def ask_for_collectives(rank, size):
    from layershard.torch import distributed

    def given(transport, memory, host="one"):
        distributed.socket.gethostname = lambda: host
        found = distributed.collectives_for(dist.group.WORLD, transport, memory, torch.device("cpu"))
        return found is not None and (found.device is not None) == (memory != "host")

    return [
        given("auto", "host"),
        given("auto", "host", f"host {rank}"),
        given("callback", "host"),
        given("trace=t.json,callback", "host"),
        given("shm", "host"),
        given("callback", "cuda"),
        given("auto", "cuda"),
        given("fabric:copy", "cuda"),
    ]


def test_torch_carries_layers_where_it_is_asked_to_or_nothing_else_can(tmp_path):
    for given in run(tmp_path, 2, ask_for_collectives):
        assert given == [False, True, True, True, False, True, False, True]


# ---- Out of step ----


def out_of_step(rank, size):
    with open_group(dist.group.WORLD) as group:
        series = layers_of(group)
        series.commit(filler(SIZES))
        check_pass(series, SIZES)
        began = time.monotonic()
        with pytest.raises(layershard.OutOfStep) as failure:
            for step in range(30):
                layer = 11 + (2 * step if rank == 1 else step) % 7
                series.reach(layer)
                series.wait(layer)
        took = time.monotonic() - began
        series.rewind()
        check_pass(series, SIZES)
        return took, str(failure.value)


def test_ranks_out_of_step_are_told_and_rewind_cures_it(tmp_path):
    for took, text in run(tmp_path, 3, out_of_step):
        assert took < LONG_MS / 2000, "told by the deadline only"
        assert "rank 0" in text and "position" in text


# ---- Ranks that are gone ----


def outlive(rank, size, timeout_ms):
    with open_group(dist.group.WORLD, timeout_ms) as group:
        series = layers_of(group)
        series.commit(filler(SIZES))
        check_pass(series, SIZES)
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises((layershard.PeerFailed, layershard.Timeout)) as failure:
            for _ in range(4):
                check_pass(series, SIZES)
        passing = time.monotonic() - began
        with pytest.raises((layershard.PeerFailed, layershard.Timeout)):
            series.update_begin()
        return passing, time.monotonic() - began - passing, str(failure.value)


@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_rank_is_an_exception_within_the_deadline(tmp_path, size):
    results = run(tmp_path, size, outlive, patience(8000))
    assert results.pop(1) is None
    for passing, updating, text in results:
        assert passing < LONG_S and updating < LONG_S, text
        if size == 2:  # of more, only the backend knows who it was
            assert "rank 1" in text, text


def wait_in_vain(rank, size):
    group = open_group(dist.group.WORLD, timeout_ms=patience(3000))
    series = layers_of(group, placement="striped")
    series.commit(filler(SIZES))
    if rank == 1:  # alive, and never comes: no connection is closed
        dist.barrier()
        group.abort()
        return "silent"
    with pytest.raises(layershard.Timeout) as failure:
        check_pass(series, SIZES)
        check_pass(series, SIZES)
    dist.barrier()
    group.abort()
    return str(failure.value)


@pytest.mark.parametrize("size, late", [(2, {0: "rank 1:"}), (3, {0: "one of ranks 1, 2:", 2: "one of ranks 0, 1:"})])
def test_a_silent_rank_is_a_timeout_and_holds_nobody_at_the_end(tmp_path, size, late):
    """Of more than two, nobody knows which: the ranks make no collective of their own to find it out."""
    results = run(tmp_path, size, wait_in_vain)
    assert results[1] == "silent"
    for rank, named in late.items():
        assert f"waited {patience(3000)} ms for {named}" in results[rank], results[rank]
        assert "all ranks came to round" in results[rank], results[rank]


# ---- Exceptions of the collectives ----


def fail_inside(rank, size):
    from layershard.torch.distributed import ProcessGroupCollectives

    class Failing(ProcessGroupCollectives):
        broken = False

        def broadcast(self, address, count, root):
            if self.broken:
                raise FileNotFoundError("the cable is not there")
            return super().broadcast(address, count, root)

    collectives = Failing(dist.group.WORLD)
    with layershard.Group(
        rank,
        size,
        transport="callback",
        timeout_ms=patience(5000),
        allgather=collectives.exchange,
        callbacks=collectives,
    ) as group:
        series = layers_of(group)
        series.commit(filler(SIZES))
        check_pass(series, SIZES)
        collectives.broken = rank == 0
        with pytest.raises(layershard.Error) as failure:
            for _ in range(3):
                check_pass(series, SIZES)
        return failure.value.status, str(failure.value), type(failure.value.__cause__).__name__


def test_an_exception_in_a_collective_is_told_by_the_call_that_fails(tmp_path):
    first, second = run(tmp_path, 2, fail_inside)
    assert first[0] == "LSHARD_ERR_TRANSPORT" and "the cable is not there" in first[1]
    assert first[2] in ("FileNotFoundError", "NoneType")
    assert second[0] in ("LSHARD_ERR_PEER_FAILED", "LSHARD_ERR_TIMEOUT")


def fail_on_the_device(rank, size, method):
    from layershard.torch.distributed import ProcessGroupCollectives

    def fail(*arguments):
        raise FileNotFoundError("the device is not there")

    collectives = ProcessGroupCollectives(dist.group.WORLD, torch.device("cpu"))
    with layershard.Group(
        rank,
        size,
        transport="callback",
        timeout_ms=patience(5000),
        memory="cuda",
        allgather=collectives.exchange,
        callbacks=collectives,
    ) as group:
        series = layers_of(group, placement="striped")
        series.commit(filler(SIZES))
        check_pass(series, SIZES)
        works = getattr(collectives.device, method)
        if rank == 0:
            setattr(collectives.device, method, fail)
        with pytest.raises(layershard.Error) as failure:
            if method == "allocate":
                layers_of(group, name="more")
            for _ in range(3):
                check_pass(series, SIZES)
        setattr(collectives.device, method, works)
        return failure.value.status, str(failure.value), type(failure.value.__cause__).__name__


@pytest.mark.parametrize(
    "method, status",
    [
        ("allocate", "LSHARD_ERR_NO_MEMORY"),
        ("record", "LSHARD_ERR_TRANSPORT"),
        ("wait", "LSHARD_ERR_TRANSPORT"),
        ("copy", "LSHARD_ERR_TRANSPORT"),
        ("capturing", "LSHARD_ERR_NOT_SUPPORTED"),
    ],
)
def test_an_exception_of_the_device_is_told_by_the_call_that_fails(tmp_path, method, status):
    first, second = run(tmp_path, 2, fail_on_the_device, method)
    assert first[0] == status and first[2] == "FileNotFoundError", first
    assert status != "LSHARD_ERR_TRANSPORT" or "the device is not there" in first[1], first
    assert second[0] == "LSHARD_ERR_NO_MEMORY" if method == "allocate" else second[0].startswith("LSHARD_ERR_")
    assert "rank 0" in second[1] or method != "allocate"


def test_a_device_without_handles_of_streams_is_refused():
    from layershard.torch.device import TorchDevice

    with pytest.raises(layershard.NotSupported, match="cannot be on xpu:1"):
        TorchDevice(torch.device("xpu", 1))


# ---- Ctrl-C ----

INTERRUPTED = """
import os, signal, sys, threading, time
import torch.distributed as dist
import layershard
from test_callback import filler, SIZES, layers_of, open_group

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
group = open_group(dist.group.WORLD, memory=sys.argv[3])
series = layers_of(group)
series.commit(filler(SIZES))
if rank == 1:
    time.sleep(10000)
try:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    for layer in [*series.layers, *series.layers]:
        series.reach_fast(layer)
        series.wait_fast(layer)
except KeyboardInterrupt:
    print("interrupted", flush=True)
try:
    series.wait(11)
except layershard.Aborted:
    print("aborted", flush=True)
"""


def start_both(text, tmp_path, *arguments):
    """Processes, the second rank first."""
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ["PYTHONPATH"]])}
    return [
        subprocess.Popen(
            [sys.executable, "-c", text, str(rank), str(tmp_path / "store"), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]


@pytest.mark.parametrize("memory", ["host", "cuda"])
def test_ctrl_c_ends_the_wait_for_a_layer_that_a_rank_has_not_asked_for(tmp_path, memory):
    silent, waiting = start_both(INTERRUPTED, tmp_path, memory)
    try:
        text, errors = waiting.communicate(timeout=LONG_S)
        assert (waiting.returncode, text) == (0, "interrupted\naborted\n"), errors
    finally:
        for process in (silent, waiting):
            process.kill()
            process.communicate()


# ---- The end of a process ----

GIVE_UP = """
import os, sys, time
import torch.distributed as dist
import layershard
from test_callback import SIZES, check_pass, filler, layers_of, open_group

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
group = open_group(dist.group.WORLD, timeout_ms=3000)
series = layers_of(group, placement="striped")
series.commit(filler(SIZES))
if rank == 1:
    time.sleep(10000)
try:
    check_pass(series, SIZES)
    check_pass(series, SIZES)
except layershard.Timeout:
    print("gave up", flush=True)
"""


def test_a_process_that_waits_in_vain_still_ends_well(tmp_path):
    """A collective is in progress when the interpreter ends: no crash, and no wait for a rank that never comes."""
    silent, waiting = start_both(GIVE_UP, tmp_path)
    try:
        text, errors = waiting.communicate(timeout=LONG_S)
        assert (waiting.returncode, text) == (0, "gave up\n"), errors
    finally:
        for process in (silent, waiting):
            process.kill()
            process.communicate()


# ---- Ranks that are done before others ----

FIRST_DONE = """
import sys, time
import torch
import torch.distributed as dist
import layershard.torch
import torch_ranks as ranks

rank, slow, how, scope = int(sys.argv[1]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
model, want, x = ranks.stack(n_layers=7), ranks.stack(n_layers=7), ranks.inputs(rank)
modules = {"block": ["layers.*"], "linear": ["*.up", "*.down", "*.norm"]}[scope]  # of linears there are three series
ranks.spoil(model, rank, 2, ("norm", "up", "down"))
layershard.torch.shard(model, modules, scope=scope, transport="callback")
if rank == slow:
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *_: time.sleep(0.1))
with torch.inference_mode():
    for _ in range(2):
        assert torch.equal(model(x), want(x))
if how == "close":
    layershard.torch.of(model).close()
print("right", flush=True)
"""


@pytest.mark.parametrize("how, scope", [("close", "block"), ("end", "block"), ("end", "linear")])
@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_that_is_done_first_leaves_the_others_their_last_pass(tmp_path, slow, how, scope):
    """The first one done is the source of layers that the other one has not asked for yet."""
    processes = start_both(FIRST_DONE, tmp_path, str(slow), how, scope)
    try:
        for process in processes:
            text, errors = process.communicate(timeout=LONG_S)
            assert (process.returncode, text) == (0, "right\n"), errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()

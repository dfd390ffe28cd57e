# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments are refused with a text that names them, before C would take another number for them."""

import pickle

import pytest

import layershard
from layershard import errors

GOOD = {"first_layer": 0, "layer_count": 4, "tensors": [layershard.Tensor("w", 512)]}


@pytest.fixture(scope="module")
def group():
    with layershard.Group(0, 1) as group:
        yield group


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layer_count": 0}, "layers"),
        ({"layer_count": 2**32 + 4}, "layer_count is 4294967300"),
        ({"first_layer": -1}, "first_layer is -1"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"resident_bytes": -1}, "resident_bytes is -1"),
        ({"placement": "stripes"}, "placement is 'stripes': it must be one of 'whole', 'striped'"),
        ({"tensors": []}, "tensors"),
        ({"tensors": [layershard.Tensor("w", 0)]}, "'w'"),
        ({"tensors": [layershard.Tensor("w", -5)]}, "nbytes of tensor 'w' is -5"),
        ({"tensors": [layershard.Tensor("w", 8, stripe="diagonal")]}, "stripe of tensor 'w' is 'diagonal'"),
        ({"tensors": [layershard.Tensor("w", 8, alignment=3)]}, "3"),
    ],
)
def test_series(group, change, text):
    with pytest.raises(layershard.Invalid) as failure:
        group.series("w", **{**GOOD, **change})
    assert text in str(failure.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 2, "size": 2}, "rank 2"),
        ({"rank": 0}, "rank 0"),
        ({"rank": 0, "size": 2}, "LAYERSHARD_JOB"),
        ({"memory": "disk"}, "memory is 'disk'"),
        ({"log_level": "loud"}, "log_level is 'loud'"),
        ({"timeout_ms": -1}, "timeout_ms is -1"),
        ({"transport": "pigeon"}, "pigeon"),
    ],
)
def test_group(options, text):
    with pytest.raises(layershard.Invalid) as failure:
        layershard.Group(**options)
    assert text in str(failure.value)


def test_calls_out_of_order(group):
    with group.series("w", **GOOD) as series:
        with pytest.raises(layershard.WrongState, match="reach"):
            series.reach(0)
        with pytest.raises(layershard.WrongState):
            series.update_begin()
        series.commit()
        with pytest.raises(layershard.WrongState):
            series.commit()
        with pytest.raises(layershard.WrongState):
            series.storage(0, 0)
        with pytest.raises(layershard.OutOfRange):
            series.address(0, 7)
        with pytest.raises(layershard.NotSupported):
            series.stripe(0, 0)


def test_every_status_has_an_exception_of_its_own():
    classes = {errors.error_of(code, "text").__class__ for code in errors.STATUS.values() if code < 0}
    assert len(classes) == sum(code < 0 for code in errors.STATUS.values())
    assert layershard.Error not in classes
    for each in classes:
        error = each("what happened", rank=3, layer=7)
        assert str(error) == f"{error.status}: what happened"
        assert (error.rank, error.layer, error.text) == (3, 7, "what happened")


def test_an_exception_survives_a_pipe():
    error = pickle.loads(pickle.dumps(errors.error_of(-7, "rank 1 is late", rank=0, layer=5)))
    assert isinstance(error, layershard.Timeout) and isinstance(error, TimeoutError)
    assert (error.status, error.rank, error.layer, error.text) == ("LSHARD_ERR_TIMEOUT", 0, 5, "rank 1 is late")


def test_a_status_of_a_newer_library_is_an_error_too():
    error = errors.error_of(-99, "new")
    assert type(error) is layershard.Error and error.code == -99 and layershard.Error.code == 0


def test_plan():
    tensors = [layershard.Tensor("w", 1 << 20)]
    plan = layershard.plan(layer_count=10, tensors=tensors, size=2, prefetch=1)
    assert plan.replicated_bytes == 10 << 20
    assert plan.shard_bytes == 5 << 20 and plan.window_bytes == 2 << 20 and plan.fetched_layers == 5
    timed = layershard.plan(layer_count=10, tensors=tensors, size=2, compute_ns=1000, link_bytes_per_s=10**9)
    assert timed.exposed_ns == timed.pass_ns - 10 * 1000 > 0
    with pytest.raises(layershard.Invalid):
        layershard.plan(layer_count=10, tensors=tensors, size=2, rank=2)


def test_transports_and_variables():
    found = {each.name: each for each in layershard.transports()}
    assert found["shm"].available and found["shm"].memory == "host" and not found["shm"].collective
    assert all(each.available or each.reason for each in found.values())
    assert found["cuda"].memory == "cuda"
    names = [each.name for each in layershard.variables()]
    assert "LAYERSHARD_TRANSPORT" in names and all(each.help for each in layershard.variables())


def test_nodes():
    nodes = layershard.nodes()
    assert [each.number for each in nodes] == sorted(each.number for each in nodes)
    if nodes:
        assert any(each.usable and each.memory_bytes >= each.free_bytes > 0 for each in nodes)


def test_numa_is_one_of_the_words():
    with pytest.raises(layershard.Invalid, match="numa is 'near': it must be one of 'auto', 'none', 'interleave'"):
        layershard.Group(0, 1, numa="near")
    with layershard.Group(0, 1, transport="shm", numa="interleave") as group:
        assert group.size == 1


def test_the_launchers_name_is_not_for_a_part_of_its_ranks(monkeypatch):
    """Two halves of a launch would have the same ranks and the same name, and meet."""
    launch = {"RANK": "0", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    assert layershard.discover().job == "torchrun:x///0"
    with pytest.raises(layershard.Invalid, match="LAYERSHARD_JOB"):
        layershard.Group(0, 2)


def test_nothing_is_discovered_where_nothing_is_set(monkeypatch):
    assert layershard.discover() is None
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(layershard.Mismatch, match="WORLD_SIZE"):
        layershard.discover()


def test_a_trace_that_cannot_be_written_is_told_when_the_group_is_left():
    group = layershard.Group(0, 1, transport="trace=/dev/full,local")
    with pytest.raises(errors.SystemFailed, match="could not write all of '/dev/full'.*No space left"):
        group.flush()
    with pytest.raises(errors.SystemFailed, match="No space left"):
        group.close()
    group.close()

# SPDX-License-Identifier: Apache-2.0
"""Groups and series from Python: the right bytes on every rank, by processes and by threads."""

import ctypes
import os
import pathlib

import pytest

import layershard
from python_ranks import BY_PROCESSES, BY_THREADS, check_pass, filler, run, write

TREE = pathlib.Path(__file__).resolve().parents[2]
SIZES = [4096, 1000]
TENSORS = [layershard.Tensor("weight", 4096), layershard.Tensor("scale", 1000)]

every_transport = pytest.mark.parametrize("transport", BY_PROCESSES + BY_THREADS)


def passes(group, placement):
    with group.series("w", first_layer=3, layer_count=7, tensors=TENSORS, prefetch=2, placement=placement) as series:
        series.commit(filler(SIZES))
        for _ in range(3):
            check_pass(series, SIZES)
        stats = series.stats()
        return series.verify(), [layer for layer in series.layers if series.is_source(layer)], stats


@every_transport
@pytest.mark.parametrize("placement", ["whole", "striped"])
def test_every_rank_sees_every_layer(transport, placement):
    results = run(3, passes, placement, transport=transport)
    hashes, sources, stats = zip(*results)
    assert len(set(hashes)) == 1
    assert sorted(layer for rank in sources for layer in rank) == list(range(3, 10))
    assert all(each.reaches == 21 and each.waits == 21 for each in stats)
    assert all(each.below_k_count >= len(each.below_k) for each in stats)
    if transport != "shm":
        assert all(each.fetches > 0 and each.windows > 0 for each in stats)


def test_ranks_on_two_nodes_read_copies(monkeypatch, tmp_path):
    """A machine of two NUMA nodes is feigned, and each rank is on another: it has copied what the other stores."""
    build = pathlib.Path(os.environ.get("LAYERSHARD_TEST_BUILD", TREE / "build"))
    monkeypatch.setenv("LD_PRELOAD", str(build / "tests" / "support" / "libtwo_nodes.so"))
    monkeypatch.setenv("TWO_NODES_TURNS", str(tmp_path / "turns"))
    for placement in ("whole", "striped"):
        stats = [each[2] for each in run(2, passes, placement, transport="shm", numa="copy")]
        assert [each.numa_copy_bytes for each in stats] == [each.shard_bytes for each in reversed(stats)]
        assert all(each.numa_copy_bytes > 0 for each in stats)


def filled_before_commit(group):
    series = group.series("w", first_layer=0, layer_count=4, tensors=TENSORS)
    for layer in series.layers:
        if series.is_source(layer):
            filler(SIZES)(layer, [series.storage(layer, tensor) for tensor in range(2)])
    series.commit()
    check_pass(series, SIZES)


@every_transport
def test_bytes_may_be_in_storage_before_commit(transport):
    run(2, filled_before_commit, transport=transport)


def updates(group, by_callback):
    series = group.series("w", first_layer=0, layer_count=5, tensors=TENSORS)
    series.commit(filler(SIZES))
    check_pass(series, SIZES)
    series.update_begin()
    fill = filler(SIZES, generation=1)
    if by_callback:
        series.update_end(fill)
    else:
        for layer in filter(series.is_source, series.layers):
            fill(layer, [series.storage(layer, tensor) for tensor in range(2)])
        series.update_end()
    check_pass(series, SIZES, generation=1)
    assert series.stats().generation == 1


@every_transport
@pytest.mark.parametrize("by_callback", [True, False])
def test_an_update_reaches_every_rank(transport, by_callback):
    run(2, updates, by_callback, transport=transport)


def fast_calls(group):
    series = group.series("w", first_layer=0, layer_count=4, tensors=[layershard.Tensor("w", 8192)])
    series.commit(filler([8192]))
    for layer in series.layers:
        series.reach_fast(layer)
        series.wait_fast(layer)
        assert ctypes.string_at(series.address(layer, 0), 1)[0] == layer
    series.release(3)
    with pytest.raises(layershard.OutOfRange) as failure:
        series.wait_fast(4)
    assert failure.value.layer == 4 and failure.value.rank == group.rank
    reach = series.reach_fast
    series.close()
    for call in (reach, series.reach, series.wait, lambda layer: series.stats(), lambda layer: series.verify()):
        with pytest.raises(layershard.WrongState, match="is closed"):
            call(0)


@pytest.mark.parametrize("transport", ["shm:copy", "local"])
def test_fast_calls_do_what_the_others_do(transport):
    run(2, fast_calls, transport=transport)


def ring_calls(group):
    series = group.series("w", first_layer=0, layer_count=6, tensors=[layershard.Tensor("w", 256)], resident_bytes=0)
    series.commit(filler([256]))
    series.prepare()
    check_pass(series, [256])
    series.join()
    series.rewind()
    check_pass(series, [256])


@every_transport
def test_prepare_join_and_rewind(transport):
    run(2, ring_calls, transport=transport)


def residents(group):
    options = {"first_layer": 0, "layer_count": 6, "tensors": [layershard.Tensor("w", 256)]}
    with group.series("all", resident_bytes=layershard.ALL, **options) as series:
        series.commit(filler([256]))
        check_pass(series, [256])
        return series.stats()


def test_all_layers_may_stay():
    for stats in run(2, residents, transport="shm:copy"):
        assert stats.residents == 3 and stats.fetched_layers == 0 and stats.windows == 0


def slices(group):
    tensors = [
        layershard.Tensor("rows", 12 * 64, stripe="rows", rows=12),
        layershard.Tensor("columns", 12 * 64, stripe="columns", rows=12, column_bytes=4),
    ]
    series = group.series("w", first_layer=0, layer_count=2, tensors=tensors, placement="striped")

    with pytest.raises(layershard.NotSupported):
        series.storage(0, 0)

    def fill(layer, addresses):
        for address in addresses:
            write(address, bytes((layer * 100 + row) for row in range(12) for _ in range(64)))

    series.commit(fill)
    rows, columns = series.stripe(1, 0), series.stripe(1, 1)
    first = [ctypes.string_at(rows.address + i * rows.row_bytes, 64) for i in range(rows.end - rows.begin)]
    width = columns.end - columns.begin
    second = [ctypes.string_at(columns.address + i * columns.row_bytes, width) for i in range(12)]
    assert first == [bytes([100 + row]) * 64 for row in range(rows.begin, rows.end)]
    assert second == [bytes([100 + row]) * width for row in range(12)]
    return (rows.begin, rows.end), (columns.begin, columns.end)


def test_a_stripe_is_a_shard():
    assert run(2, slices) == [((0, 6), (0, 32)), ((6, 12), (32, 64))]


def test_a_rank_alone_needs_no_job():
    with layershard.Group() as group:
        assert (group.rank, group.size) == (0, 1)
        assert "one rank" in group.transport
        assert "rank 0 of 1" in repr(group)
    assert repr(group) == "<layershard.Group closed>"
    with pytest.raises(layershard.WrongState, match="the group is closed"):
        group.series("w", first_layer=0, layer_count=1, tensors=TENSORS)


def test_rank_and_size_are_found_in_the_environment(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    found = layershard.discover()
    assert found.source == "torchrun" and found.job is None
    with layershard.Group() as group:
        assert group.size == 1


def poisoned(group):
    tensors = [layershard.Tensor("weight", 4096, poison=b"\0\xc0\x7f\0"), layershard.Tensor("scale", 1000)]
    series = group.series("w", first_layer=0, layer_count=5, tensors=tensors, poison="ready")
    theirs = [layer for layer in series.layers if not series.is_source(layer)]
    series.commit(filler(SIZES))

    def seen(layer):
        return [ctypes.string_at(series.address(layer, tensor), size) for tensor, size in enumerate(SIZES)]

    series.poison(True)
    for _ in range(2):
        assert all(seen(layer) == [b"\0\xc0\x7f\0" * 1024, b"\xff" * 1000] for layer in theirs)
        check_pass(series, SIZES)
        series.join()
    series.poison(False)
    check_pass(series, SIZES)
    series.join()
    assert any(seen(layer)[1] != b"\xff" * 1000 for layer in theirs)


@pytest.mark.parametrize("transport", ["shm:copy", "local", "local:lockstep"])
def test_windows_are_poisoned_outside_of_use(transport):
    run(2, poisoned, transport=transport)


def not_poisoned(group):
    options = {"first_layer": 0, "layer_count": 4, "tensors": [layershard.Tensor("w", 64)]}
    with pytest.raises(layershard.Invalid, match="poison is 'yes'"):
        group.series("w", **options, poison="yes")
    with pytest.raises(layershard.Invalid, match="poison of tensor 'w'"):
        group.series("w", **{**options, "tensors": [layershard.Tensor("w", 64, poison="nan")]})
    series = group.series("w", **options)
    series.commit(filler([64]))
    with pytest.raises(layershard.WrongState, match="LAYERSHARD_POISON=ready"):
        series.poison(True)
    series.poison(False)


def test_poison_needs_memory_and_bytes():
    run(2, not_poisoned, transport="local")


def test_a_plan_counts_the_memory_of_poison():
    def windows(poison):
        tensors = [layershard.Tensor("w", 1024)]
        return layershard.plan(layer_count=8, tensors=tensors, size=2, poison=poison).window_bytes

    assert (windows("off"), windows("ready"), windows("on")) == (2048, 5120, 5120)

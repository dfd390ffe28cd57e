# SPDX-License-Identifier: Apache-2.0
"""Memory of the caller's for shards and windows: what lies there, when it is given back, and what refuses it."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest
from patience import LONG_S

import layershard
from python_ranks import check_pass, filler, run

SIZES = [1000]
OPTIONS = {"name": "w", "first_layer": 3, "layer_count": 5, "tensors": [layershard.Tensor("w", 1000)]}
LOCAL = ["local", "local:lockstep"]


class Purse:
    """Memory of ctypes; what is out, by its address."""

    def __init__(self, fails=False):
        self.fails = fails
        self.out = {}
        self.asked = []

    def allocate(self, purpose, count, alignment):
        if self.fails:
            raise MemoryError("the purse is empty")
        block = ctypes.create_string_buffer(count + alignment)
        address = -(-ctypes.addressof(block) // alignment) * alignment
        self.out[address] = purpose, count, block
        self.asked.append((purpose, count))
        return address

    def release(self, purpose, address):
        assert self.out.pop(address)[0] == purpose

    def holds(self, purpose, address):
        return any(each[0] == purpose and 0 <= address - first < each[1] for first, each in self.out.items())


def by_rank(group, purses, work, *arguments):
    return work(group, purses[group.rank], *arguments)


def walk(group, purse):
    with group.series(**OPTIONS, memory_source=purse) as series:
        series.commit(filler(SIZES))
        for _ in range(2):
            check_pass(series, SIZES)
        stats = series.stats()
        asked = dict(purse.asked)
        assert asked["shard"] >= stats.shard_bytes > 0 and asked["windows"] >= stats.window_bytes > 0
        for layer in series.layers:
            assert purse.holds("shard" if series.is_source(layer) else "windows", series.address(layer, 0))


@pytest.mark.parametrize("transport", LOCAL)
def test_shards_and_windows_lie_there_and_are_given_back(transport):
    purses = [Purse(), Purse()]
    run(2, by_rank, purses, walk, transport=transport)
    assert [purse.out for purse in purses] == [{}, {}]
    gone = [weakref.ref(purse) for purse in purses]
    purses.clear()
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_series_that_is_forgotten_gives_it_back():
    purse = Purse()
    with layershard.Group(0, 1, transport="local") as group:
        series = group.series(**OPTIONS, memory_source=purse)
        group._series = []
        assert purse.out
        del series
        gc.collect()
        assert not purse.out


def leave_first(group, purse, left, read):
    """Rank 0 leaves, and nobody there knows of its source any more, when rank 1 still reads its layers."""
    series = group.series(**OPTIONS, memory_source=purse)
    series.commit(filler(SIZES))
    if group.rank == 0:
        del purse
        group.close()
        gc.collect()
        left.set()
        assert read.wait(LONG_S)
        return
    assert left.wait(LONG_S)
    for _ in range(2):
        check_pass(series, SIZES)
    series.close()
    read.set()


def test_a_shard_that_another_rank_reads_outlives_its_series_and_its_group():
    purses = [Purse(), Purse()]
    run(2, by_rank, purses, leave_first, threading.Event(), threading.Event(), transport="local")
    assert [purse.out for purse in purses] == [{}, {}]


def raise_what_is_missing(group, purse):
    with pytest.raises(layershard.NoMemory) as failed:
        group.series(**OPTIONS, memory_source=purse)
    with group.series(**{**OPTIONS, "name": "v"}, memory_source=Purse()) as series:  # and the ranks go on together
        series.commit(filler(SIZES))
        check_pass(series, SIZES)
    with pytest.raises(layershard.Error) as later:
        group.series(**{**OPTIONS, "layer_count": 0})
    assert later.value.__cause__ is None
    return failed.value.text, failed.value.__cause__


def test_a_source_that_has_none_is_the_cause_on_its_rank():
    purses = [Purse(fails=True), Purse()]
    (words, cause), (others, no_cause) = run(2, by_rank, purses, raise_what_is_missing, transport="local")
    assert isinstance(cause, MemoryError) and "the purse is empty" in words
    assert no_cause is None and "rank 0" in others
    assert [purse.out for purse in purses] == [{}, {}]


def one_alone(group, purse):
    with pytest.raises(layershard.Mismatch, match="memory_source"):
        group.series(**OPTIONS, memory_source=purse if group.rank else None)


def test_all_ranks_or_none():
    run(2, by_rank, [Purse(), Purse()], one_alone, transport="local")


def test_shm_shares_files_of_its_own():
    with layershard.Group(0, 1, transport="shm") as group:
        with pytest.raises(layershard.NotSupported, match="no caller's memory"):
            group.series(**OPTIONS, memory_source=Purse())


# ---- On a device: the stand-in for its driver ----


class DevicePurse(Purse):
    """What the driver gives, of one allocation, as frameworks have it; found by the process that uses it."""

    def allocate(self, purpose, count, alignment):
        driver = ctypes.CDLL(os.environ["LAYERSHARD_CUDA_SO_PATH"])
        context, segment = ctypes.c_void_p(), ctypes.c_uint64()
        assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert driver.cuCtxPushCurrent_v2(context) == 0
        assert driver.cuMemAlloc_v2(ctypes.byref(segment), ctypes.c_size_t(count + 2 * alignment)) == 0
        assert driver.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
        address = -(-(segment.value + 1) // alignment) * alignment
        self.out[address] = purpose, count, None
        return address


def meet_when_closed(group):
    """A rank that has closed its series meets the other, which is late: then it has its shard back."""
    purse = DevicePurse()
    series = group.series(**OPTIONS, memory_source=purse)
    series.commit(filler(SIZES))
    check_pass(series, SIZES)
    assert {each[0] for each in purse.out.values()} == {"shard", "windows"}
    time.sleep(0.3 * group.rank)
    series.close()
    early = bool(purse.out)
    with group.series("met", first_layer=0, layer_count=2, tensors=[layershard.Tensor("w", 8)]):
        pass
    return early, purse.out


def test_a_shard_on_a_device_is_given_back_when_all_have_met(monkeypatch):
    build = os.environ.get("LAYERSHARD_TEST_BUILD")
    if build is None:
        pytest.skip("LAYERSHARD_TEST_BUILD does not say where the stand-in for the driver has been built")
    monkeypatch.setenv("LAYERSHARD_CUDA_SO_PATH", f"{build}/tests/support/libstub_cuda.so")
    found = run(2, meet_when_closed, transport="cuda:copy", memory="cuda")
    assert any(early for early, _ in found)  # whoever is first
    assert [out for _, out in found] == [{}, {}]


# ---- The end of a program ----

ENDS = """
import layershard, sys
sys.path.append(sys.argv[1])
from test_memory_source import OPTIONS, Purse
group = layershard.Group(0, 1, transport="local")
series = group.series(**OPTIONS, memory_source=Purse())
series.commit(lambda layer, addresses: None)
"""


def test_a_program_may_end_without_giving_it_back():
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", ENDS, folder], capture_output=True, text=True, timeout=LONG_S)
    assert (done.returncode, done.stderr) == (0, "")

# SPDX-License-Identifier: Apache-2.0
"""Ranks that are killed or do not come: errors with the right text, no hang. Many groups: nothing is left behind."""

import atexit
import gc
import os
import pathlib
import signal
import time
import traceback

import pytest
from patience import LONG_MS, LONG_S

import layershard
from python_ranks import Ranks, check_pass, filler

SIZES = [8192]
OPTIONS = {"first_layer": 0, "layer_count": 6, "tensors": [layershard.Tensor("w", 8192)]}


def killed_after_commit(group, folder):
    series = group.series("w", **OPTIONS)
    series.commit(filler(SIZES))
    check_pass(series, SIZES)
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + LONG_S
    while True:  # until the death is seen; passes go on meanwhile and after
        check_pass(series, SIZES)
        try:
            series.update_begin()
        except layershard.PeerFailed as error:
            seen = error
            break
        except layershard.Timeout:
            assert time.monotonic() < deadline
    check_pass(series, SIZES)
    assert seen.rank == group.rank
    return str(seen)


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_passes_go_on_after_a_kill_and_collective_calls_say_who(transport, tmp_path):
    results = Ranks(3, killed_after_commit, tmp_path, transport=transport).join()
    assert results[1] is None
    for text in (results[0], results[2]):
        assert "LSHARD_ERR_PEER_FAILED" in str(text) and "rank 1" in str(text), text


def killed_while_loading(group):
    series = group.series("w", **OPTIONS)

    def fill(layer, addresses):
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        filler(SIZES)(layer, addresses)

    series.commit(fill)


def test_a_kill_while_loading_is_an_error_on_the_others():
    results = Ranks(3, killed_while_loading).join()
    assert results[1] is None
    for error in (results[0], results[2]):
        assert isinstance(error, layershard.PeerFailed) and "rank 1" in str(error)


def test_who_is_missing_is_named():
    with pytest.raises(layershard.Timeout) as failure:
        layershard.Group(0, 3, transport="shm", job=f"test-missing-{os.getpid()}", timeout_ms=300)
    assert "rank" in str(failure.value) and failure.value.rank == 0 and failure.value.layer is None


def comes_late(group):
    if group.rank == 1:
        time.sleep(1.5)
    series = group.series("w", **OPTIONS)
    return series.layers


def test_a_late_rank_is_a_timeout_not_a_hang():
    first = Ranks(2, comes_late, timeout_ms=500).join()[0]
    assert isinstance(first, layershard.Timeout) and "rank 1" in str(first)


# ---- A forked process ----


def forks(group):
    series = group.series("w", **OPTIONS)
    series.commit(filler(SIZES))
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(LONG_S)
            for call in (
                lambda: series.reach(0),
                lambda: series.wait(0),
                lambda: series.address(0, 0),
                lambda: series.update_begin(),
                lambda: group.series("v", **OPTIONS),
                group.flush,
            ):
                with pytest.raises(layershard.WrongState, match="fork"):
                    call()
            group.abort()
            group.close()
            del series, group
            gc.collect()
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    check_pass(series, SIZES)
    series.update_begin()
    series.update_end(filler(SIZES, 1))
    check_pass(series, SIZES, 1)


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_the_end_of_a_forked_process_is_not_the_end_of_its_rank(transport):
    assert Ranks(2, forks, transport=transport).join() == [None, None]


# ---- Nothing is left ----


def open_files():
    return len(os.listdir("/proc/self/fd"))


def threads():
    """Threads that have done their work may take a moment to end."""
    deadline = time.monotonic() + LONG_S
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task"))


def resident_kib():
    """Reserved large pages, too, which are not in VmRSS."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    found = [int(line.split()[1]) for line in lines if line.startswith(("VmRSS:", "HugetlbPages:"))]
    assert len(found) == 2, lines
    return sum(found)


def many_groups(group, job, forget):
    """Many groups over the same ranks; what the process holds after some and after all of them."""
    samples = []
    for i in range(50):
        inner = layershard.Group(group.rank, group.size, transport="shm", job=f"{job}-{i}", timeout_ms=LONG_MS)
        series = inner.series("w", **{**OPTIONS, "tensors": [layershard.Tensor("w", 1 << 18)]})
        series.commit(filler([1 << 18]))
        check_pass(series, [1 << 18])
        if not forget:
            inner.close()
        del inner, series
        if i in (9, 49):
            samples.append((open_files(), threads(), resident_kib()))
    return samples


@pytest.mark.parametrize("forget", [False, True], ids=["closed", "forgotten"])
def test_fifty_groups_leave_nothing(forget):
    job = f"test-leak-{os.getpid()}-{forget}"
    for samples in Ranks(2, many_groups, job, forget).join():
        assert isinstance(samples, list), samples
        (files, tasks, kib), (files_after, tasks_after, kib_after) = samples
        assert (files_after, tasks_after) == (files, tasks)
        assert kib_after - kib < 2048, "one group's layers alone are 1536 KiB"
    assert not [name for name in os.listdir("/dev/shm") if "layershard" in name]

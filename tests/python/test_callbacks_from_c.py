# SPDX-License-Identifier: Apache-2.0
"""What the library calls back: in which thread, and what becomes of exceptions."""

import logging
import sys
import threading

import pytest
from patience import LONG_S

import layershard
from python_ranks import Ranks, filler, run

TENSORS = [layershard.Tensor("w", 512)]
OPTIONS = {"first_layer": 0, "layer_count": 4, "tensors": TENSORS}


def series_alone(group, **options):
    return group.series("w", **{**OPTIONS, **options})


def test_post_process_runs_in_the_callers_thread():
    threads = set()
    with layershard.Group(0, 1) as group:
        series_alone(group).commit(lambda layer, addresses: threads.add(threading.current_thread()))
    assert threads == {threading.main_thread()}


def fails_once(group):
    series = series_alone(group)

    def fill(layer, addresses):
        if layer == 1:
            raise FileNotFoundError("layer 1 is not on this disk")
        filler([512])(layer, addresses)

    with pytest.raises(layershard.CallbackFailed) as failure:
        series.commit(fill)
    series.commit(filler([512]))  # the header allows it
    series.verify()
    return failure.value.status, type(failure.value.__cause__).__name__, str(failure.value)


@pytest.mark.parametrize("transport", ["shm", "local"])
def test_an_exception_is_the_cause_on_its_rank_and_an_error_on_all(transport):
    first, second = run(2, fails_once, transport=transport)
    assert second[:2] == ("LSHARD_ERR_CALLBACK", "FileNotFoundError")
    assert first[:2] == ("LSHARD_ERR_CALLBACK", "NoneType")
    assert "rank 1" in first[2] and "layer 1" in second[2]


def test_what_is_no_exception_goes_through():
    def fill(layer, addresses):
        raise KeyboardInterrupt

    with layershard.Group(0, 1) as group, pytest.raises(KeyboardInterrupt):
        series_alone(group).commit(fill)


def test_a_collective_call_in_a_callback_is_refused():
    with layershard.Group(0, 1) as group:
        series = series_alone(group)
        with pytest.raises(layershard.CallbackFailed) as failure:
            series.commit(lambda layer, addresses: series_alone(group))
        assert isinstance(failure.value.__cause__, layershard.WrongState)


def test_closing_in_a_callback_waits_for_the_call():
    with layershard.Group(0, 1) as group:
        first, second = series_alone(group), series_alone(group)
        second.commit(lambda layer, addresses: first.close())
        assert first.closed and second.stats().layer_bytes == 512


def meet_by_allgather(n):
    """An all-gather among threads."""
    barrier, parts = threading.Barrier(n, timeout=LONG_S), [None] * n

    def allgather_of(rank):
        def allgather(data):
            parts[rank] = data
            barrier.wait()
            found = list(parts)
            barrier.wait()
            return found

        return allgather

    return [allgather_of(rank) for rank in range(n)]


def run_threads(works):
    results = [None] * len(works)

    def catch(i, work):
        try:
            results[i] = work()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=catch, args=each) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_ranks_meet_by_the_callers_allgather():
    allgathers = meet_by_allgather(2)

    def work(rank):
        with layershard.Group(rank, 2, transport="local", allgather=allgathers[rank]) as group:
            series = series_alone(group)
            series.commit(filler([512]))
            return series.verify()

    first, second = run_threads([lambda: work(0), lambda: work(1)])
    assert isinstance(first, int) and first == second


@pytest.mark.parametrize(
    ("allgather", "cause"),
    [
        (lambda data: [data], "not 2 of"),
        (lambda data: [data, data[1:]], "bytes"),
        (lambda data: 1 / 0, "division by zero"),
    ],
)
def test_an_allgather_that_fails_is_the_cause(allgather, cause):
    with pytest.raises(layershard.Error) as failure:
        layershard.Group(0, 2, transport="local", allgather=allgather, timeout_ms=1000)
    assert cause in str(failure.value.__cause__)


def test_lines_go_to_a_function_or_a_logger(caplog):
    lines = []
    with layershard.Group(0, 1, log=lambda level, text: lines.append((level, text))):
        pass
    assert any(level == "info" and "transport" in text for level, text in lines)
    with caplog.at_level(logging.INFO), layershard.Group(0, 1, log=logging.getLogger("layers")):
        pass
    assert any("transport" in record.getMessage() for record in caplog.records if record.name == "layers")
    caplog.clear()
    with layershard.Group(0, 1, log=logging.getLogger("layers"), log_level="error"):
        pass
    assert not caplog.records


def test_a_failing_log_function_is_shown_and_changes_nothing(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: shown.append(found.exc_type))
    with layershard.Group(0, 1, log=lambda level, text: 1 / 0) as group:
        assert group.rank == 0
    assert set(shown) == {ZeroDivisionError}


def other_count(group):
    with pytest.raises(layershard.Mismatch) as failure:
        series_alone(group, layer_count=4 + group.rank)
    return str(failure.value)


@pytest.mark.parametrize("transport", ["shm", "local"])
def test_ranks_that_disagree_are_told_how(transport):
    for text in Ranks(2, other_count, transport=transport).join():
        assert "LSHARD_ERR_MISMATCH" in text and "4" in text and "5" in text

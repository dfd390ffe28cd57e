# SPDX-License-Identifier: Apache-2.0
"""Captures that end without join, by a capture and a series that only count. What CUDA does: test_torch_cuda.py."""

import threading
import types
import weakref

import pytest

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
layershard = pytest.importorskip("layershard")

from layershard.torch import captures  # noqa: E402
from layershard.torch.one_thread import Turn  # noqa: E402


class Counting:
    name, closed = "layers.*", False
    fetches = joined_fetches = 0

    def stats(self):
        return types.SimpleNamespace(fetches=self.fetches)

    def join(self, stream):
        assert stream == 7
        self.joined_fetches = self.fetches
        raise layershard.NotPeriodic("a pass is not whole")


@pytest.fixture
def series(monkeypatch):
    """One that is watched, where a capture does nothing."""
    ended, ended.turn = Counting(), Turn([])
    ended.turn.take()
    monkeypatch.setattr(torch.cuda.graph, "ends_joined", False, raising=False)  # all as they are now after the test
    monkeypatch.setattr(torch.cuda.graph, "__enter__", lambda _capture: None)
    monkeypatch.setattr(torch.cuda.graph, "__exit__", lambda *_: None)
    monkeypatch.setattr(captures, "_watched", weakref.WeakKeyDictionary())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=7))
    captures.watch([ended], ended.turn)
    return ended


def capture():
    return torch.cuda.graph.__new__(torch.cuda.graph)


def test_what_is_not_joined_is_refused_and_joined(series):
    with pytest.raises(sharding.Refused, match=r"layers\.\*.*prepare.*join"), capture():
        series.fetches += 2
    assert series.joined_fetches == 2
    with capture():
        pass  # of something else


def test_what_is_joined_last_is_right(series):
    series.fetches = 5  # by passes before it
    with capture():
        series.fetches += 3
        series.joined_fetches = 8
    with pytest.raises(sharding.Refused), capture():
        series.fetches += 1
        series.joined_fetches = 9
        series.fetches += 1


def test_a_pass_in_another_thread_is_not_captured(series):
    thread = threading.Thread(target=series.turn.take)
    with capture():
        thread.start()
        thread.join()
        series.fetches += 1
    assert series.joined_fetches == 0


def test_what_is_raised_in_the_region_stays_what_is_raised(series):
    with pytest.raises(KeyError), capture():
        series.fetches += 1
        raise KeyError("theirs")
    assert series.joined_fetches == 1


def test_what_others_put_round_a_capture_stays(series):
    told = []
    enter, leave = torch.cuda.graph.__enter__, torch.cuda.graph.__exit__
    torch.cuda.graph.__enter__ = lambda capture: [told.append("enter"), enter(capture)][1]
    torch.cuda.graph.__exit__ = lambda capture, *error: [told.append("exit"), leave(capture, *error)][1]
    captures.watch([Counting()], series.turn)  # of a second model
    with pytest.raises(sharding.Refused), capture():
        series.fetches += 1
    assert told == ["enter", "exit"]


def test_a_model_is_sharded_while_another_thread_begins_a_capture(series, monkeypatch):
    others = []

    def stats(self):
        others.append(Counting())
        captures.watch([others[-1]], series.turn)
        return types.SimpleNamespace(fetches=0)

    monkeypatch.setattr(Counting, "stats", stats)
    with capture():
        assert others


def test_a_join_on_a_stream_is_remembered():
    def work(rank, size):
        model = sharding.shard(ranks.stack(), "*.up", transport="shm:copy")
        with torch.no_grad():
            model(ranks.inputs(rank))
        series = sharding.of(model).shared[0].series
        series.join(5)  # in host memory any number does
        assert series.joined_fetches == series.stats().fetches > 0

    ranks.run(2, work)

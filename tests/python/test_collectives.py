# SPDX-License-Identifier: Apache-2.0
"""The transport "callback" over collectives written in Python: right bytes, and failures with their cause."""

import ctypes
import threading
import weakref

import pytest
from patience import LONG_MS

import layershard
from python_ranks import check_pass, filler

SIZES = [1024, 300]
OPTIONS = {"first_layer": 2, "layer_count": 5, "tensors": [layershard.Tensor("w", 1024), layershard.Tensor("s", 300)]}


class Board:
    """Where threads leave bytes for each other: the n-th collective of every rank is the same one."""

    def __init__(self, size):
        self.size = size
        self.changed = threading.Condition()
        self.posted = {}
        self.stopped = False


class Work(list):
    """What a collective returns; those that still live are counted."""


class Threads:
    """Collectives of one rank among threads."""

    def __init__(self, board, rank, fail_at=None):
        self.board, self.rank, self.fail_at = board, rank, fail_at
        self.count = 0
        self.bootstraps = 0
        self.works = weakref.WeakValueDictionary()
        self.most_works = 0

    def _post(self, data):
        self.count += 1
        if self.count == self.fail_at:
            raise OSError("the cable is cut")
        with self.board.changed:
            self.board.posted[self.count, self.rank] = data
            self.board.changed.notify_all()
        return self.count

    def _work(self, *members):
        work = Work(members)
        self.works[id(work)] = work
        self.most_works = max(self.most_works, len(self.works))
        return work

    def broadcast(self, address, count, root):
        number = self._post(ctypes.string_at(address, count) if root == self.rank else b"")
        return self._work(number, [root] if root != self.rank else [], address, count)

    def allgather(self, send, receive, count):
        return self._work(self._post(ctypes.string_at(send, count)), range(self.board.size), receive, count)

    def finish(self, work, timeout_ms):
        number, roots, address, count = work
        keys = [(number, root) for root in roots]
        with self.board.changed:
            self.board.changed.wait_for(
                lambda: self.board.stopped or all(key in self.board.posted for key in keys), timeout_ms / 1000
            )
            if not all(key in self.board.posted for key in keys):
                if self.board.stopped:
                    raise layershard.PeerFailed("another rank stopped")
                return False
            data = b"".join(self.board.posted[key] for key in keys)
        ctypes.memmove(address, data, len(data))
        return True

    def stop(self):
        with self.board.changed:
            self.board.stopped = True
            self.board.changed.notify_all()

    def exchange(self, data):
        self.bootstraps += 1
        key = -self.bootstraps
        with self.board.changed:
            self.board.posted[key, self.rank] = data
            self.board.changed.notify_all()
            keys = [(key, rank) for rank in range(self.board.size)]
            assert self.board.changed.wait_for(lambda: all(key in self.board.posted for key in keys), 30)
            return [self.board.posted[key] for key in keys]


def run_ranks(work, *collectives):
    """What work(group) returned, or raised, on each rank."""
    results = [None] * len(collectives)

    def rank(own):
        try:
            with layershard.Group(
                own.rank,
                own.board.size,
                transport="callback",
                allgather=own.exchange,
                callbacks=own,
                timeout_ms=LONG_MS,
            ) as group:
                results[own.rank] = work(group)
        except layershard.Error as error:
            results[own.rank] = error

    threads = [threading.Thread(target=rank, args=(each,)) for each in collectives]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def passes(group):
    series = group.series("w", **OPTIONS)
    series.commit(filler(SIZES))
    for _ in range(3):
        check_pass(series, SIZES)
    return series.verify()


def test_every_rank_sees_every_layer():
    board = Board(3)
    collectives = [Threads(board, rank) for rank in range(3)]
    hashes = run_ranks(passes, *collectives)
    assert isinstance(hashes[0], int) and len(set(hashes)) == 1
    assert board.stopped
    assert [each.most_works for each in collectives] == [1, 1, 1], "works that are over are kept"


@pytest.mark.parametrize("fail_at", [1, 12])
def test_a_failure_is_the_cause_on_its_rank_and_ends_the_others(fail_at):
    board = Board(2)
    first, second = run_ranks(passes, Threads(board, 0), Threads(board, 1, fail_at))
    assert isinstance(second, layershard.TransportFailed) and "the cable is cut" in str(second)
    assert isinstance(second.__cause__, OSError)
    assert isinstance(first, layershard.Error)

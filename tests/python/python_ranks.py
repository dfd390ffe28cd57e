# SPDX-License-Identifier: Apache-2.0
"""Ranks for tests: processes over shm, or threads over local. Each runs one function of a test module."""

import ctypes
import itertools
import multiprocessing
import os
import threading

from patience import LONG_MS, LONG_S
from rank_ends import crash_of

import layershard

_jobs = itertools.count()

BY_PROCESSES = ("shm", "shm:copy")
BY_THREADS = ("local", "local:lockstep")


class Ranks:
    """Ranks that run `work(group, *arguments)`; join gives what each returned, or the exception it raised."""

    def __init__(self, size, work, *arguments, transport="shm", timeout_ms=LONG_MS, **options):
        options = {"transport": transport, "timeout_ms": timeout_ms, "job": _new_job(), **options}
        self._results = {}
        self.ranks = []
        if transport.startswith("local"):
            for rank in range(size):
                target, given = self._run_in_thread, (rank, size, options, work, arguments)
                self.ranks.append(threading.Thread(target=target, args=given, daemon=True))
                self.ranks[-1].start()
            return
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            given = (sender, rank, size, options, work, arguments)
            self.ranks.append(context.Process(target=_run_in_process, args=given, daemon=True))
            self.ranks[-1].start()
            sender.close()
            self._pipes.append(receiver)

    def _run_in_thread(self, rank, size, options, work, arguments):
        self._results[rank] = _outcome(rank, size, options, work, arguments)

    def join(self):
        for rank, each in enumerate(self.ranks):
            if isinstance(each, threading.Thread):
                each.join(LONG_S)
                assert not each.is_alive(), f"rank {rank} hangs"
                continue
            if self._pipes[rank].poll(LONG_S):
                try:
                    self._results[rank] = self._pipes[rank].recv()
                except EOFError:
                    self._results[rank] = None  # killed
            else:
                each.kill()
                raise AssertionError(f"rank {rank} hangs")
            crash = crash_of(rank, each, LONG_S)
            assert not crash, crash
        return [self._results[rank] for rank in range(len(self.ranks))]


def _new_job():
    return f"test-python-{os.getpid()}-{next(_jobs)}"


def _outcome(rank, size, options, work, arguments):
    try:
        with layershard.Group(rank, size, **options) as group:
            return work(group, *arguments)
    except Exception as error:
        return error


def _run_in_process(sender, rank, size, options, work, arguments):
    sender.send(_outcome(rank, size, options, work, arguments))


def run(size, work, *arguments, **options):
    """What each rank returned; the first exception is raised."""
    results = Ranks(size, work, *arguments, **options).join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


# ---- Layers whose bytes tell where they belong ----


def pattern(layer, tensor, n_bytes, generation=0):
    unit = bytes([layer % 251, tensor, generation, 90])
    return (unit * (n_bytes // 4 + 1))[:n_bytes]


def write(address, data):
    ctypes.memmove(address, data, len(data))


def read(address, n_bytes):
    return ctypes.string_at(address, n_bytes)


def filler(sizes, generation=0):
    def fill(layer, addresses):
        for tensor, (address, n_bytes) in enumerate(zip(addresses, sizes)):
            write(address, pattern(layer, tensor, n_bytes, generation))

    return fill


def check_pass(series, sizes, generation=0):
    """One pass in order, every byte compared."""
    for layer in series.layers:
        series.reach(layer)
        series.wait(layer)
        for tensor, n_bytes in enumerate(sizes):
            found = read(series.address(layer, tensor), n_bytes)
            assert found == pattern(layer, tensor, n_bytes, generation), (layer, tensor)

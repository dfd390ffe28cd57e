# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C ends whatever waits for other ranks, long before the deadline, and leaves a program that can go on."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from patience import LONG_MS, LONG_S, patience

import layershard
from python_ranks import Ranks

DEADLINE_MS = LONG_MS  # nobody waits for it here
SOON_S = DEADLINE_MS / 2000

BEFORE = """
    import ctypes, os, sys, time
    import layershard
    rank, job = int(sys.argv[1]), sys.argv[2]
    TENSORS = [layershard.Tensor("w", 4096)]
    def join():
        return layershard.Group(rank, 2, transport="shm", job=job, timeout_ms=DEADLINE_MS)
    def series_of(group):
        return group.series("w", first_layer=0, layer_count=4, tensors=TENSORS)
    def expect_interrupt(call):
        try:
            print("waiting", flush=True)
            call()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        else:
            sys.exit("the call came back")
""".replace("DEADLINE_MS", str(DEADLINE_MS))

# What rank 0 waits in while rank 1, alive, does not come.
WAITS = {
    "create": "expect_interrupt(join)",
    "series": "group = join(); expect_interrupt(lambda: series_of(group))",
    "commit": "group = join(); series = series_of(group); expect_interrupt(series.commit)",
    "update": "group = join(); series = series_of(group); series.commit(); expect_interrupt(series.update_begin)",
    "verify": "group = join(); series = series_of(group); series.commit(); expect_interrupt(series.verify)",
}
COMES_ALONG = {
    "create": "",
    "series": "group = join()",
    "commit": "group = join(); series = series_of(group)",
    "update": "group = join(); series = series_of(group); series.commit()",
    "verify": "group = join(); series = series_of(group); series.commit()",
}


def start(rank, job, *lines):
    text = "\n".join([textwrap.dedent(BEFORE), *lines])
    return subprocess.Popen(
        [sys.executable, "-c", text, str(rank), job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("where", WAITS)
def test_ctrl_c_ends_a_wait(where):
    job = f"test-interrupt-{where}-{os.getpid()}"
    idle = start(1, job, COMES_ALONG[where], "time.sleep(10000)")
    waiting = start(0, job, WAITS[where], "print('goes on', flush=True)")
    try:
        assert waiting.stdout.readline() == "waiting\n", waiting.stderr.read()
        time.sleep(0.3)
        begin = time.monotonic()
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=LONG_S)
        assert (out, err, waiting.returncode) == ("interrupted\ngoes on\n", "", 0)
        assert time.monotonic() - begin < SOON_S
    finally:
        for process in (idle, waiting):
            process.kill()
            process.communicate()


ABORT_IS_INTERRUPTED_TOO = """
    from layershard._calls import run_interruptible
    import threading
    returned, aborts = threading.Event(), []
    def call():
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        returned.wait(10000)
        return 7
    def abort():
        aborts.append(1)
        if len(aborts) == 1:
            os.kill(os.getpid(), signal.SIGINT) # and raises right here
            time.sleep(10000)
        returned.set()
    try:
        run_interruptible(call, abort)
    except KeyboardInterrupt:
        print(returned.is_set(), len(aborts))
"""


def test_a_second_ctrl_c_does_not_leave_the_call_behind():
    text = "import os, signal, time" + textwrap.dedent(ABORT_IS_INTERRUPTED_TOO)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=LONG_S)
    assert (done.stdout, done.stderr) == ("True 2\n", "")


WAIT_FOR_A_LAYER = """
    import os, signal, sys, threading, time
    import layershard
    def open_series(rank):
        group = layershard.Group(rank, 2, transport="local:lockstep", job="lockstep", timeout_ms=DEADLINE_MS)
        series = group.series("w", first_layer=0, layer_count=8, tensors=[layershard.Tensor("w", 4096)])
        series.commit()
        return group, series
    threading.Thread(target=lambda: (open_series(1), time.sleep(10000)), daemon=True).start()
    group, series = open_series(0)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        for layer in series.layers: # the other rank makes no pass
            series.reach_fast(layer)
            series.wait_fast(layer)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    try:
        series.wait(0)
    except layershard.Aborted:
        print("aborted", flush=True)
    os._exit(0)
""".replace("DEADLINE_MS", str(DEADLINE_MS))


def test_ctrl_c_ends_the_wait_for_a_layer():
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WAIT_FOR_A_LAYER)], capture_output=True, text=True, timeout=LONG_S
    )
    assert (done.stdout, done.stderr) == ("interrupted\naborted\n", "")
    assert time.monotonic() - begin < SOON_S


# The other rank comes late, and is waited for, since the program's own handler does not want it to end.
HANDLED = """
    import os, signal, sys, threading, time
    import layershard
    from python_ranks import check_pass, filler
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    def work(rank):
        with layershard.Group(rank, 2, transport="local:lockstep", job="handled", timeout_ms=DEADLINE_MS) as group:
            tensors = [layershard.Tensor("w", 64)]
            with group.series("w", first_layer=0, layer_count=8, tensors=tensors) as series:
                series.commit(filler([64]))
                if rank == 1:
                    time.sleep(1.5)
                else:
                    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
                check_pass(series, [64])
                series.verify()
    other = threading.Thread(target=work, args=[1])
    other.start()
    work(0)
    other.join()
    print(seen == [signal.SIGINT])
""".replace("DEADLINE_MS", str(DEADLINE_MS))


def test_a_handler_of_the_programs_own_decides_what_ends():
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ["PYTHONPATH"]])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANDLED)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONG_S,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def signals_go_on(group):
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    with group.series("w", first_layer=0, layer_count=4, tensors=[layershard.Tensor("w", 64)]) as series:
        series.commit()
        series.reach(0)
        series.wait(0)
    return signal.set_wakeup_fd(-1) == writable


@pytest.mark.parametrize("transport", ["shm:copy", "throttle=1e9,shm:copy"])
def test_a_wait_leaves_signals_as_they_were(transport):
    assert Ranks(2, signals_go_on, transport=transport).join() == [True, True]


def test_an_exception_of_another_signals_handler_ends_a_wait():
    class Alarm(Exception):
        pass

    def ring(number, frame):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    begin = time.monotonic()
    try:
        with pytest.raises(Alarm):
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            layershard.Group(0, 2, transport="shm", job=f"test-alarm-{os.getpid()}", timeout_ms=patience(4000))
        assert time.monotonic() - begin < patience(3500) / 1000  # the thread there waits on
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    deadline = time.monotonic() + LONG_S
    while any(thread.name == "layershard" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread that created the group does not end"
        time.sleep(0.05)


class SlowAbort:
    """The library, whose abort takes so long that what it ends may be over before."""

    def __init__(self, library):
        self._library = library
        self.begun, self._destroyed, self.calls = threading.Event(), threading.Event(), []

    def __getattr__(self, name):
        return getattr(self._library, name)

    def lshard_group_abort(self, pointer):
        self.begun.set()
        if not self._destroyed.wait(0.3):
            self._library.lshard_group_abort(pointer)
        self.calls.append("abort")

    def lshard_group_destroy(self, pointer):
        self._destroyed.set()
        self.calls.append("destroy")
        return self._library.lshard_group_destroy(pointer)


def test_a_group_is_not_freed_under_an_abort():
    group = layershard.Group(0, 1)
    slow = group._handle.library = SlowAbort(group._handle.library)
    aborting = threading.Thread(target=group.abort)
    aborting.start()
    assert slow.begun.wait(LONG_S)
    group.close()
    aborting.join()
    assert slow.calls == ["abort", "destroy"]


def late_abort(group, over):
    if group.rank == 1:
        while not over.exists():  # alive, but not in the call
            time.sleep(0.05)
        return
    threading.Timer(0.3, group.abort).start()
    try:
        group.series("w", first_layer=0, layer_count=4, tensors=[layershard.Tensor("w", 64)])
    finally:
        over.touch()


def test_abort_from_another_thread_ends_a_wait(tmp_path):
    first, _ = Ranks(2, late_abort, tmp_path / "over", timeout_ms=DEADLINE_MS).join()
    assert isinstance(first, layershard.Aborted)

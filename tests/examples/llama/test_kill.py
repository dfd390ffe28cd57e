# SPDX-License-Identifier: Apache-2.0
"""Ranks that are killed, and programs that are: the others finish with the right tokens, and nothing is left behind."""

import array
import fcntl
import json
import os
import pathlib
import re
import signal
import termios

import pytest
from patience import LONG_S
from programs import children_of, wait_until, wait_until_generating

RANKS = 4
PROMPTS_PER_RANK = 10


@pytest.fixture(scope="module")
def work(tmp_path_factory, sanitized):
    """Options of a run that is long enough to be disturbed in the middle."""
    path = tmp_path_factory.mktemp("prompts") / "prompts"
    count = RANKS * (3 if sanitized else PROMPTS_PER_RANK)
    path.write_text("".join(f"prompt number {j} is about\n" for j in range(count)))
    return ["--prompts", path, "--max-tokens", "480"]


@pytest.fixture(scope="module")
def expected(program, tiny, work):
    return program.json("--model", tiny, "--ranks", 1, "--replicated", *work)["prompts"]


def left_of(pids):
    """What is there still of these processes, zombies included, and of the sockets under which they met."""
    processes = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    sockets = [
        line
        for line in pathlib.Path("/proc/net/unix").read_text().splitlines()
        if any(re.search(rf"layershard.*run-{pid}-", line) for pid in pids)
    ]
    memory = [path.name for path in pathlib.Path("/dev/shm").iterdir() if "layershard" in path.name]
    return processes + sockets + memory


@pytest.mark.parametrize("victim", range(RANKS))
@pytest.mark.parametrize(
    "mode", [[], ["--shm-copy"], ["--shm-copy", "--placement", "striped"]], ids=["shm", "shm-copy", "shm-copy-striped"]
)
def test_the_others_finish_when_a_rank_is_killed(program, tiny, work, expected, mode, victim):
    process = program.start("--model", tiny, "--ranks", RANKS, *mode, *work, "--json")
    children = wait_until_generating(process, RANKS)
    os.kill(children[victim], signal.SIGKILL)
    done = program.finish(process)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    lost = []
    for prompt, right in zip(result["prompts"], expected):
        if prompt["rank"] != victim:
            assert prompt["error"] is None and prompt["tokens"] == right["tokens"]
        elif prompt["error"] is None:
            assert prompt["tokens"] == right["tokens"], "finished before its rank was killed"
        else:
            lost.append(prompt["index"])
            assert f"rank {victim} " in prompt["error"] and "signal 9" in prompt["error"]
            assert prompt["tokens"] == right["tokens"][: len(prompt["tokens"])]
    assert lost, "the rank had finished before it was killed: the work is too short for this machine"
    assert f"rank {victim} (process {children[victim]}) was ended by signal 9" in done.stderr
    assert f"not finished by rank {victim}: prompts {', '.join(map(str, lost))}\n" in done.stderr
    assert result["ranks"][victim]["pss_bytes"] is None
    assert all(result["ranks"][rank]["pss_bytes"] > 0 for rank in range(RANKS) if rank != victim)
    assert left_of([process.pid, *children]) == []


def test_the_table_names_the_rank_that_is_gone(program, tiny, work):
    process = program.start("--model", tiny, "--ranks", 2, *work)
    children = wait_until_generating(process, 2)
    os.kill(children[1], signal.SIGSEGV)
    done = program.finish(process)
    assert done.returncode == 1
    assert re.search(r"^1 \(failed\)", done.stdout, re.MULTILINE) and re.search(r"^0 +\d", done.stdout, re.MULTILINE)
    assert "1 of 2 ranks" in done.stdout and "[not finished: rank 1 " in done.stdout
    assert "signal 11" in done.stderr or "exit status" in done.stderr  # a sanitizer turns the signal into an exit


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("mode", [[], ["--shm-copy"]], ids=["shm", "shm-copy"])
def test_ranks_end_with_the_program(program, tiny, work, mode, number):
    process = program.start("--model", tiny, "--ranks", RANKS, *mode, *work)
    children = wait_until_generating(process, RANKS)
    process.send_signal(number)
    done = program.finish(process)
    assert process.returncode == -number
    assert "tok/s" not in done.stdout, "the work was done first"
    if number == signal.SIGKILL:
        # Nobody is left to reap them but the first process, and they may be seen until it has.
        wait_until(lambda: not any(is_alive(pid) for pid in children), "the ranks end")
    else:
        assert left_of([process.pid, *children]) == []


def state_of(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_alive(pid):
    return state_of(pid) not in "ZX"


def is_asleep(pid):
    return state_of(pid) == "S"


def test_a_reader_that_does_not_read_holds_up_no_signal(program, tiny, work):
    process = program.start("--model", tiny, "--ranks", RANKS, *work)
    fcntl.fcntl(process.stdout, 1031, 4096)  # F_SETPIPE_SZ: little room
    children = wait_until_generating(process, RANKS)
    seen = []

    def is_held_up():
        waiting = array.array("i", [0])
        fcntl.ioctl(process.stdout, termios.FIONREAD, waiting)
        seen.append((waiting[0], is_asleep(process.pid)))
        return len(seen) > 50 and waiting[0] > 0 and set(seen[-50:]) == {(waiting[0], True)}

    wait_until(is_held_up, "nothing moves any more")
    process.send_signal(signal.SIGINT)
    assert process.wait(LONG_S) == -signal.SIGINT
    program.finish(process)
    assert left_of([process.pid, *children]) == []


def test_a_reader_that_leaves_ends_the_ranks(program, tiny, work):
    process = program.start("--model", tiny, "--ranks", RANKS, *work)
    children = wait_until_generating(process, RANKS)
    process.stdout.close()
    assert process.wait(LONG_S) == -signal.SIGPIPE
    assert left_of([process.pid, *children]) == []


def test_interrupting_threads_ends_the_program(program, tiny, work):
    process = program.start("--model", tiny, "--ranks", 2, "--transport", "local", *work)
    wait_until(lambda: len(os.listdir(f"/proc/{process.pid}/task")) >= 3, "two ranks as threads")
    assert children_of(process.pid) == []
    process.send_signal(signal.SIGINT)
    program.finish(process)
    assert process.returncode == -signal.SIGINT


def test_nothing_is_left_after_an_ordinary_run(program, tiny):
    process = program.start("--model", tiny, "--ranks", 3, "--shm-copy", "--max-tokens", 2)
    assert program.finish(process).returncode == 0
    assert left_of([process.pid]) == []

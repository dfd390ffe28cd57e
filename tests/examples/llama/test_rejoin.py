# SPDX-License-Identifier: Apache-2.0
"""A rank that is killed and started again while another goes on reads no layer, and says what it would have said."""

import json
import os
import signal

import pytest
from programs import cpu_ticks, shard_mappings, tokens_of, wait_until

PROMPTS = 6


@pytest.fixture
def start(program, tiny, tmp_path, sanitized):
    """Start a rank of two; what it has to do takes long enough to be disturbed."""
    count = 12 if sanitized else 60
    (tmp_path / "prompts").write_text("".join(f"prompt number {j} is about\n" for j in range(count)))
    started = []

    def begin(rank, *options, **environment):
        variables = {"LAYERSHARD_RANK": rank, "LAYERSHARD_SIZE": 2, "LAYERSHARD_JOB": f"rejoin-{os.getpid()}"}
        variables |= {"LAYERSHARD_REJOIN": "allow", "LAYERSHARD_TIMEOUT_MS": 20000, **environment}
        process = program.start("--model", tiny, *options, env={name: str(value) for name, value in variables.items()})
        started.append(process)
        return process

    yield begin, ["--prompts", tmp_path / "prompts", "--max-tokens", 480]
    for process in started:
        process.kill()
        process.communicate()


def prompts_of(count):
    return [word for j in range(count) for word in ("--prompt", f"prompt number {j} is about")]


@pytest.mark.parametrize("options", [[], ["--placement", "striped"], ["--shm-copy", "--resident", "50%"]])
def test_it_reads_no_layer_and_says_the_same(program, tiny, start, options):
    begin, long = start
    first = [begin(rank, *options, *long) for rank in range(2)]
    for process in first:
        wait_until(lambda process=process: shard_mappings(process.pid), "the rank maps its layers")
        before = cpu_ticks(process.pid)
        wait_until(lambda process=process, before=before: cpu_ticks(process.pid) > before + 5, "the rank computes")
    first[1].send_signal(signal.SIGKILL)
    program.finish(first[1])

    work = [*prompts_of(PROMPTS), "--max-tokens", 12, "--json"]
    done = program.finish(begin(1, *options, *work))
    result = json.loads(done.stdout)
    right = program.json("--model", tiny, "--ranks", 1, *work[:-1])
    assert tokens_of(result) == tokens_of(right)[1::2]
    # What is no layer, the embedding and the vocabulary, is a small part of the tiny model.
    assert 0 < result["ranks"][0]["read_bytes"] < right["ranks"][0]["read_bytes"] / 8
    assert program.finish(first[0]).returncode == 0


def test_it_begins_anew_where_nobody_lives(program, tiny, start):
    begin, _ = start
    work = [*prompts_of(2), "--max-tokens", 4, "--json"]
    for _times in range(2):
        ends = [program.finish(process) for process in [begin(rank, *work) for rank in range(2)]]
        assert [done.returncode for done in ends] == [0, 0], [done.stderr for done in ends]

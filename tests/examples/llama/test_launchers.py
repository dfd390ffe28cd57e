# SPDX-License-Identifier: Apache-2.0
"""Ranks that torchrun, mpirun or srun have started: how they find each other, and what they print on one terminal."""

import contextlib
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess

import pytest
from patience import LONG_MS, LONG_S, patience
from programs import clean_environment, cpu_ticks, make_model, shard_mappings, tokens_of, wait_until

PROMPTS = [word for text in ("one", "two", "three", "four") for word in ("--prompt", text)]
DEADLINE = {"LAYERSHARD_TIMEOUT_MS": str(LONG_MS)}


def torchrun(rank, size, run_id="none", port="29500", restarts="0"):
    """What torchrun leaves in the environment of a rank."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": restarts,
    }  # fmt: skip


def open_mpi(rank, size, namespace):
    return {
        "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size), "PMIX_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), "PMIX_NAMESPACE": namespace,
    }  # fmt: skip


def slurm(rank, size, step):
    return {
        "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size), "SLURM_LOCALID": str(rank),
        "SLURM_JOB_ID": f"t{os.getpid()}", "SLURM_STEP_ID": step,
    }  # fmt: skip


@pytest.fixture
def unique(tmp_path):
    return f"test-{os.getpid()}-{tmp_path.name}"


def start(program, tiny, environment, *options):
    return program.start("--model", tiny, "--max-tokens", 6, *options, env={**DEADLINE, **environment})


def results_of(program, processes):
    ended = [program.finish(process) for process in processes]
    assert [done.returncode for done in ended] == [0] * len(ended), [done.stderr for done in ended]
    return [json.loads(done.stdout) for done in ended]


# ---- The name of a job


@pytest.mark.parametrize("launcher", [torchrun, open_mpi, slurm], ids=lambda launcher: launcher.__name__)
def test_ranks_of_a_launcher_meet_without_a_name_of_the_users(program, tiny, unique, launcher):
    alone = program.json("--model", tiny, "--ranks", 1, "--max-tokens", 6, *PROMPTS)
    processes = [start(program, tiny, launcher(rank, 2, unique), *PROMPTS, "--json") for rank in range(2)]
    for rank, result in enumerate(results_of(program, processes)):
        assert result["config"]["ranks"] == 2 and [each["rank"] for each in result["ranks"]] == [rank]
        assert tokens_of(result) == tokens_of(alone)[rank::2]


def test_two_jobs_at_once_do_not_meet(program, tiny, other_tiny):
    """Each of them would be told that its models differ, or that it has two ranks 0."""
    port = str(20000 + os.getpid() % 20000)
    jobs = [
        [start(program, model, torchrun(rank, 2, port=str(int(port) + number)), *PROMPTS, "--json") for rank in (0, 1)]
        for number, model in enumerate((tiny, other_tiny))
    ]
    for model, processes in zip((tiny, other_tiny), jobs):
        alone = program.json("--model", model, "--ranks", 1, "--max-tokens", 6, *PROMPTS)
        for rank, result in enumerate(results_of(program, processes)):
            assert tokens_of(result) == tokens_of(alone)[rank::2]


def test_a_restart_does_not_meet_the_attempt_before(program, tiny, unique):
    """Rank 0 of the first attempt still waits for its rank 1, which never came."""
    first = start(program, tiny, torchrun(0, 2, unique, restarts="0"), *PROMPTS)
    try:
        again = [start(program, tiny, torchrun(rank, 2, unique, restarts="1"), *PROMPTS, "--json") for rank in (1, 0)]
        results_of(program, again)
        assert first.poll() is None
    finally:
        first.kill()
        program.finish(first)


def test_a_launcher_that_names_no_job_is_told_of(program, tiny):
    for environment in ({"PMI_RANK": "0", "PMI_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}):
        done = program.run("--model", tiny, env=environment)
        assert done.returncode == 2 and "LAYERSHARD_JOB" in done.stderr


def test_under_torchrun_itself(program, tiny):
    tool = pathlib.Path(program.path).parent / "venv" / "bin" / "torchrun"
    if not tool.exists():
        pytest.skip(f"no torchrun at {tool}: scripts/python_env.sh makes it")
    command = [tool, "--nproc-per-node", "2", "--no-python", program.path, "--model", tiny, "--max-tokens", "2"]
    done = subprocess.run(command, capture_output=True, env=clean_environment(DEADLINE), timeout=LONG_S)
    assert done.returncode == 0, done.stderr
    for j in range(4):
        assert b"[prompt %d, rank %d] " % (j, j % 2) in done.stdout


# ---- A model that is refused


@pytest.fixture
def unsupported(tiny, tmp_path):
    model = tmp_path / "llama3.gguf"
    model.write_bytes(pathlib.Path(tiny).read_bytes().replace(b"smollm", b"llama3"))
    return model


@pytest.mark.parametrize("mode", [[], ["--verify"]], ids=["prompts", "verify"])
@pytest.mark.parametrize("launcher", [torchrun, open_mpi, slurm], ids=lambda launcher: launcher.__name__)
def test_rank_0_says_for_all_why_a_model_is_refused(program, unsupported, unique, launcher, mode):
    for rank in range(3):
        done = program.run(*mode, "--model", unsupported, env=launcher(rank, 3, unique))
        assert done.returncode == 4 and done.stdout == ""
        assert ("'llama3'" in done.stderr) == (rank == 0) == (done.stderr != ""), done.stderr
    logged = program.run(*mode, "--model", unsupported, env={**launcher(1, 3, unique), "LAYERSHARD_LOG": "error"})
    assert logged.returncode == 4 and "'llama3'" in logged.stderr


def test_ranks_of_no_launcher_say_each_why_a_model_is_refused(program, unsupported):
    """Each may have a terminal of its own."""
    done = program.run("--model", unsupported, env={"LAYERSHARD_RANK": "1", "LAYERSHARD_SIZE": "2"})
    assert done.returncode == 4 and "'llama3'" in done.stderr


def test_a_model_that_one_rank_cannot_read_is_told_by_it(program, tmp_path, unique):
    done = program.run("--model", tmp_path / "none.gguf", env=open_mpi(1, 2, unique))
    assert done.returncode == 4 and "none.gguf" in done.stderr


def test_a_model_is_refused_once_under_mpirun_itself(program, unsupported):
    """mpirun ends all ranks when one ends badly: so none of them does."""
    if not shutil.which("mpirun"):
        pytest.skip("no mpirun")
    done = subprocess.run(
        ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3", "sh", "-c",
         '"$0" "$@"; echo "status $?"', program.path, "--model", unsupported],
        capture_output=True, env=clean_environment(DEADLINE), timeout=LONG_S, text=True,
    )  # fmt: skip
    assert done.stdout == "status 4\n" * 3, (done.stdout, done.stderr)
    assert done.stderr.count("'llama3'") == 1, done.stderr


# ---- One terminal


def shown_by(commands):
    """What a terminal gets from all of them together, and their exit statuses."""
    master, slave = pty.openpty()
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, close_fds=True,
            env=clean_environment({"TERM": "xterm", **DEADLINE, **environment}),
        )
        for command, environment in commands
    ]  # fmt: skip
    os.close(slave)
    shown = b""
    while select.select([master], [], [], LONG_S)[0]:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    return [process.wait(LONG_S) for process in processes], shown.decode(errors="replace")


def texts_of(shown):
    """The pieces that begin with a prompt's own heading, up to the empty line behind them."""
    return re.findall(r"\033\[2m\[prompt \d+, rank \d+\]\033\[0m .*?\r\n\r\n(?=\033|Memory)", shown, re.DOTALL)


def test_ranks_of_a_launcher_print_each_text_whole(program, tiny, unique):
    """Tokens as they come would be a heap of both ranks' syllables."""
    prompts = [word for number in range(8) for word in ("--prompt", f"prompt number {number}")]
    work = [program.path, "--model", tiny, "--max-tokens", "60", *prompts]
    codes, streamed = shown_by([([*work, "--ranks", "2"], {})])
    assert codes == [0]
    codes, shown = shown_by([(work, torchrun(rank, 2, unique)) for rank in range(2)])
    assert codes == [0, 0]
    texts = texts_of(streamed)
    assert len(texts) == 8
    for text in texts:
        assert text in shown
    assert "loading" not in shown and "\033[K" not in shown, "a progress line would erase another rank's"
    assert shown.count("Memory and reads") == 2


# ---- Memory


def test_memory_is_measured_while_all_ranks_are_there(program, tmp_path, sanitized, unique):
    """Rank 1 has no prompt and is done at once. Measured then, or after rank 0 had left, all that it stores would look
    its own; measured while rank 0 computes from it, half of each page is."""
    if sanitized:
        pytest.skip("a sanitizer has memory of its own")
    model = make_model(tmp_path, "--layers", "4", "--hidden", "512", "--feed-forward", "2048", "--types", "Q4_1")
    work = ["--prompt", "a", "--json"]
    processes = [start(program, model, torchrun(rank, 2, unique), *work) for rank in range(2)]
    for rank, result in enumerate(results_of(program, processes)):
        own = result["ranks"][0]
        assert own["share_bytes"] > 30e6
        shared = own["pss_bytes"] - own["private_bytes"] + own["shared_hugetlb_bytes"] // 2
        assert shared > 0.4 * own["share_bytes"], (rank, own)


@contextlib.contextmanager
def late_and_done(program, tiny, job, *options):
    """Rank 0 with much to do, stopped while it does it, and a rank 1 that is done and whose deadline has passed."""
    work = [word for number in range(40) for word in ("--prompt", f"{number}")]
    command = ["--model", tiny, "--max-tokens", "400", *options]
    short = {"LAYERSHARD_TIMEOUT_MS": str(patience(5000))}
    late = program.start(*command, *work, env={**DEADLINE, **torchrun(0, 2, job)})
    done = program.start(*command, "--prompt", "a", env={**short, **torchrun(1, 2, job)})
    try:
        wait_until(lambda: shard_mappings(late.pid), "rank 0 maps its layers")
        before = cpu_ticks(late.pid)
        wait_until(lambda: cpu_ticks(late.pid) > before + 5, "rank 0 computes")
        late.send_signal(signal.SIGSTOP)
        assert done.stderr.readline().startswith(b"layershard-llama: rank 1 is done and waits for the other ranks")
        yield late, done
    finally:
        for process in (late, done):
            process.kill()
            program.finish(process)


def test_memory_is_measured_after_more_than_a_deadline(program, tiny, unique):
    """Rank 0 is late by more than rank 1 ever waits at once; both tell their memory nevertheless."""
    with late_and_done(program, tiny, unique, "--json") as (late, done):
        assert done.poll() is None
        late.send_signal(signal.SIGCONT)
        for result in results_of(program, [late, done]):
            assert result["ranks"][0]["pss_bytes"] > result["ranks"][0]["private_bytes"] > 0


def test_memory_is_not_told_where_a_rank_was_not_there(program, tiny, unique):
    """A rank that is dead is not waited for, and the words name it and no call of the library."""
    with late_and_done(program, tiny, unique) as (late, waiting):
        late.kill()
        done = program.finish(waiting)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^1 +[\d.]+ +0\.0 +0\.0 +- +- ", done.stdout, re.MULTILINE), done.stdout
    told = " ".join(done.stdout.split()).partition("Memory was not measured: ")[2]
    assert told == "that takes all ranks at once: rank 0 is gone"

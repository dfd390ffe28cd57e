# SPDX-License-Identifier: Apache-2.0
"""What the tests of programs share: the programs themselves, models, ways to run them, and what all of them must do.

LAYERSHARD_TEST_BUILD        folder of the programs (default: build in this tree)
LAYERSHARD_TEST_MODEL_TINY   a small model (default: made here by scripts/make_tiny_gguf.py)
LAYERSHARD_TEST_MODEL        the model of scripts/fetch_model.sh; tests that need it are skipped without
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

TREE = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(TREE / "tests"))
from patience import LONG_S  # noqa: E402

COLUMNS = 80
FAILED, USAGE, BAD_MODEL = 1, 2, 4

OWN_PREFIXES = ("LAYERSHARD_", "OMPI_", "PMI", "SLURM_", "MPI_", "TORCHELASTIC_")
OWN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OPENBLAS_NUM_THREADS")


# A shell starts what runs in the background deaf to Ctrl-C, and nohup to a hang-up: not so the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def clean_environment(extra):
    """The tester's own settings and launchers must not change what is tested."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OWN_PREFIXES) and k not in OWN_NAMES}
    kept["OPENBLAS_NUM_THREADS"] = "1"
    kept.update(extra or {})
    return {name: value for name, value in kept.items() if value is not None}  # None: not set


class Program:
    def __init__(self, path):
        self.path = path

    def start(self, *arguments, env=None, **keywords):
        command = [self.path, *map(str, arguments)]
        return subprocess.Popen(
            command, env=clean_environment(env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords
        )

    def run(self, *arguments, env=None, input=None, timeout=LONG_S):
        process = self.start(*arguments, env=env, stdin=subprocess.PIPE if input is not None else subprocess.DEVNULL)
        return self.finish(process, input=input, timeout=timeout)

    @staticmethod
    def finish(process, input=None, timeout=LONG_S):
        try:
            out, err = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"no end within {timeout} s: {process.args}\n{err.decode(errors='replace')}")
        return subprocess.CompletedProcess(
            process.args, process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
        )

    def json(self, *arguments, env=None, timeout=LONG_S):
        """The object that a run which must go well prints."""
        done = self.run(*arguments, "--json", env=env, timeout=timeout)
        assert done.returncode == 0, (done.args, done.stderr)
        assert done.stderr == "", done.args
        return json.loads(done.stdout)


def two_nodes(turns=None):
    """The environment in which programs see a machine of two NUMA nodes, and a third that is memory only. They are on
    the second one; or, with a file `turns`, by turns on the first and the second."""
    build = pathlib.Path(os.environ.get("LAYERSHARD_TEST_BUILD", TREE / "build"))
    feigned = {"LD_PRELOAD": str(build / "tests" / "support" / "libtwo_nodes.so")}
    if turns:
        feigned["TWO_NODES_TURNS"] = str(turns)
    return {**feigned, "ASAN_OPTIONS": "verify_asan_link_order=0"}


def program_named(name):
    path = os.path.join(os.environ.get("LAYERSHARD_TEST_BUILD", str(TREE / "build")), name)
    if not os.access(path, os.X_OK):
        assert "LAYERSHARD_TEST_BUILD" not in os.environ, f"there is no program {path}"
        pytest.skip(f"no program at {path}: build it, or set LAYERSHARD_TEST_BUILD")
    return Program(path)


@pytest.fixture(scope="session")
def sanitized():
    flags = json.loads(program_named("layershard").run("info", "--json").stdout)["build"]["flags"]
    return "no sanitizer" not in flags


def make_model(directory, *options):
    path = str(directory / "tiny.gguf")
    subprocess.run([sys.executable, str(TREE / "scripts" / "make_tiny_gguf.py"), path, *options], check=True)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    given = os.environ.get("LAYERSHARD_TEST_MODEL_TINY")
    return given or make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def other_tiny(tmp_path_factory):
    """Of the same shape, with other weights."""
    return make_model(tmp_path_factory.mktemp("other"), "--seed", "2")


@pytest.fixture(scope="session")
def real():
    path = os.environ.get("LAYERSHARD_TEST_MODEL")
    if not path or not os.path.exists(path):
        pytest.skip("LAYERSHARD_TEST_MODEL names no file (scripts/fetch_model.sh prints its path)")
    return path


@pytest.fixture(scope="session")
def fixture_cases():
    """What the reference makes of the real model: see scripts/make_fixture.py."""
    return json.loads((TREE / "tests" / "examples" / "llama" / "fixtures" / "smollm2.json").read_text())["cases"]


def tokens_of(result):
    return [prompt["tokens"] for prompt in result["prompts"]]


def children_of(pid):
    """Living children, in the order in which they were started; ranks are started in order."""
    try:
        return [int(word) for word in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def cpu_ticks(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def shard_mappings(pid):
    """Bytes and permissions of each mapping of shards and windows."""
    found = []
    for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "layershard:" in line and "layershard:control" not in line:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            found.append((end - begin, line.split()[1], line.split(None, 5)[5]))
    return found


def wait_until(condition, what, seconds=LONG_S):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    pytest.fail(f"not within {seconds} s: {what}")


def wait_until_generating(process, ranks):
    """Returns the ranks' process ids once each of them has mapped the layers and computed for a while since."""

    def all_started():
        children = children_of(process.pid)
        return children if len(children) == ranks and all(shard_mappings(pid) for pid in children) else None

    children = wait_until(all_started, f"{ranks} ranks that have mapped their layers")
    before = {pid: cpu_ticks(pid) for pid in children}
    wait_until(lambda: all(cpu_ticks(pid) > before[pid] + 5 for pid in children), "every rank computes")
    return children


# ---- What all programs must do


def refused(done, code, *words):
    assert done.returncode == code, (done.args, done.stdout, done.stderr)
    assert done.stderr.startswith(os.path.basename(done.args[0]) + ": "), done.stderr
    for word in words:
        assert word in done.stderr, done.args


def too_wide(text):
    return [line for line in text.splitlines() if len(line) > COLUMNS]


def fits_80_columns(done):
    """Values of environment variables, and texts of the model, are as they are."""
    lines = [line for line in too_wide(done.stdout) if not re.match(r"  [A-Z_]+=|\[prompt ", line)]
    assert not [line for line in lines if " " in line.strip()], lines


def takes_closed_descriptors(program, *arguments):
    """Nothing of the program's own may take their numbers; an output that nobody gets is a failure."""

    def close(*descriptors):
        line = 'exec "$0" "$@" ' + " ".join(f"{descriptor}>&-" for descriptor in descriptors)
        command = ["sh", "-c", line, program.path, *arguments]
        return subprocess.run(command, capture_output=True, env=clean_environment(None), timeout=LONG_S)

    done = close(1)
    assert done.returncode == FAILED and b"standard output is closed" in done.stderr
    assert close(1, 2).returncode == FAILED and close(0, 1, 2).returncode == FAILED
    for descriptors in ((0,), (2,), (0, 2)):
        done = close(*descriptors)
        assert done.returncode == 0 and done.stdout and done.stderr == b""


def tells_that_the_disk_is_full(program, *arguments):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [program.path, *arguments], stdout=full, stderr=subprocess.PIPE, env=clean_environment(None), timeout=LONG_S
        )
    assert done.returncode == FAILED and b"could not be written: No space left on device" in done.stderr

# SPDX-License-Identifier: Apache-2.0
"""What `layershard-llama` tells of itself: help, version, the library's log; lines fit a terminal of 80 columns."""

import re

import pytest
from programs import TREE, fits_80_columns, too_wide


def test_help_names_every_option_and_exit_status(program):
    done = program.run("--help")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("Usage: layershard-llama ")
    for option in (
        "ranks", "model", "prompt", "prompts", "max-tokens", "prefetch", "placement", "resident", "transport",
        "shm-copy", "link-gbits", "replicated", "verify", "json", "version",
    ):  # fmt: skip
        assert f"--{option}" in done.stdout
    for code in "0124":
        assert re.search(f"^  {code}  ", done.stdout, re.MULTILINE), "every exit status is told"
    assert not too_wide(done.stdout)
    assert program.run("-h").stdout == program.run("--verify", "--help").stdout == done.stdout


def test_help_says_which_models_are_read(program):
    text = " ".join(program.run("--help").stdout.split())
    for word in ("GGUF file (version 2 or 3", "not split", "'llama'", "'gpt2'", "'smollm'", "F32, F16, Q8_0 or Q4_1"):
        assert word in text


def test_help_names_every_variable_that_the_sources_read(program):
    """A variable that nobody can look up is one that nobody can debug."""
    read = set()
    for path in (TREE / "examples" / "llama").glob("*.c"):
        read |= set(re.findall(r'"((?:LAYERSHARD|XDG)_[A-Z_]+|HOME|OPENBLAS_NUM_THREADS)"', path.read_text()))
    read -= {"LAYERSHARD_TRANSPORT", "LAYERSHARD_TIMEOUT_MS"}  # the library's: 'layershard info' tells them
    assert {"LAYERSHARD_MODEL", "LAYERSHARD_CACHE", "HOME"} <= read
    text = program.run("--help").stdout
    assert not [name for name in read if name not in text]


def test_version_names_the_libraries(program):
    done = program.run("--version")
    assert done.returncode == 0 and done.stderr == ""
    assert re.fullmatch(r"layershard-llama \d+\.\d+\.\d+\nblas   .+\npcre2  .+\n", done.stdout)


@pytest.mark.parametrize(
    "options",
    [
        "--ranks 3 --max-tokens 2 --shm-copy --resident 40%",
        "--ranks 2 --max-tokens 2 --replicated",
        "--verify --ranks 2",
    ],
)
def test_output_fits_80_columns(program, tiny, options):
    done = program.run(*options.split(), "--model", tiny, env={"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    fits_80_columns(done)


def test_log_lines_name_the_rank(program, tiny):
    done = program.run("--model", tiny, "--ranks", 2, "--max-tokens", 1, env={"LAYERSHARD_LOG": "info"})
    assert done.returncode == 0
    assert re.search(r"^\[layershard r0\] ", done.stderr, re.MULTILINE)
    assert re.search(r"^\[layershard r1\] ", done.stderr, re.MULTILINE)
    assert program.run("--model", tiny, "--ranks", 2, "--max-tokens", 1).stderr == ""

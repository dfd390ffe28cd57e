# SPDX-License-Identifier: Apache-2.0
"""What all commands print: help, and lines that fit a terminal of 80 columns."""
import re

import pytest

COLUMNS = 80
COMMANDS = ["run", "verify", "info", "bench", "bench calls", "bench link", "bench step", "bench step --devices 0"]


def too_wide(text):
    return [line for line in text.splitlines() if len(line) > COLUMNS]


# ---- Help


def test_help_alone_lists_the_commands(program):
    done = program.run("help")
    assert done.returncode == 0 and done.stdout == program.run("--help").stdout
    for command in ("run", "info", "bench", "verify", "help [COMMAND]", "Exit status"):
        assert command in done.stdout
    assert program.run("help", "help").stdout == done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(program, command):
    done = program.run("help", *command.split())
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == program.run(*command.split(), "--help").stdout
    assert done.stdout.startswith(f"Usage: layershard {command.split(' --')[0]}")
    assert not too_wide(done.stdout)
    for code in "01234":
        assert re.search(f"^  {code}  ", done.stdout, re.MULTILINE), "every exit status is told"


def test_help_of_no_command(program):
    done = program.run("help", "walk")
    assert done.returncode == 2 and "'walk'" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("command", ["run", "verify"])
def test_help_says_which_models_are_read(program, command):
    text = " ".join(program.run("help", command).stdout.split())
    for word in ("GGUF file (version 2 or 3", "not split", "'llama'", "'gpt2'", "'smollm'", "F32, F16, Q8_0 or Q4_1"):
        assert word in text


# ---- Width


@pytest.mark.parametrize(
    "command",
    [
        "run --ranks 3 --max-tokens 2 --shm-copy --resident 40%",
        "run --ranks 2 --max-tokens 2 --replicated",
        "verify --ranks 2",
        "bench link --max-bytes 64K --iters 1 --warmup 1",
        "bench link --max-bytes 64K --iters 1 --warmup 1 --ranks 3 --readers 2 --placement owner,striped",
        "bench step --layers 6 --compute-us 50 --passes 1 --margin 100 --slow-rank-percent 5",
        "info",
    ],
    ids=lambda command: " ".join(command.split()[:2]),
)
def test_output_fits_80_columns(program, tiny, command):
    words = command.split()
    model = ["--model", tiny] if words[0] in ("run", "verify") else []
    done = program.run(*words, *model, env={"COLUMNS": "80"})
    assert done.returncode in (0, 3), done.stderr
    # values of environment variables, and texts of the model, are as they are
    lines = [line for line in too_wide(done.stdout) if not re.match(r"  [A-Z_]+=|\[prompt ", line)]
    assert not [line for line in lines if " " in line.strip()], lines


def test_a_wide_table_is_cut_between_columns_and_loses_nothing(program):
    """Every part begins with the columns that tell its rows apart."""
    options = ["bench", "step", "--layers", 6, "--compute-us", 50, "--passes", 1, "--margin", 100]
    out = program.run(*options, "--prefetch", "0,1").stdout
    head = r"^ratio +k +resident"
    parts = [line for line in out.splitlines() if re.match(head, line)]
    assert len(parts) == 2
    names = " ".join(parts)
    for column in ("fetched", "windows", "least..most", "exposed", "stalled", "predicted", "hidden", "link busy"):
        assert names.count(column) == 1
    rows = re.findall(r"^ +(?:2\.6|1\.2|0\.6) +([01]) +0 ", out, re.MULTILINE)
    assert rows == ["0", "1"] * 3 * 2, out

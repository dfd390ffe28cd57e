# SPDX-License-Identifier: Apache-2.0
"""Help, output that fits a terminal of 80 columns or that nobody gets."""

import re

import pytest
from programs import USAGE, fits_80_columns, refused, takes_closed_descriptors, tells_that_the_disk_is_full, too_wide

COMMANDS = ["calls", "link", "read", "step"]


def test_help_alone_lists_the_commands(program):
    done = program.run("help")
    assert done.returncode == 0 and done.stdout == program.run("--help").stdout == program.run("-h").stdout
    for command in (*COMMANDS, "help [COMMAND]", "Exit status"):
        assert command in done.stdout
    assert not too_wide(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(program, command):
    done = program.run("help", command)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == program.run(command, "--help").stdout == program.run(command, "-h").stdout
    assert done.stdout.startswith(f"Usage: layershard-bench {command} ")
    assert not too_wide(done.stdout)
    for code in "0123":
        assert re.search(f"^  {code}  ", done.stdout, re.MULTILINE), "every exit status is told"


def test_unknown_commands_are_told_the_known_ones(program):
    refused(program.run("walk"), USAGE, "'walk'", *COMMANDS, "'layershard-bench --help'")
    refused(program.run(), USAGE, *COMMANDS)
    refused(program.run("link", "-xy"), USAGE, "'-x' is no option", "'layershard-bench link --help'")


def test_closed_descriptors(program):
    takes_closed_descriptors(program, "--version")


@pytest.mark.parametrize("command", ["calls --max-ns 1e9 --json", "help", "help step", "--version"])
def test_output_that_cannot_be_written(program, command):
    tells_that_the_disk_is_full(program, *command.split())


@pytest.mark.parametrize(
    "command",
    [
        "link --max-bytes 64K --iters 1 --warmup 1",
        "link --max-bytes 64K --iters 1 --warmup 1 --ranks 3 --readers 2 --placement whole,striped",
        "read --bytes 2M",
        "step --layers 6 --compute-us 50 --passes 1 --margin 100 --slow-rank-percent 5",
    ],
    ids=lambda command: command.split()[0],
)
def test_output_fits_80_columns(program, command):
    done = program.run(*command.split(), env={"COLUMNS": "80"})
    assert done.returncode in (0, 3), done.stderr
    fits_80_columns(done)


def test_a_wide_table_is_cut_between_columns_and_loses_nothing(program):
    """Every part begins with the columns that tell its rows apart."""
    options = ["step", "--layers", 6, "--compute-us", 50, "--passes", 1, "--margin", 100]
    out = program.run(*options, "--prefetch", "0,1").stdout
    head = r"^ratio +k +resident"
    parts = [line for line in out.splitlines() if re.match(head, line)]
    assert len(parts) == 2
    names = " ".join(parts)
    for column in ("fetched", "windows", "least..most", "exposed", "stalled", "predicted", "hidden", "link busy"):
        assert names.count(column) == 1
    rows = re.findall(r"^ +(?:2\.6|1\.2|0\.6) +([01]) +0 ", out, re.MULTILINE)
    assert rows == ["0", "1"] * 3 * 2, out

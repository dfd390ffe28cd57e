# SPDX-License-Identifier: Apache-2.0
"""The commands of `layershard`, and those that it had: help, exit status, output that nobody gets."""

import re

import pytest
from programs import USAGE, fits_80_columns, refused, takes_closed_descriptors, tells_that_the_disk_is_full, too_wide

COMMANDS = ["info"]


def test_help_alone_lists_the_commands(program):
    done = program.run("help")
    assert done.returncode == 0 and done.stdout == program.run("--help").stdout
    for command in ("info", "help [COMMAND]", "Exit status"):
        assert command in done.stdout
    assert program.run("help", "help").stdout == done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(program, command):
    done = program.run("help", *command.split())
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == program.run(*command.split(), "--help").stdout
    assert done.stdout.startswith(f"Usage: layershard {command.split(' --')[0]}")
    assert not too_wide(done.stdout)
    for code in "012":
        assert re.search(f"^  {code}  ", done.stdout, re.MULTILINE), "every exit status is told"


def test_unknown_commands_are_told_the_known_ones(program):
    refused(program.run("serve"), USAGE, "'serve'", "info", "--help")
    refused(program.run(), USAGE, "info")
    done = program.run("help", "walk")
    assert done.returncode == 2 and "'walk'" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "words, new",
    [
        ("run", "'layershard-llama'"),
        ("run --ranks 4", "'layershard-llama'"),
        ("help run", "'layershard-llama'"),
        ("verify --model x", "'layershard-llama --verify'"),
        ("bench", "'layershard-bench'"),
        ("bench step --ratio 1.2", "'layershard-bench'"),
        ("help bench step", "'layershard-bench'"),
    ],
)
def test_commands_that_are_programs_now_name_them_in_one_line(program, words, new):
    done = program.run(*words.split())
    refused(done, USAGE, new)
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert "same options" not in done.stderr


def test_output_fits_80_columns(program):
    fits_80_columns(program.run("info", env={"COLUMNS": "80"}))


@pytest.mark.parametrize("command", ["info", "--version"])
def test_closed_descriptors(program, command):
    takes_closed_descriptors(program, command)


@pytest.mark.parametrize("command", ["info", "info --json", "help", "--version"])
def test_output_that_cannot_be_written(program, command):
    tells_that_the_disk_is_full(program, *command.split())

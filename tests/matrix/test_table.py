# SPDX-License-Identifier: Apache-2.0
"""test_table.py: the table of docs/reliability.md has a line for each phase and fault of the matrix, and a column for
each transport. FAULT_MATRIX is the program."""

import os
import pathlib
import re
import subprocess

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "reliability.md"


def listed():
    said = subprocess.run([os.environ["FAULT_MATRIX"], "--list"], check=True, capture_output=True, text=True).stdout
    cells = [
        re.fullmatch(r"\d+: (.+); (.+); rank \d: (.+)", line) for line in said.splitlines() if " - not " not in line
    ]
    return [cell.groups() for cell in cells]


def test_the_table_has_all_cells():
    rows = [
        line.strip("|").split("|") for line in PAGE.read_text().split("## The matrix")[1].splitlines() if "|" in line
    ]
    rows = [[cell.strip() for cell in row] for row in rows]
    head, body = rows[0], rows[2:]
    cells = listed()
    assert len(cells) > 400
    assert set(head[2:]) == {transport for transport, _, _ in cells}
    shown = {(head[2 + i], row[0], row[1]) for row in body for i, word in enumerate(row[2:]) if word != "-"}
    assert shown == set(cells)

# SPDX-License-Identifier: Apache-2.0
"""What benches print fits a terminal of 80 columns."""
import re

import pytest

from programs import fits_80_columns


@pytest.mark.parametrize(
    "command",
    [
        "bench link --max-bytes 64K --iters 1 --warmup 1",
        "bench link --max-bytes 64K --iters 1 --warmup 1 --ranks 3 --readers 2 --placement owner,striped",
        "bench step --layers 6 --compute-us 50 --passes 1 --margin 100 --slow-rank-percent 5",
    ],
    ids=lambda command: " ".join(command.split()[:2]),
)
def test_output_fits_80_columns(program, command):
    done = program.run(*command.split(), env={"COLUMNS": "80"})
    assert done.returncode in (0, 3), done.stderr
    fits_80_columns(done)


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

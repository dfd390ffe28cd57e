# SPDX-License-Identifier: Apache-2.0
"""`layershard-bench read`: options, the shape of the results, which pages are told, and that wrong bits never pass.

How long anything takes is not tested here. Whether large pages are to be had is the machine's: what is told of them
must then be so, and with none to be had nothing may pass for them.
"""

import ctypes
import json
import mmap
import re

import pytest
from programs import FAILED, fits_80_columns

SMALL = ["--bytes", "4M"]
BYTES = 4 << 20
LARGE_PAGE = 2 << 20
WORKS = [("sum", False), ("sum", True), ("product", False), ("product", True)]
INCONCLUSIVE = 3


def without_large_pages():
    """For the program to be: neither it nor the kernel on its behalf makes any."""
    pr_set_thp_disable = 41
    assert ctypes.CDLL(None).prctl(pr_set_thp_disable, 1, 0, 0, 0) == 0


def run_without_large_pages(program, *arguments):
    return program.finish(program.start("read", *SMALL, *arguments, preexec_fn=without_large_pages))


def memories(result):
    return {(each["memory"], each["page_bytes"]): each for each in result["memories"]}


def check_ratios(row, there):
    memory = (row["memory"], row["page_bytes"])
    base = ("private", row["page_bytes"])
    small = ("private", mmap.PAGESIZE)
    assert (row["to_private"] is None) == (memory == base or base not in there)
    assert (row["to_small"] is None) == (memory == small or small not in there)
    assert all(ratio is None or ratio > 0 for ratio in (row["to_private"], row["to_small"]))


def check_rows(result):
    """One for every work and every memory that was to be had."""
    there = [name for name, each in memories(result).items() if each["missing"] is None]
    rows = result["rows"]
    assert [(row["work"], row["memory"], row["page_bytes"]) for row in rows] == [
        (work, *name) for work, _ in WORKS for name in there
    ]
    for number, row in enumerate(rows):
        by_all = WORKS[number // len(there)][1]
        assert row["cores"] >= 1 and (by_all or row["cores"] == 1)
        assert 0 < row["ns"]["min"] <= row["ns"]["median"] <= row["ns"]["max"]
        assert row["gigabytes_per_s"] == pytest.approx(result["bytes"] / row["ns"]["median"])
        assert row["best_gigabytes_per_s"] == pytest.approx(result["bytes"] / row["ns"]["min"])
        check_ratios(row, there)


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--bytes", "0"], "--bytes"),
        (["--bytes", "3M"], "multiple of 2M"),
        (["--bytes", "18G"], "up to 16G"),
        (["--transport", "local"], "shm or shm:copy"),
        (["--transport", "pigeon"], "pigeon"),
        (["--rounds", "8"], "--rounds"),
        (["--min-to-large", "0"], "--min-to-large"),
        (["--min-to-small", "fast"], "--min-to-small"),
        (["--save", "/no/such/directory/x.json"], "/no/such/directory"),
        (["--no-such-option"], "--no-such-option"),
        (["more"], "more"),
    ],
)
def test_wrong_arguments_are_named(program, arguments, names):
    done = program.run("read", *arguments)
    assert done.returncode == 2
    assert names in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "options, memory",
    [(["--transport", "shm"], "shared"), (["--transport", "shm:copy"], "window"), (["--scatter"], "shared")],
    ids=["shm", "shm:copy", "scatter"],
)
def test_every_work_with_every_memory(program, tmp_path, options, memory):
    path = tmp_path / "saved.json"
    result = program.json("read", *SMALL, *options, "--save", path)
    assert result["scattered"] is ("--scatter" in options)
    assert json.loads(path.read_text())["result"] == result
    assert next(iter(result)) == "schema" and result["schema"] == "layershard-bench-read/1"
    assert (result["bench"], result["bytes"], result["bits_checked"]) == ("read", BYTES, True)
    assert result["in_place"] is (memory == "shared")
    assert set(result["settings"]) == {"enabled", "shmem_enabled", "nr_hugepages"}
    assert all(result[each]["least"] is result[each]["met"] is None for each in ("to_large", "to_small"))
    assert all(re.fullmatch(r"\w+|\?", each) for each in result["settings"].values())
    found = memories(result)
    assert list(found) == [(each, size) for each in ("private", memory) for size in (mmap.PAGESIZE, LARGE_PAGE)]
    for (_, size), each in found.items():
        if each["missing"] is None:
            assert each["large_bytes"] == 0 if size == mmap.PAGESIZE else each["large_bytes"] >= BYTES
        else:
            assert size == LARGE_PAGE and each["missing"]
    check_rows(result)


def test_small_pages_never_pass_for_large_ones(program):
    done = run_without_large_pages(program)
    assert done.returncode == 0, done.stderr
    assert "private, 2 MiB: not to be had: 0 of 4 MiB are in large pages" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith(("sum ", "product "))]
    assert {line.split()[2] for line in rows} == {"private", "shared"}
    assert not [line for line in rows if " private  2 MiB " in line]
    fits_80_columns(done)


def test_targets_of_large_pages_need_large_pages(program):
    done = run_without_large_pages(program, "--min-to-large", "0.001")
    assert done.returncode == INCONCLUSIVE
    assert "not measured" in done.stdout and "inconclusive" in done.stderr


def test_targets(program):
    """No memory is a billion times as fast as another, and none is slower than a millionth."""
    done = program.run("read", *SMALL, "--min-to-large", "1e-6", "--min-to-small", "1e9")
    assert done.returncode in (FAILED, INCONCLUSIVE)
    if done.returncode == FAILED:
        assert done.stdout.count("met") == 2 and "NOT met" in done.stdout and "at least 1e-06: met" in done.stdout
        assert "large pages of the series" in done.stderr


def test_a_flipped_bit(program):
    done = program.run("read", *SMALL, "--transport", "faults=r1.wait@*=flip,shm:copy")
    assert done.returncode == FAILED
    assert "wrong bits in window memory in small pages (its bytes)" in done.stderr
    assert done.stdout == ""

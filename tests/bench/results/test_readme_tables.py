# SPDX-License-Identifier: Apache-2.0
"""bench/results/readme_tables.py: tables come from saved results, and one that was edited by hand is found."""

import json
import subprocess
import sys

import pytest
from patience import LONG_S
from programs import TREE

SAVED = {
    "command": "layershard bench link --devices 0,1 --save bench/results/saved.json",
    "date": "2026-11-23T19:00:00Z",
    "version": "0.1.0",
    "machine": {"cpu": "Some CPU", "cores": 2},
    "gpus": [{"name": "Some GPU"}, {"name": "Some GPU"}],
    "result": {
        "rows": [
            {"bytes": 65536, "kind": "a", "last": True, "time": {"median": 12345.6}, "mhz": -1.0},
            {"bytes": 268435456, "kind": "b", "last": False, "time": {"median": 700000.0}, "mhz": 1755.0},
            {"bytes": 100, "kind": "a", "last": False, "mhz": 1700.0},
        ],
        "tables": [
            {"tokens": 512, "rows": [{"variant": "control", "ratio": 1.0}, {"variant": "overlapped", "ratio": 1.05}]},
            {"tokens": 16, "rows": [{"variant": "overlapped", "ratio": 2.5}]},
        ],
    },
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(SAVED))
    return path


def document(tmp_path, what, content="", end="<!-- end of table -->\n"):
    path = tmp_path / "page.md"
    path.write_text(f"before\n\n<!-- table {what}\n-->\n{content}{end}after\n")
    return path


def tables(*arguments):
    command = [sys.executable, str(TREE / "bench" / "results" / "readme_tables.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, check=False)


COLUMNS = "columns: size=bytes:bytes | us=time.median/1e3:.1f us\ncolumns: clock=mhz:.0f | last=last"


def test_a_table_is_made_and_then_left_alone(tmp_path, saved):
    page = document(tmp_path, f"{saved}\nrows: result.rows\n{COLUMNS}")
    assert tables("--check", page).returncode == 1
    assert tables(page).returncode == 0
    lines = page.read_text().splitlines()
    assert "`layershard-bench link --devices 0,1`, Some GPU, 2026-11-23, version 0.1.0:" in lines  # as it is called now
    at = lines.index("| size | us | clock | last |")
    assert lines[at + 1 : at + 5] == [
        "| --- | --- | --- | --- |",
        "| 64 KiB | 12.3 us | - | yes |",
        "| 256 MiB | 700.0 us | 1755 | no |",
        "| 100 | - | 1700 | no |",
    ]
    assert lines[0] == "before" and lines[-1] == "after"
    made = page.read_text()
    assert tables("--check", page).returncode == 0
    assert tables(page).returncode == 0
    assert page.read_text() == made


def test_a_figure_changed_by_hand_is_found(tmp_path, saved):
    page = document(tmp_path, f"{saved}\nrows: result.rows\n{COLUMNS}")
    tables(page)
    page.write_text(page.read_text().replace("12.3 us", "11.3 us"))
    changed = page.read_text()
    done = tables("--check", page)
    assert done.returncode == 1
    assert "11.3 us" in done.stderr and "12.3 us" in done.stderr
    assert page.read_text() == changed


@pytest.mark.parametrize(
    "where, sizes",
    [
        ("kind=a", ["64 KiB", "100"]),
        ("kind=a, last=false", ["100"]),
        ("kind=a\nwhere: last=false", ["100"]),
        ("kind!=a", ["256 MiB"]),
        ("kind=a|b, bytes=100|65536", ["64 KiB", "100"]),
        ("kind!=a|c", ["256 MiB"]),
        ("kind=[bc]", ["256 MiB"]),
    ],
)
def test_rows_are_chosen(tmp_path, saved, where, sizes):
    page = document(tmp_path, f"{saved}\nrows: result.rows\nwhere: {where}\ncolumns: size=bytes:bytes")
    assert tables(page).returncode == 0
    found = [line.strip("| ") for line in page.read_text().splitlines() if line.startswith("| ")]
    assert found == ["size", "---", *sizes]


@pytest.mark.parametrize(
    "key, name", [("variant", "variant"), ("arm", "variant"), ("arm", "arm")], ids=["new", "old file", "old caption"]
)
def test_rows_of_several_tables_become_one(tmp_path, saved, key, name):
    saved.write_text(saved.read_text().replace('"variant"', f'"{key}"'))
    what = f"{saved}\nrows: result.tables.rows\nwhere: {name}=overlapped\ncolumns: tokens=tokens | ratio=ratio:.2f x"
    page = document(tmp_path, what)
    assert tables(page).returncode == 0
    found = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert found == ["| tokens | ratio |", "| --- | --- |", "| 512 | 1.05 x |", "| 16 | 2.50 x |"]


@pytest.mark.parametrize("placements", ["owner,striped", "striped,owner", "whole,striped"])
def test_the_placement_of_older_files_has_todays_name(tmp_path, saved, placements):
    old = json.loads(saved.read_text())
    old["command"] = f"layershard-bench link --placement {placements} --rounds 9"
    for row, placement in zip(old["result"]["rows"], ["striped", "owner", "whole"], strict=True):
        row["placement"] = placement
    saved.write_text(json.dumps(old))
    what = f"{saved}\nrows: result.rows\nwhere: placement=whole\ncolumns: size=bytes:bytes | placement=placement"
    page = document(tmp_path, what)
    assert tables(page).returncode == 0
    text = page.read_text()
    assert f"--placement {placements.replace('owner', 'whole')} --rounds 9`" in text
    found = [line for line in text.splitlines() if line.startswith("| ")]
    assert found[2:] == ["| 256 MiB | whole |", "| 100 | whole |"]


@pytest.mark.parametrize(
    "what, names",
    [
        ("none.json\nrows: result.rows\ncolumns: a=b", "none.json"),
        ("SAVED\nrows: result.lines\ncolumns: a=b", "result.lines"),
        ("SAVED\nrows: result.rows\nwhere: kind=c\ncolumns: a=b", "kind=c"),
        ("SAVED\nrows: result.rows\nwhere: kind\ncolumns: a=b", "'kind'"),
        ("SAVED\nrows: result.rows\ncolumns: bytes", "'bytes'"),
        ("SAVED\nrows: result.rows", "columns"),
        ("SAVED\nlines: result.rows\ncolumns: a=b", "lines"),
    ],
)
def test_mistakes_are_named(tmp_path, saved, what, names):
    page = document(tmp_path, what.replace("SAVED", str(saved)))
    before = page.read_text()
    done = tables(page)
    assert done.returncode == 2
    assert names in done.stderr and str(page) in done.stderr
    assert page.read_text() == before


def test_results_before_and_after_schemas_are_read_and_others_refused(tmp_path, saved):
    page = document(tmp_path, f"{saved}\nrows: result.rows\n{COLUMNS}")
    tables(page)
    for schema in ("layershard-bench/1", "layershard-bench/2"):
        saved.write_text(json.dumps({"schema": schema} | SAVED))
        assert tables("--check", page).returncode == 0
    saved.write_text(json.dumps({"schema": "layershard-bench/3"} | SAVED))
    done = tables("--check", page)
    assert done.returncode == 2 and "'layershard-bench/3'" in done.stderr
    assert "layershard-bench/1 and layershard-bench/2" in done.stderr


def test_several_files_make_one_table(tmp_path, saved):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(SAVED | {"date": "2026-12-24T00:00:00Z"}))
    page = document(tmp_path, f"{saved} {other}\nrows: result.rows\nwhere: kind=a\n{COLUMNS}")
    assert tables(page).returncode == 0
    text = page.read_text()
    assert "2026-11-23, version 0.1.0; `layershard-bench" in text and "2026-12-24, version 0.1.0:" in text
    assert text.count("| 64 KiB |") == text.count("| 100 |") == 2 and "256 MiB" not in text


def test_a_table_without_an_end(tmp_path, saved):
    page = document(tmp_path, f"{saved}\nrows: result.rows\n{COLUMNS}", end="")
    done = tables(page)
    assert done.returncode == 2
    assert "end of table" in done.stderr


def test_a_new_table_for_a_saved_result_is_as_it_should_be(tmp_path):
    saved = TREE / "bench" / "results" / "2026-11-30-h200x2-e2e.json"
    page = tmp_path / "page.md"
    page.write_text(tables("--new", saved).stdout)
    assert "layershard k=1" in page.read_text()
    assert "`bench/torch/e2e.py --devices 0,1" in page.read_text()  # where it is, not where it was
    assert tables("--check", page).returncode == 0
    assert "bench/results" in tables("--new", saved).stdout.splitlines()[0]
    done = tables("--new", page)
    assert done.returncode == 2 and str(page) in done.stderr


def test_the_documents_of_this_tree_are_what_their_results_give():
    done = tables("--check")
    assert done.returncode == 0, done.stderr

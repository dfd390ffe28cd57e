#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the tables of README.md and docs/ from what `layershard-bench ... --save FILE` has saved.

    readme_tables.py [--check] [MARKDOWN FILE]...
    readme_tables.py --new SAVED FILE...      print a table for each, to be put into a document and trimmed there

A table stands between two comments; the first one says what it is made of:

    <!-- table bench/results/2026-11-23-h100-link.json
    rows: result.rows
    where: placement=whole, readers=false
    columns: size=bytes:bytes | to=first_to | us=fetch.ns.median/1e3:.1f | of bare=share*100:.1f %
    -->
    ...
    <!-- end of table -->

The file's path is from the top of the tree; several files, with a blank between, make one table. rows: where the list
is in the file; result.tables.rows are the rows of all tables, each with the plain values of its table. where
(optional): only the rows whose values are these (NAME=VALUE, or NAME=VALUE|VALUE), and NAME!=VALUE: are not these; *, ?
and [] in a value are a pattern's; columns: TITLE=PATH, then *NUMBER or /NUMBER, then :FORMAT and a unit behind it.
FORMAT is Python's, or "bytes" (64 KiB). A value that a row lacks, or that is below 0 for want of a meter, is "-".
"variant", "mode" and "fetch" are also read where an older file calls them "arm", "way" and "pull", and the placement
"whole" where it says "owner".

Without --check the files are rewritten; with it nothing is, and the status is 1 when a table differs from what its file
gives. 2: a comment or a file is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import pathlib
import re
import sys
from fnmatch import fnmatchcase
from typing import Any

TREE = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "docs/performance.md", "docs/python.md")
SCHEMAS = ("layershard-bench/1", "layershard-bench/2")  # files of before there was one are as the first
# What a key is called in documents and new files, and in files of the first schema.
RENAMED = {"variant": "arm", "mode": "way", "fetch": "pull"}
# The same of values: by their key, what older files say and what they are called now.
RENAMED_VALUES = {"placement": {"owner": "whole"}}

BEGIN = re.compile(r"<!-- table (?P<files>\S+(?: \S+)*)\n(?P<what>.*?)\n?-->\n", re.DOTALL)
END = "<!-- end of table -->"
COLUMN = re.compile(
    r"(?P<title>[^=|]+)=(?P<path>[\w.]+)(?:(?P<operator>[*/])(?P<number>[0-9.e]+))?(?::(?P<format>\S*)(?P<unit>.*))?"
)


class Mistake(Exception):
    """In a document or a saved result; the text is for its author."""


def value_at(value: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        name = name if name in value else RENAMED.get(name)
        if name not in value:
            return None
        value = value[name]
        if isinstance(value, str):
            value = RENAMED_VALUES.get(name, {}).get(value, value)
    return value


def rows_at(value: Any, names: list[str], above: dict) -> list[dict] | None:
    """The rows of a list, or of a list in each row of one: then they have the plain values of the row above too."""
    if isinstance(value, dict) and names:
        return rows_at(value.get(names[0]), names[1:], above)
    if not isinstance(value, list):
        return None
    found: list[dict] = []
    for row in value:
        plain = {name: part for name, part in row.items() if not isinstance(part, (dict, list))}
        inner = rows_at(row, names, {**above, **plain}) if names else [{**above, **row}]
        if inner is None:
            return None
        found += inner
    return found


def bytes_text(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size and count * 100 % size == 0:
            return f"{count / size:g} {unit}"
    return str(count)


@dataclasses.dataclass
class Column:
    title: str
    path: str
    factor: float
    format: str
    unit: str

    def text(self, row: dict) -> str:
        value = value_at(row, self.path)
        number = isinstance(value, (int, float))
        if isinstance(value, bool):
            return "yes" if value else "no"
        if value is None or (number and value < 0 and not self.format.startswith("+")):
            return "-"
        if self.format == "bytes":
            return bytes_text(value)
        if number and self.factor != 1:
            value = value * self.factor
        return format(value, self.format) + self.unit


def read_column(text: str) -> Column:
    found = COLUMN.fullmatch(text.strip())
    if not found:
        raise Mistake(f"'{text.strip()}' is no column: TITLE=PATH[*NUMBER][:FORMAT[ UNIT]] is needed")
    factor = float(found["number"] or 1)
    return Column(
        found["title"].strip(),
        found["path"],
        1 / factor if found["operator"] == "/" else factor,
        found["format"] or "",
        found["unit"] or "",
    )


def read_settings(text: str) -> dict[str, str]:
    settings: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if not colon or name.strip() not in ("rows", "where", "columns"):
            raise Mistake(f"'{line}' is none of rows:, where:, columns:")
        # A long list may go on in a second line of the same name.
        name, separator = name.strip(), " | " if name.strip() == "columns" else ", "
        settings[name] = f"{settings[name]}{separator}{value.strip()}" if name in settings else value.strip()
    for needed in ("rows", "columns"):
        if needed not in settings:
            raise Mistake(f"'{needed}:' is missing")
    return settings


def matches(row: dict, where: str) -> bool:
    for condition in filter(None, (part.strip() for part in where.split(","))):
        parts = re.fullmatch(r"([\w.]+)(!?)=(.*)", condition)
        if not parts:
            raise Mistake(f"'{condition}' is no condition: NAME=VALUE or NAME!=VALUE is needed")
        name, differs, value = parts.groups()
        found = value_at(row, name)
        text = json.dumps(found) if not isinstance(found, str) else found
        if any(fnmatchcase(text, each) for each in value.split("|")) == bool(differs):
            return False
    return True


def origin(saved: dict) -> str:
    """Where the figures come from, in a line."""
    gpus = sorted({gpu.get("name", "?") for gpu in saved.get("gpus", [])})
    machine = saved.get("machine", {})
    where = ", ".join(gpus) if gpus else f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores"
    command = re.sub(r" --save ('[^']*'|\S)+", "", saved["command"])
    command = re.sub(r"^bench/(\w+\.py)", r"bench/torch/\1", command)  # where they were when some were saved
    command = re.sub(r"^layershard bench (?!step --devices)", "layershard-bench ", command)  # what it was called then
    command = command.replace(" --arms ", " --variants ")  # of e2e.py
    command = re.sub(r"( --placement[ =](?:\w+,)*)owner\b", r"\1whole", command)
    return f"`{command}`, {where}, {saved['date'][:10]}, version {saved['version']}:"


def read_rows(file: str, settings: dict[str, str]) -> tuple[str, list[dict]]:
    """Where the file's figures come from, and the rows that are chosen."""
    try:
        saved = json.loads((TREE / file).read_text())
    except (OSError, ValueError) as error:
        raise Mistake(f"{file} cannot be read: {error}") from error
    if saved.get("schema", SCHEMAS[0]) not in SCHEMAS:
        known = " and ".join(SCHEMAS)
        raise Mistake(f"{file} is of schema '{saved['schema']}', and this script reads {known}")
    for needed in ("command", "date", "version"):
        if needed not in saved:
            raise Mistake(f"{file} has no '{needed}': was it made by --save?")
    rows = rows_at(saved, settings["rows"].split("."), {})
    if rows is None:
        raise Mistake(f"{file} has no list '{settings['rows']}'")
    chosen = [row for row in rows if matches(row, settings.get("where", ""))]
    if not chosen:
        raise Mistake(f"no row of {file} is as 'where: {settings.get('where', '')}' says")
    return origin(saved), chosen


def make_table(files: str, what: str) -> list[str]:
    settings = read_settings(what)
    found = [read_rows(file, settings) for file in files.split()]
    columns = [read_column(text) for text in settings["columns"].split("|")]
    lines = [" ".join(said.removesuffix(":") + ";" for said, _ in found).removesuffix(";") + ":", ""]
    lines.append("| " + " | ".join(column.title for column in columns) + " |")
    lines.append("|" + " --- |" * len(columns))
    rows = [row for _, chosen in found for row in chosen]
    lines += ["| " + " | ".join(column.text(row) for column in columns) + " |" for row in rows]
    return lines


E2E_COLUMNS = """\
columns: tokens=tokens | variant=variant | ms per pass=pass_ns.median/1e6:.3f | to replicated=ratio.median:.3f
columns: from=ratio.low:.3f | to=ratio.high:.3f | host us=host_ns/1e3:.0f | SM MHz=sm_mhz:.0f | watts=watts:.0f"""
LINK_COLUMNS = """\
columns: size=bytes:bytes | placement=placement | readers=to_count | us=fetch.ns.median/1e3:.1f
columns: GB/s=fetch.gigabytes_per_s:.1f | bare us=bare.ns.median/1e3:.1f | bare GB/s=bare.gigabytes_per_s:.1f
columns: of bare=share*100:.1f %"""
READ_COLUMNS = """\
columns: work=work | cores=cores | memory=memory | pages=page_bytes:bytes | GB/s=gigabytes_per_s:.1f
columns: best=best_gigabytes_per_s:.1f | to private=to_private:.2f x | to small=to_small:.2f x"""
PROMPT_COLUMNS = """\
columns: tokens=tokens | variant=variant | first token ms=pass_ns.median/1e6:.1f
columns: to replicated weights=ratio.median:.3f | from=ratio.low:.3f | to=ratio.high:.3f
columns: weights GB=weight_bytes/1e9:.1f | peak GB=peak_bytes/1e9:.1f | bits equal=bits_equal | distance=distance:.2g
columns: SM MHz=sm_mhz:.0f | watts=watts:.0f"""
REQUEST_COLUMNS = """\
columns: load=load | variant=variant | tokens/s=tokens_per_second:.0f | steady=steady_tokens_per_second:.0f
columns: time to replicated=ratio.median:.3f | first token ms=first_token_ms.median:.1f | p90=first_token_ms.p90:.1f
columns: most=first_token_ms.most:.1f | weights GB=weight_bytes/1e9:.1f | bits equal=bits_equal"""
ROUNDING_COLUMNS = """\
columns: layer=layer | not compiled=eager:.5f | replicated=replicated:.5f | sharded=sharded:.5f
columns: sharded to replicated=ratio:.3f | least=least:.3f | most=most:.3f"""
COMPILED_COLUMNS = """\
columns: model=model | variant=variant | ms per pass=pass_ns.median/1e6:.3f | to replicated, compiled=ratio.median:.3f
columns: from=ratio.low:.3f | to=ratio.high:.3f | kernels for attention=attention"""
NEW = {
    "e2e": f"rows: result.tables.rows\nwhere: again=false\n{E2E_COLUMNS}",
    "link": f"rows: result.rows\nwhere: placement!=inside\n{LINK_COLUMNS}",
    "read": f"rows: result.rows\n{READ_COLUMNS}",
    "long_prompt": f"rows: result.tables.rows\nwhere: again=false\n{PROMPT_COLUMNS}",
    "pipeline": f"rows: result.tables.rows\nwhere: again=false\n{REQUEST_COLUMNS}",
    "rounding": f"rows: result.rows\n{ROUNDING_COLUMNS}",
    "compiled_speed": f"rows: result.tables.rows\nwhere: again=false\n{COMPILED_COLUMNS}",
}


def new_table(path: pathlib.Path) -> str:
    """What a document holds for the result of e2e.py, `layershard-bench link` or `read`."""
    try:
        bench = json.loads(path.read_text())["result"]["bench"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Mistake(f"{path} cannot be read as a saved result: {error}") from error
    if bench not in NEW:
        raise Mistake(f"{path} is of 'bench {bench}'; there are columns for {', '.join(NEW)} alone")
    file = path.resolve()
    name = file.relative_to(TREE) if TREE in file.parents else file
    return "\n".join([f"<!-- table {name}", NEW[bench], "-->", *make_table(str(name), NEW[bench]), END])


def renewed(text: str) -> tuple[str, int]:
    """The document with all its tables made anew, and how many there are."""
    done, at, count = "", 0, 0
    while True:
        begin = BEGIN.search(text, at)
        if not begin:
            return done + text[at:], count
        end = text.find(END, begin.end())
        if end < 0:
            raise Mistake(f"the table of {begin['files']} has no '{END}'")
        done += text[at : begin.end()] + "\n".join(make_table(begin["files"], begin["what"])) + "\n"
        at, count = end, count + 1


def work_on(path: pathlib.Path, check: bool) -> bool:
    """True when the document is as it should be now."""
    before = path.read_text()
    try:
        after, count = renewed(before)
    except Mistake as mistake:
        raise Mistake(f"{path}: {mistake}") from mistake
    if before != after and check:
        sys.stderr.writelines(
            difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(path), "its saved results", n=1)
        )
        print(
            f"readme_tables.py: {path} is not what its saved results give: run bench/results/readme_tables.py",
            file=sys.stderr,
        )
        return False
    if before != after:
        path.write_text(after)
    print(f"{path}: {count} tables, {'renewed' if before != after else 'as they should be'}")
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 when a table would change")
    parser.add_argument("--new", action="store_true", help="the files are saved results: print tables for them")
    parser.add_argument("documents", nargs="*", metavar="FILE", help=f"default: {' '.join(DOCUMENTS)}")
    options = parser.parse_args(arguments)
    paths = [pathlib.Path(name) for name in options.documents] or [TREE / name for name in DOCUMENTS]
    try:
        if options.new:
            print("\n\n".join(new_table(path) for path in paths))
            return 0
        good = [work_on(path, options.check) for path in paths]
    except (Mistake, OSError) as mistake:
        print(f"readme_tables.py: {mistake}", file=sys.stderr)
        return 2
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare what was measured on GPUs with its targets.

    targets.py [--markdown] [FILE OR DIRECTORY]...      (default: bench/results)

One line for every target and place it was measured in: the figure, its limit, "met" or "missed", and the file. Of
`layershard-bench link --save` the fetches are evaluated here; the benches in PyTorch have evaluated their tables
themselves, also that one is "inconclusive" or "not evaluated"; of the log of a check on GPUs it is counted which ranks
went on when another was killed. "not measured": no file has it, and "where" names the command that measures it.
Processes that share one GPU say nothing of targets about a link between GPUs.

Status 0: no target that was measured is missed; 1: one is; 2: a file cannot be used.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

TREE = pathlib.Path(__file__).resolve().parents[2]
MIB = 2**20
SCHEMAS = ("layershard-bench/1", "layershard-bench/2")  # files of before there was one are as the first
FETCH_BYTES, FETCH_PERCENT = 256 * MIB, 97  # a layer that large is fetched at so many per cent of a bare copy's speed
FETCHES, READERS = "one fetch, to a bare copy's speed", "two readers of one source, four ranks"
MODELS, KILLED = "whole models by PyTorch", "a rank is killed"
PROMPTS, REQUESTS, ROUNDING = "one long prompt", "requests, beside pipeline parallel", "a compiled model's rounding"
PARTS = {FETCHES: "bench/gpu.sh link", READERS: "bench/gpu.sh readers", ROUNDING: "bench/gpu.sh rounding",
         MODELS: "bench/gpu.sh e2e-1024 e2e-4096 whole wan", PROMPTS: "bench/gpu.sh prompt-65536",
         REQUESTS: "bench/gpu.sh pipeline", KILLED: "make check-gpu"}  # fmt: skip

Row = tuple[str, ...]
Saved = dict[str, Any]


class Mistake(Exception):
    """In a saved result; the text is for its owner."""


# ---- What one saved result says ----

RENAMED = {"fetch": "pull", "variant": "arm", "result": "verdict"}  # what files of the first schema call a key
SAID_BEFORE = {"void": "inconclusive", "not judged": "not evaluated"}


def said(row: Saved, key: str) -> Any:
    return row[key] if key in row else row[RENAMED[key]]


def link_rows(result: Saved, readers: bool) -> Iterator[dict]:
    """Of fetches that move something between GPUs."""
    if result.get("bench") != "link" or len({gpu.get("bus", "?") for gpu in result["gpus"]}) < 2:
        return
    if not result["bits_checked"]:
        raise Mistake("the bits were not checked")
    for row in result["rows"]:
        if row.keys() & {"fetch", "pull"} and not row["in_place"] and row["readers"] == readers:
            yield row


def fetches(result: Saved) -> Iterator[Row]:
    for row in link_rows(result, readers=False):
        if row["placement"] in ("whole", "owner") and row["bytes"] >= FETCH_BYTES:
            percent = row["share"] * 100
            where = f"{row['bytes'] // MIB} MiB, from {row['from']} to {row['first_to']}"
            found = "met" if percent >= FETCH_PERCENT else "missed"
            yield (FETCHES, where, f"{percent:.4g} %", f"at least {FETCH_PERCENT} %", found)


def readers(result: Saved) -> Iterator[Row]:
    for row in link_rows(result, readers=True):
        where = f"{row['bytes'] / MIB:g} MiB, {row['placement']}, {row['to_count']} readers"
        yield (READERS, where, f"{said(row, 'fetch')['gigabytes_per_s']:.4g} GB/s", "-", "shown")


def models(result: Saved) -> Iterator[Row]:
    """What e2e.py, wan.py, long_prompt.py and rounding.py have said."""
    told = result.get("targets", [])
    about = {"long_prompt": PROMPTS, "rounding": ROUNDING}.get(result.get("bench", ""), MODELS)
    for row in told["rows"] if isinstance(told, dict) else told:
        text = (said(row, "result") or "not evaluated").partition(":")[0].lower()
        found = SAID_BEFORE.get(text, text)
        if "limit" in row:
            yield (about, row["what"], row["found"], row["limit"], found)
        else:
            where = f"{said(row, 'variant')}: {row['what']}"
            yield (MODELS, where, f"{row['value']:.4g}", f"at most {row['target']}", found)


def requests(result: Saved) -> Iterator[Row]:
    """Of pipeline.py, which has no targets: by how much a variant's tokens a second are more than replicas', and when
    requests have their first tokens."""
    if result.get("bench") != "pipeline" or len(set(result["config"]["devices"])) < len(result["config"]["devices"]):
        return
    for table in result["tables"]:
        for row in table["rows"]:
            if not row["again"]:
                first = row["first_token_ms"]["median"]
                text = f"{1 / row['ratio']['median']:.3f} of replicas' tokens/s, first token {first:.4g} ms"
                yield (REQUESTS, f"{table['load']}: {row['variant']}", text, "-", "shown")


def kills(log: str) -> Iterator[Row]:
    """Every plan of the log that kills a rank must have passed, with a line from each rank that was not killed."""
    log = re.sub(r"^\d+: ", "", log, flags=re.MULTILINE)  # ctest's number of the test
    plans = re.findall(r"^(.*, (\d+) ranks, .*, rank 1 is killed)\n((?:  .*\n)*)(.*)", log, re.MULTILINE)
    if not plans:
        return
    most = sum(int(ranks) - 1 for _, ranks, _, _ in plans)
    good = sum(
        len(set(re.findall(r"^  (rank \d+): 100 passes .* after rank 1 was killed: bit-exact$", said, re.MULTILINE)))
        for _, _, said, end in plans
        if end == "passed"
    )
    found = "met" if good >= most else "missed"
    yield (KILLED, "survivors whose passes are bit-exact", str(good), f"at least {most}", found)


# ---- Reading and printing ----


def files_of(names: list[str]) -> Iterator[pathlib.Path]:
    for path in map(pathlib.Path, names):
        if path.is_dir():
            yield from sorted(file for file in path.iterdir() if file.suffix in (".json", ".log"))
        else:
            yield path


def read(path: pathlib.Path) -> Saved:
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Mistake(f"it cannot be read: {error}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("result"), dict):
        raise Mistake("it has no 'result': was it made by --save?")
    if saved.get("schema", SCHEMAS[0]) not in SCHEMAS:
        known = " and ".join(SCHEMAS)
        raise Mistake(f"it is of schema '{saved['schema']}', and this script reads {known}")
    return saved["result"]


def rows_of(path: pathlib.Path) -> Iterator[Row]:
    """Without the file's name."""
    if path.suffix == ".log":
        yield from kills(path.read_text())
        return
    result = read(path)
    try:
        for find in (fetches, readers, models, requests):
            yield from find(result)
    except (KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"it lacks what a result of this version has: {error}") from error


def all_rows(paths: list[pathlib.Path]) -> list[Row]:
    rows: list[Row] = []
    for path in paths:
        try:
            rows += [(*row, path.name) for row in rows_of(path)]
        except Mistake as mistake:
            raise Mistake(f"{path}: {mistake}") from mistake
    for target, part in PARTS.items():
        if not any(row[0] == target for row in rows):
            rows.append((target, part, "-", "-", "not measured", "-"))
    return sorted(rows, key=lambda row: list(PARTS).index(row[0]))


RESULTS = ("met", "missed", "inconclusive", "shown", "not evaluated", "not run", "not measured")
HEADINGS = ("target", "where", "measured", "limit", "result", "file")


def show(rows: list[Row], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    else:
        widths = [max(len(row[i]) for row in [HEADINGS, *rows]) for i in range(len(HEADINGS))]
        for row in [HEADINGS, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    found = [row[4] for row in rows]
    counts = ", ".join(f"{found.count(kind)} {kind}" for kind in RESULTS)
    print(f"\n{counts}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    parser.add_argument("results", nargs="*", metavar="FILE OR DIRECTORY")
    options = parser.parse_args(arguments)
    try:
        rows = all_rows(list(files_of(options.results or [str(TREE / "bench" / "results")])))
    except (Mistake, OSError) as mistake:
        print(f"targets.py: {mistake}", file=sys.stderr)
        return 2
    show(rows, options.markdown)
    return 1 if any(row[4] == "missed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare what `layershard bench ... --save FILE` has saved with the targets for GPUs.

    targets.py [--markdown] [FILE OR DIRECTORY]...      (default: bench/results)

One line for every target and place it was measured in: the figure, its limit, "met" or "missed", and the file; "void"
where everything resident was not as fast again at the end, or where the driver reports less memory than is in use;
"other setting" where the stack, the rounds, the margin or the delay are not those that the target is about; "not
measured" with what no file has and the part of bench/gpu.sh that measures it. Targets about a link between GPUs are not
judged by processes that share one GPU.

Status 0: no target that was measured is missed; 1: one is; 2: a file is wrong.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import sys
from typing import Any, Callable, Iterable, Iterator, Optional

TREE = pathlib.Path(__file__).resolve().parents[2]
MIB = 2**20
RIVALS = ("allgather", "allgather-ce", "peer-copy")
BROADCAST_LEAST = {8192: 1.03, 1024: 1.4, 512: 2.0, 16: 2.0}
SIZES = (8192, 4096, 2048, 1024, 512, 16)
STACK = {"layers": 16, "hidden": 7168, "inner": 16384}
LEAST_ROUNDS, MOST_MARGIN, DELAY = 31, 0.5, 50


@dataclasses.dataclass
class Finding:
    """One figure beside its limit; without a limit it is only shown."""

    where: str
    value: float
    limit: Optional[float] = None
    at_most: bool = True
    unit: str = ""
    void: bool = False
    setting: bool = True  # is the target's

    def verdict(self) -> str:
        if self.void:
            return "void"
        if self.limit is None:
            return "shown"
        if not self.setting:
            return "other setting"
        return "met" if (self.value <= self.limit if self.at_most else self.value >= self.limit) else "missed"

    def cells(self) -> tuple[str, str]:
        side = "at most" if self.at_most else "at least"
        limit = "-" if self.limit is None else f"{side} {self.limit:.4g}{self.unit}"
        return f"{self.value:.4g}{self.unit}", limit


Saved = dict[str, Any]


def buses(saved: Saved) -> set[str]:
    return {gpu.get("bus", "?") for gpu in saved["result"].get("gpus", [])}


def tables(saved: Saved, tokens: tuple[int, ...] = ()) -> Iterator[dict]:
    if saved["result"].get("bench") == "step":
        for table in saved["result"].get("tables", []):
            if not tokens or table["tokens"] in tokens:
                yield table


def chosen(table: dict, arm: str, **fields: Any) -> Iterator[dict]:
    """Rows of a way; with one window ahead and nothing delayed unless fields say otherwise."""
    wanted = {"last_rank_delayed": False, **({"prefetch": 1} if arm == "overlapped" else {}), **fields}
    for row in table["rows"]:
        if row["arm"] == arm and not row["again"] and all(row.get(name) == value for name, value in wanted.items()):
            yield row


def label(saved: Saved, table: dict, row: dict) -> str:
    placement = saved["result"]["config"]["placement"]
    return f"{table['tokens']} tokens, {placement}{', graph' if row['graph'] else ''}"


def ratio(row: dict, name: str) -> float:
    return row[name]["median"]


# ---- What to look for; each gives its findings in one saved result ----


def hidden(saved: Saved) -> Iterator[Finding]:
    for table in tables(saved, (8192, 4096, 2048)):
        for row in chosen(table, "overlapped", resident="0"):
            yield Finding(label(saved, table, row), ratio(row, "ratio"), 1.03, void=not table["conclusive"])


def bound(saved: Saved) -> Iterator[Finding]:
    for table in tables(saved, (512, 16)):
        for row in chosen(table, "overlapped", resident="0"):
            if row["ratio_to_bound"]:  # copies alone were run beside it
                value = ratio(row, "ratio_to_bound")
                yield Finding(label(saved, table, row), value, 1.06, void=not table["conclusive"])


def residents(saved: Saved) -> Iterator[Finding]:
    """Half of the layers that come, and half of what is saved when their windows are subtracted."""
    for table in tables(saved, (512,)):
        for amount in ("37.5%", "50%"):
            for row in chosen(table, "overlapped", resident=amount):
                where = f"{label(saved, table, row)}, {amount} of the others' layers"
                yield Finding(where, ratio(row, "ratio"), 1.05, void=not table["conclusive"])


def graphs(saved: Saved) -> Iterator[Finding]:
    for table in tables(saved):
        for row in chosen(table, "overlapped", graph=True):
            where = f"{label(saved, table, row)}, residents {row['resident']}"
            yield Finding(where, ratio(row, "ratio_to_eager"), 1.02, void=not table["conclusive"])


def beside(saved: Saved, rival: str, least: Callable[[dict], Optional[float]]) -> Iterator[Finding]:
    """How many times as long as ours a rival takes, by the ratios of the rounds; ours is the first overlapped way."""
    for table in tables(saved):
        ours = next((row for row in table["rows"] if row["arm"] == "overlapped"), None)
        if ours is None or (ours["prefetch"], ours["resident"]) != (1, "0"):
            continue
        for row in chosen(table, rival):
            where = f"{rival}, {label(saved, table, ours)}"
            value, void = ratio(row, "ratio_to_overlapped"), not table["conclusive"]
            yield Finding(where, value, least(table), at_most=False, unit="x", void=void)


def broadcast(saved: Saved) -> Iterator[Finding]:
    yield from beside(saved, "broadcast", lambda table: BROADCAST_LEAST.get(table["tokens"]))


def others(saved: Saved) -> Iterator[Finding]:
    for rival in RIVALS:
        yield from beside(saved, rival, lambda table: 1 - table["drift_percent"] / 100)


def link_rows(saved: Saved, **fields: Any) -> Iterator[dict]:
    if saved["result"].get("bench") == "link":
        for row in saved["result"]["rows"]:
            if "pull" in row and not row["in_place"] and all(row[name] == value for name, value in fields.items()):
                yield row


def pulls(saved: Saved) -> Iterator[Finding]:
    for row in link_rows(saved, readers=False, placement="owner"):
        if row["bytes"] >= 256 * MIB:
            where = f"{row['bytes'] // MIB} MiB, from {row['from']} to {row['first_to']}"
            yield Finding(where, row["share"] * 100, 97, at_most=False, unit=" %")


def readers(saved: Saved) -> Iterator[Finding]:
    for row in link_rows(saved, readers=True):
        where = f"{row['bytes'] / MIB:g} MiB, {row['placement']}, {row['to_count']} readers"
        yield Finding(where, row["pull"]["gigabytes_per_s"], unit=" GB/s")


def calls(saved: Saved) -> Iterator[Finding]:
    for series in saved["result"].get("series", []) if saved["result"].get("bench") == "step" else []:
        if series["prefetch"] and series["call_with_transfer_ns"] is not None:
            placement = saved["result"]["config"]["placement"]
            where = f"{placement}, k = {series['prefetch']}, residents {series['resident']}"
            yield Finding(where, series["call_with_transfer_ns"] / 1e3, 8, unit=" us")


def delayed(saved: Saved) -> Iterator[Finding]:
    for table in tables(saved):
        is_half = saved["result"]["config"]["slow_rank_percent"] == DELAY
        allowed = 1 + saved["result"]["config"]["margin_percent"] / 100
        for arm, limit in (("overlapped", allowed), ("broadcast", None)):
            for row in chosen(table, arm, last_rank_delayed=True):
                where, void = f"{arm}, {table['tokens']} tokens", not table["conclusive"]
                yield Finding(where, ratio(row, "ratio"), limit, void=void, setting=is_half)


def is_together(saved: Saved) -> bool:
    config = saved["result"].get("config", {})
    return len(config.get("devices", [])) >= 4 and len(set(config["devices"])) == 1


def together(saved: Saved) -> Iterator[Finding]:
    for table in tables(saved) if is_together(saved) else ():
        for row in chosen(table, "overlapped", resident="0"):
            where = f"{label(saved, table, row)}, speed"
            yield Finding(where, 1 / ratio(row, "ratio"), 0.99, at_most=False, unit="x", void=not table["conclusive"])


def once(saved: Saved) -> Iterator[Finding]:
    """Layers of one GPU in its memory, as often; beyond them a granule for each."""
    for series in saved["result"].get("series", []) if is_together(saved) else ():
        config = saved["result"]["config"]
        where = f"{config['placement']}, k = {series['prefetch']}, residents {series['resident']}: the layers"
        value = series["driver_bytes_on_device"] / (config["layers"] * config["layer_bytes"])
        yield Finding(where, value, 1 + 2 * MIB / config["layer_bytes"], unit="x", void=value < 1)


def shares_on_first(config: dict) -> int:
    """Layers, or stripes of layers, that the ranks of the first device store there."""
    here = [rank for rank, device in enumerate(config["devices"]) if device == config["devices"][0]]
    if config["placement"] == "striped":
        return len(here) * config["layers"]
    return sum(layer % len(config["devices"]) in here for layer in range(config["layers"]))


def memory(saved: Saved) -> Iterator[Finding]:
    if saved["result"].get("bench") != "step":
        return
    config = saved["result"]["config"]
    ranks = config["devices"].count(config["devices"][0])
    for series in saved["result"]["series"]:
        # A granule for each share and for each window; the driver's figure is of the whole device.
        parts = shares_on_first(config) + ranks * series["windows"]
        spare = (series["driver_bytes_on_device"] - series["counted_bytes_on_device"]) / MIB
        where = f"{ranks} ranks, {config['placement']}, k = {series['prefetch']}, residents {series['resident']}"
        yield Finding(f"{where}: beyond shares and windows", spare, 2 * parts, unit=" MiB", void=spare < 0)


@dataclasses.dataclass
class Target:
    title: str
    part: str  # of bench/gpu.sh
    between_gpus: bool
    find: Callable[[Saved], Iterator[Finding]]
    timed: bool = True
    needs: tuple[str, ...] = ()  # how the places that must all be measured begin


def each_size(sizes: Iterable[int], before: str = "") -> tuple[str, ...]:
    return tuple(f"{before}{tokens} tokens" for tokens in sizes)


NEEDED_RIVALS = tuple(where for rival in RIVALS for where in each_size(SIZES, f"{rival}, "))

TARGETS = (
    Target("8192 to 2048 tokens, k = 1: to resident", "hidden middle", True, hidden,
           needs=each_size((8192, 4096, 2048))),
    Target("512 and 16 tokens: to the longer of resident and copies alone", "copies", True, bound,
           needs=each_size((512, 16))),
    Target("512 tokens, residents at half of what sharding saved: to resident", "residents", True, residents),
    Target("a graph to the same way eager", "copies hidden middle", True, graphs, needs=each_size(SIZES)),
    Target("NCCL broadcast beside ours", "copies hidden middle", True, broadcast,
           needs=each_size(BROADCAST_LEAST, "broadcast, ")),
    Target("NCCL all-gather and peer copies beside ours", "copies hidden middle", True, others, needs=NEEDED_RIVALS),
    Target("one pull: share of a bare copy's speed", "link", True, pulls, timed=False),
    Target("host time of reach and wait with a transfer", "copies", False, calls, timed=False),
    Target("the last rank delayed: rank 0's step to undelayed", "copies hidden middle", True, delayed,
           needs=each_size(SIZES, "overlapped, ")),
    Target("two readers of one source, four ranks", "readers", True, readers, timed=False),
    Target("four ranks on one GPU: speed of replicated", "together", False, together, needs=each_size((16, 1))),
    Target("four ranks on one GPU: the layers in memory once", "together", False, once, timed=False),
    Target("device memory by the driver", "copies", False, memory, timed=False),
)


# ---- A killed rank is judged by the program that kills it ----


def kills(log: str) -> Optional[Finding]:
    """Every plan of the log that kills a rank must have passed, with a line from each rank that was not killed."""
    log = re.sub(r"^\d+: ", "", log, flags=re.MULTILINE)  # ctest's number of the test
    plans = re.findall(r"^(.*, (\d+) ranks, .*, rank 1 is killed)\n((?:  .*\n)*)(.*)", log, re.MULTILINE)
    if not plans:
        return None
    most = sum(int(ranks) - 1 for _, ranks, _, _ in plans)
    good = sum(
        len(set(re.findall(r"^  (rank \d+): 100 passes .* after rank 1 was killed: bit-exact$", said, re.MULTILINE)))
        for _, _, said, end in plans
        if end == "passed"
    )
    return Finding("survivors whose passes are bit-exact", good, most, at_most=False)


def faster(found: list[Finding]) -> Optional[Finding]:
    """Of all rivals and sizes: more than half."""
    valid = [one for one in found if one.verdict() in ("met", "missed")]
    if not valid:
        return None
    where = f"of {len(valid)} rivals and sizes those where ours is faster"
    return Finding(where, sum(one.value > 1 for one in valid), len(valid) // 2 + 1, at_most=False)


# ---- Reading and printing ----


class Mistake(Exception):
    """In a saved result; the text is for its owner."""


def files_of(names: list[str]) -> Iterator[pathlib.Path]:
    for path in map(pathlib.Path, names):
        if path.is_dir():
            yield from sorted(file for file in path.iterdir() if file.suffix in (".json", ".log"))
        else:
            yield path


def read(path: pathlib.Path) -> Optional[Saved]:
    """None: a result of something else."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Mistake(f"{path} cannot be read: {error}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("result"), dict):
        raise Mistake(f"{path} has no 'result': was it made by --save?")
    return saved if saved["result"].get("bench") in ("step", "link") and saved["result"].get("gpus") else None


def is_setting(saved: Saved) -> bool:
    config = saved["result"]["config"]
    stack = all(config[name] == value for name, value in STACK.items())
    return stack and config["rounds"] >= LEAST_ROUNDS and config["margin_percent"] <= MOST_MARGIN


def findings(target: Target, path: pathlib.Path, saved: Saved) -> list[Finding]:
    try:
        if not saved["result"]["bits_checked"]:
            raise Mistake(f"{path}: the bits were not checked")
        found = list(target.find(saved))
        if target.timed and found and not is_setting(saved):
            found = [dataclasses.replace(one, setting=False) for one in found]
    except (KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"{path} lacks what a result of this version has: {error}") from error
    return found


def not_measured(target: Target, found: list[Finding]) -> Iterator[tuple[str, ...]]:
    """One row, with every place that no result of the target's setting has."""
    valid = [one.where for one in found if one.verdict() != "other setting"]
    missing = [need for need in target.needs if not any(where.startswith(need) for where in valid)]
    if missing or not valid:
        where = f"bench/gpu.sh {target.part}"
        where += f": {'; '.join(missing)}" if valid else ""
        yield (target.title, where, "-", "-", "not measured", "-")


def all_rows(paths: list[pathlib.Path]) -> list[tuple[str, ...]]:
    results = {path: read(path) for path in paths if path.suffix != ".log"}
    rows: list[tuple[str, ...]] = []
    for target in TARGETS:
        everywhere: list[Finding] = []
        for path, saved in results.items():
            if saved is None or (target.between_gpus and len(buses(saved)) < 2):
                continue
            found = findings(target, path, saved)
            everywhere += found
            rows += [(target.title, one.where, *one.cells(), one.verdict(), path.name) for one in found]
        most = faster(everywhere) if target.find is others else None
        if most:
            rows.append((target.title, most.where, *most.cells(), most.verdict(), "-"))
        rows += not_measured(target, everywhere)
    deaths = [(path, kills(path.read_text())) for path in paths if path.suffix == ".log"]
    for path, one in deaths:
        if one:
            rows.append(("a rank is killed", one.where, *one.cells(), one.verdict(), path.name))
    if not any(one for _, one in deaths):
        rows.append(("a rank is killed", "make check-gpu", "-", "-", "not measured", "-"))
    return rows


VERDICTS = ("met", "missed", "void", "other setting", "shown", "not measured")
HEADINGS = ("target", "where", "measured", "limit", "verdict", "file")


def show(rows: list[tuple[str, ...]], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    else:
        widths = [max(len(row[i]) for row in [HEADINGS, *rows]) for i in range(len(HEADINGS))]
        for row in [HEADINGS, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    verdicts = [row[4] for row in rows]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in VERDICTS)
    print(f"\n{counts}")


def main(arguments: Optional[list[str]] = None) -> int:
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

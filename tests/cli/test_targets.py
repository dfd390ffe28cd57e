# SPDX-License-Identifier: Apache-2.0
"""bench/results/targets.py: what is met, missed, void, not measured, by made-up results and this tree's."""
import json
import subprocess
import sys

import pytest

from programs import TREE

RATIO = {"median": 1.02, "low": 1.01, "high": 1.03}
OURS = 100  # ms of the overlapped way that rivals are compared with


def row(arm, ms, **fields):
    """A row of `bench step --devices`; fields override."""
    plain = {
        "arm": arm, "again": False, "graph": False, "last_rank_delayed": False,
        "ratio": RATIO, "ratio_to_bound": None, "ratio_to_eager": None, "ratio_to_overlapped": {"median": ms / OURS},
    }  # fmt: skip
    if arm == "overlapped":
        plain |= {"prefetch": 1, "resident": "0", "windows": 2, "ratio_to_bound": RATIO}
    return {**plain, **fields}


def step(rows, tokens=8192, buses=("a", "b"), conclusive=True, placement="owner", **series):
    devices = [sorted(set(buses)).index(bus) for bus in buses]
    plain = {
        "prefetch": 1, "resident": "0", "windows": 2, "counted_bytes_on_device": 2**30,
        "driver_bytes_on_device": 2**30, "call_with_transfer_ns": 5000,
    }  # fmt: skip
    return {
        "bench": "step",
        "bits_checked": True,
        "gpus": [{"bus": bus} for bus in buses],
        "config": {
            "devices": devices, "layers": 16, "layer_bytes": 2**26, "placement": placement, "margin_percent": 0.5,
            "hidden": 7168, "inner": 16384, "rounds": 31, "slow_rank_percent": 50.0,
        },  # fmt: skip
        "tables": [{"tokens": tokens, "drift_percent": 0.3, "conclusive": conclusive, "rows": rows}],
        "series": [{**plain, **series}],
    }


@pytest.fixture
def judge(tmp_path):
    """Verdicts by target, and the exit status, of results given by name."""

    def run(show_parts=False, **results):
        for name, result in results.items():
            text = result if isinstance(result, str) else json.dumps({"result": result})
            (tmp_path / (f"{name}.log" if isinstance(result, str) else f"{name}.json")).write_text(text)
        done = targets("--markdown", tmp_path)
        assert done.stderr == ""
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
        verdicts = {}
        for cells in filter(lambda cells: len(cells) == 6, rows):
            verdicts.setdefault(cells[0], []).append(cells[4])
        for found in verdicts.values():  # one file seldom has all places of a target
            if len(found) > 1 and "not measured" in found:
                found.remove("not measured")
                found += ["in part"] if show_parts else []
        return verdicts, done.returncode

    return run


def targets(*arguments):
    command = [sys.executable, str(TREE / "bench" / "results" / "targets.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


HIDDEN = "8192 to 2048 tokens, k = 1: to resident"
BROADCAST = "NCCL broadcast beside ours"
OTHERS = "NCCL all-gather and peer copies beside ours"
DELAYED = "the last rank delayed: rank 0's step to undelayed"
MEMORY = "device memory by the driver"
CALLS = "host time of reach and wait with a transfer"
KILLED = """cuda:copy, OWNER, 3 ranks, k = 1, 1 replays, rank 1 is killed
  rank 0: 100 passes and 100 replays after rank 1 was killed: bit-exact
  rank 2: 100 passes and 100 replays after rank 1 was killed: bit-exact
"""
TOGETHER = "four ranks on one GPU: speed of replicated"
ONCE = "four ranks on one GPU: the layers in memory once"


def test_what_is_met(judge):
    rivals = [row("broadcast", 104), row("peer-copy", 101)]
    delayed = row("overlapped", 100, last_rank_delayed=True, ratio={"median": 1.004, "low": 1, "high": 1.01})
    verdicts, status = judge(step=step([row("overlapped", 100), *rivals, delayed]))
    assert verdicts[OTHERS] == ["met", "met"]  # each, and most
    for target in (HIDDEN, BROADCAST, DELAYED, MEMORY, CALLS):
        assert verdicts[target] == ["met"], target
    assert verdicts[TOGETHER] == ["not measured"]
    assert status == 0


@pytest.mark.parametrize(
    "target, result",
    [
        (HIDDEN, step([row("overlapped", 100, ratio={"median": 1.031, "low": 1.03, "high": 1.04})])),
        (BROADCAST, step([row("overlapped", 100), row("broadcast", 102)])),
        (BROADCAST, step([row("overlapped", 100), row("broadcast", 199)], tokens=512)),
        (OTHERS, step([row("overlapped", 100), row("allgather", 99)])),
        (DELAYED, step([row("overlapped", 100, last_rank_delayed=True)])),
        (MEMORY, step([], driver_bytes_on_device=2**30 + 21 * 2**20)),  # 8 shares, 2 windows
        (MEMORY, step([], driver_bytes_on_device=2**30 + 37 * 2**20, placement="striped")),  # 16 stripes
        (ONCE, step([], driver_bytes_on_device=2**30 + 33 * 2**20, windows=0, buses=("a",) * 4)),
        (CALLS, step([], call_with_transfer_ns=8100)),
        (TOGETHER, step([row("overlapped", 100)], tokens=16, buses=("a",) * 4)),
        ("512 and 16 tokens: to the longer of resident and copies alone",
         step([row("overlapped", 1, ratio_to_bound={"median": 1.07, "low": 1, "high": 2})], tokens=16)),
        ("512 tokens, residents at half of what sharding saved: to resident",
         step([row("overlapped", 1, resident="50%", ratio={"median": 1.06, "low": 1, "high": 2})], tokens=512)),
        ("a graph to the same way eager",
         step([row("overlapped", 1, graph=True, ratio_to_eager={"median": 1.03, "low": 1, "high": 2})])),
        ("one pull: share of a bare copy's speed",
         {"bench": "link", "bits_checked": True, "gpus": [{"bus": "a"}, {"bus": "b"}],
          "rows": [{"bytes": 2**28, "placement": "owner", "readers": False, "in_place": False, "from": 1,
                    "first_to": 0, "share": 0.96, "pull": {}}]}),
        ("a rank is killed", KILLED + "passed\n" + KILLED + "FAILED\n"),
        ("a rank is killed", KILLED.replace("  rank 2: 100", "  rank 2: 99") + "passed\n"),
        ("a rank is killed", KILLED),
    ],
)  # fmt: skip
def test_what_is_missed(judge, target, result):
    verdicts, status = judge(one=result)
    assert set(verdicts[target]) == {"missed"}
    assert status == 1


def test_survivors_of_plans_that_passed_are_counted(judge):
    log = KILLED + "passed\n" + KILLED.replace("\n", "\n7: ")[:-3] + "7: passed\n"
    verdicts, status = judge(one=log)
    assert verdicts["a rank is killed"] == ["met"]
    assert status == 0


@pytest.mark.parametrize(
    "target, changed",
    [
        (HIDDEN, {"layers": 4}),
        (HIDDEN, {"hidden": 512}),
        (HIDDEN, {"rounds": 3}),
        (HIDDEN, {"margin_percent": 50}),
        (DELAYED, {"slow_rank_percent": 1.0}),
    ],
)
def test_another_setting_does_not_meet_a_target(judge, target, changed):
    even = {"ratio": {"median": 1.001, "low": 1, "high": 1.01}}
    result = step([row("overlapped", 100), row("overlapped", 100, last_rank_delayed=True, **even)])
    result["config"] |= changed
    verdicts, _ = judge(show_parts=True, one=result)
    assert verdicts[target] == ["other setting", "in part"]


def test_what_is_missing_beside_what_is_measured_is_named(judge, tmp_path):
    rows = [row("overlapped", 100), row("peer-copy", 101)]
    verdicts, _ = judge(show_parts=True, one=step(rows))
    assert verdicts[HIDDEN] == ["met", "in part"]
    assert verdicts[OTHERS] == ["met", "met", "in part"]  # the second: faster in most
    said = next(line for line in targets(tmp_path).stdout.splitlines() if OTHERS in line and "not measured" in line)
    assert "allgather-ce, 8192 tokens" in said and "peer-copy, 512 tokens" in said
    assert "peer-copy, 8192 tokens" not in said


def test_a_rival_that_is_as_fast_everywhere_is_not_beaten_in_most(judge):
    verdicts, status = judge(one=step([row("overlapped", 100), row("peer-copy", 100), row("allgather", 101)]))
    assert verdicts[OTHERS] == ["met", "met", "missed"]
    assert status == 1


def test_memory_that_the_driver_does_not_see_is_void(judge):
    verdicts, _ = judge(one=step([], driver_bytes_on_device=0, windows=0, buses=("a",) * 4))
    assert verdicts[MEMORY] == verdicts[ONCE] == ["void"]


def test_unchecked_bits_are_a_mistake(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"result": step([row("overlapped", 100)]) | {"bits_checked": False}}))
    done = targets(path)
    assert done.returncode == 2 and "bits" in done.stderr


def test_a_table_that_is_void_says_nothing(judge):
    bad = row("overlapped", 100, ratio={"median": 2, "low": 2, "high": 2})
    verdicts, status = judge(step=step([bad], conclusive=False))
    assert verdicts[HIDDEN] == ["void"]
    assert status == 0


def test_ranks_of_one_gpu_say_nothing_of_a_link(judge):
    verdicts, _ = judge(step=step([row("overlapped", 100)], buses=("a", "a")))
    assert verdicts[HIDDEN] == ["not measured"]
    assert verdicts[CALLS] == ["met"]


def test_files_of_something_else_are_passed_over_or_named(judge, tmp_path):
    verdicts, status = judge(model={"bench": "step", "arms": []})  # of a model's time, without GPUs
    assert {one for found in verdicts.values() for one in found} == {"not measured"}
    assert status == 0
    (tmp_path / "broken.json").write_text("{")
    done = targets(tmp_path)
    assert done.returncode == 2
    assert "broken.json" in done.stderr


def test_the_results_of_this_tree_are_read():
    done = targets()
    assert done.returncode in (0, 1) and not done.stderr, done.stdout + done.stderr
    assert "one pull: share of a bare copy's speed" in done.stdout

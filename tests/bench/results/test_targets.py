# SPDX-License-Identifier: Apache-2.0
"""bench/results/targets.py: what is met, missed, shown, not measured, by made-up results and this tree's."""

import json
import subprocess
import sys

import pytest
from programs import TREE

FETCHES = "one fetch, to a bare copy's speed"
READERS = "two readers of one source, four ranks"
MODELS = "whole models by PyTorch"
PROMPTS, REQUESTS, ROUNDING = "one long prompt", "requests, beside pipeline parallel", "a compiled model's rounding"
KILLED = "a rank is killed"
UNMEASURED = dict.fromkeys((PROMPTS, REQUESTS, ROUNDING), ["not measured"])
LOG = """cuda:copy, WHOLE, 3 ranks, k = 1, 1 replays, rank 1 is killed
  rank 0: 100 passes and 100 replays after rank 1 was killed: bit-exact
  rank 2: 100 passes and 100 replays after rank 1 was killed: bit-exact
"""


def link(share=0.98, buses=("a", "b"), **fields):
    row = {"bytes": 2**28, "placement": "owner", "readers": False, "in_place": False, "from": 1, "first_to": 0,
           "to_count": 1, "share": share, "fetch": {"gigabytes_per_s": 390.0}}  # fmt: skip
    return {"bench": "link", "bits_checked": True, "gpus": [{"bus": bus} for bus in buses], "rows": [row | fields]}


def e2e(result):
    row = {"what": "layershard k=1 : replicated, 4096 tokens", "limit": "1.025", "found": "1.020 (1.010 to 1.030)"}
    return {"bench": "e2e", "tables": [], "targets": [row | {"result": result}]}


def wan(result):
    row = {"variant": "layershard", "what": "to replicated", "target": 1.02, "value": 1.003, "result": result}
    return {"tables": [], "targets": {"rows": [row]}}


@pytest.fixture
def evaluate(tmp_path):
    """What is said of each target, and the exit status, of results given by name."""

    def run(**results):
        for name, result in results.items():
            text = result if isinstance(result, str) else json.dumps({"result": result})
            (tmp_path / (f"{name}.log" if isinstance(result, str) else f"{name}.json")).write_text(text)
        done = targets("--markdown", tmp_path)
        assert done.stderr == ""
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
        found = {}
        for cells in filter(lambda cells: len(cells) == 6, rows):
            found.setdefault(cells[0], []).append(cells[4])
        return found, done.returncode

    return run


def targets(*arguments):
    command = [sys.executable, str(TREE / "bench" / "results" / "targets.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_what_is_met(evaluate):
    found, status = evaluate(link=link(), e2e=e2e("met"), wan=wan("met"), killed=LOG + "passed\n")
    assert found == UNMEASURED | {
        FETCHES: ["met"],
        READERS: ["not measured"],
        MODELS: ["met", "met"],
        KILLED: ["met"],
    }
    assert status == 0


@pytest.mark.parametrize(
    "target, result",
    [
        (FETCHES, link(share=0.96)),
        (MODELS, e2e("MISSED")),
        (MODELS, wan("MISSED")),
        (KILLED, LOG + "passed\n" + LOG + "FAILED\n"),
        (KILLED, LOG.replace("  rank 2: 100", "  rank 2: 99") + "passed\n"),
        (KILLED, LOG),
    ],
)
def test_what_is_missed(evaluate, target, result):
    found, status = evaluate(one=result)
    assert found[target] == ["missed"]
    assert status == 1


@pytest.mark.parametrize(
    "result, said",
    [
        (e2e("inconclusive: the control variant drifted"), "inconclusive"),
        (e2e("not evaluated: each rank needs a GPU of its own"), "not evaluated"),
        (e2e("not run"), "not run"),
        (wan(None), "not evaluated"),
    ],
)
def test_what_a_program_does_not_evaluate_is_not_missed(evaluate, result, said):
    found, status = evaluate(one=result)
    assert found[MODELS] == [said]
    assert status == 0


def as_before(value):
    """As a result was saved before its keys said variant, result and fetch."""
    before = {"variant": "arm", "result": "verdict", "fetch": "pull"}
    if isinstance(value, list):
        return [as_before(each) for each in value]
    if isinstance(value, dict):
        return {before.get(name, name): as_before(each) for name, each in value.items()}
    return value


@pytest.mark.parametrize(
    "target, result, said",
    [
        (FETCHES, link(), "met"),
        (READERS, link(readers=True, to_count=2), "shown"),
        (MODELS, e2e("MISSED"), "missed"),
        (MODELS, e2e("void: the control arm drifted"), "inconclusive"),
        (MODELS, e2e("not judged: each rank needs a GPU of its own"), "not evaluated"),
        (MODELS, wan("met"), "met"),
        (MODELS, wan(None), "not evaluated"),
    ],
)
def test_results_of_the_first_schema_are_read(evaluate, target, result, said):
    found, _ = evaluate(one=as_before(result))
    assert found[target] == [said]


def test_survivors_of_plans_that_passed_are_counted(evaluate):
    log = LOG + "passed\n" + LOG.replace("\n", "\n7: ")[:-3] + "7: passed\n"
    found, status = evaluate(one=log)
    assert found[KILLED] == ["met"]
    assert status == 0


@pytest.mark.parametrize("bench, about", [("long_prompt", PROMPTS), ("rounding", ROUNDING)])
def test_each_bench_has_targets_of_its_own(evaluate, bench, about):
    found, status = evaluate(one=e2e("MISSED") | {"bench": bench})
    assert (found[about], found[MODELS], status) == (["missed"], ["not measured"], 1)


def pipeline(devices):
    rows = [{"variant": name, "again": False, "ratio": {"median": 2.0}, "first_token_ms": {"median": 5.0}}
            for name in ("replicated", "PP2")]  # fmt: skip
    tables = [{"load": "equal", "rows": [*rows, {"variant": "replicated", "again": True}]}]
    return {"bench": "pipeline", "config": {"devices": devices}, "tables": tables}


def test_requests_are_shown_where_each_rank_has_its_gpu(evaluate):
    assert evaluate(one=pipeline(["cuda:0", "cuda:1"]))[0][REQUESTS] == ["shown", "shown"]
    assert evaluate(one=pipeline(["cuda:0", "cuda:0"]))[0][REQUESTS] == ["not measured"]


def test_readers_are_shown(evaluate):
    found, _ = evaluate(one=link(readers=True, to_count=2))
    assert (found[READERS], found[FETCHES]) == (["shown"], ["not measured"])


@pytest.mark.parametrize("fields", [{"buses": ("a", "a")}, {"in_place": True}, {"bytes": 2**27}])
def test_what_says_nothing_of_a_link(evaluate, fields):
    found, status = evaluate(one=link(share=0.5, **fields))
    assert (found[FETCHES], status) == (["not measured"], 0)


def test_what_is_missing_is_named_with_the_part_that_measures_it(tmp_path):
    said = targets(tmp_path).stdout
    assert "bench/gpu.sh readers" in said and "make check-gpu" in said


def test_unchecked_bits_are_a_mistake(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"result": link() | {"bits_checked": False}}))
    done = targets(path)
    assert done.returncode == 2 and "bits" in done.stderr


def test_results_before_and_after_schemas_are_read_and_others_refused(tmp_path):
    path = tmp_path / "one.json"
    for schema, result in (("layershard-bench/1", as_before(link())), ("layershard-bench/2", link())):
        path.write_text(json.dumps({"schema": schema, "result": result}))
        assert targets(path).returncode == 0
    path.write_text(json.dumps({"schema": "layershard-bench/3", "result": link()}))
    done = targets(path)
    assert done.returncode == 2 and "'layershard-bench/3'" in done.stderr


def test_files_of_something_else_are_passed_over_or_named(evaluate, tmp_path):
    found, status = evaluate(model={"bench": "step", "arms": []})
    assert {each for said in found.values() for each in said} == {"not measured"}
    assert status == 0
    (tmp_path / "broken.json").write_text("{")
    done = targets(tmp_path)
    assert done.returncode == 2
    assert "broken.json" in done.stderr


def test_the_results_of_this_tree_are_read():
    done = targets()
    assert done.returncode in (0, 1) and not done.stderr, done.stdout + done.stderr
    assert all(target in done.stdout for target in (FETCHES, MODELS, KILLED))

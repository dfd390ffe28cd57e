# SPDX-License-Identifier: Apache-2.0
"""bench/torch/e2e.py on CPUs, with shapes of a few KiB: every variant is run and compared, or named with a reason;
what is said of ratios is what the samples hold."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time
import types
import weakref

import forked_scripts
import pytest
from patience import LONG_S

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("torch.distributed.fsdp._fully_shard", reason="this torch has no fully_shard")

TREE = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(TREE / "bench" / "torch"))

import e2e  # noqa: E402
import e2e_fsdp  # noqa: E402
import e2e_layershard  # noqa: E402, F401 - imported here they are there in all forks
import e2e_schemes  # noqa: E402
import e2e_targets  # noqa: E402
import e2e_tensor_parallel  # noqa: E402, F401
import e2e_uneven  # noqa: E402
import e2e_whole  # noqa: E402
import e2e_windows  # noqa: E402, F401
import torch_launch  # noqa: E402
import torch_rounds  # noqa: E402
from e2e_model import Shape  # noqa: E402
from torch_launch import Ranks  # noqa: E402
from torch_rounds import Rounds  # noqa: E402
from torch_table import Table, Variant, ratio_of  # noqa: E402

torch.set_num_threads(1)  # a forked process cannot use the parent's OpenMP threads

SMALL = "--devices cpu,cpu --shape 32,88,4,2 --layers 5 --passes 1 --warm-ms 0".split()


def bench(folder, *options):
    # Whole: what it saves of its command does not depend on where ctest runs it.
    script = str(TREE / "bench" / "torch" / "e2e.py")
    return forked_scripts.run(e2e.main, [script, *SMALL, *options], folder, torch_launch)


# ---- The script ----


def test_all_variants_that_a_processor_has_compute_the_same(tmp_path):
    eager = "replicated;layershard k=?;layershard k=?, a third resident;*all resident;TP2*;broadcast;peer*;FSDP2*;two*"
    eager += ";*last rank*"
    options = ["--tokens", "8", "--rounds", "2", "--variants", eager, "--margin", "1000", "--late-percent", "100"]
    options += ["--save", tmp_path / "e2e.json"]
    done = bench(tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((tmp_path / "e2e.json").read_text(encoding="utf-8"))
    assert next(iter(saved)) == "schema" and saved["schema"] == "layershard-bench/2"
    assert saved["command"].startswith("bench/torch/e2e.py --devices cpu,cpu") and saved["versions"]["torch"]
    assert "NCCL_NVLS_ENABLE" in saved["result"]["config"]["environment"]
    (table,) = saved["result"]["tables"]
    equal = {row["variant"]: row["bits_equal"] for row in table["rows"]}
    same = ["replicated", "layershard k=1", "layershard k=2", "broadcast", "two regimes gathered"]
    same += [f"layershard k={k}, a third resident" for k in (1, 2)] + ["layershard all resident"]
    same += [f"{scheme}, last rank late" for scheme in ("layershard k=1", "broadcast")] + [
        "layershard k=1, last rank alone"
    ]
    same += [f"FSDP2 p={p}{across}" for p in (1, 2) for across in ("", " across passes")]
    assert [name for name in same if equal.get(name) is not True] == []
    assert {"TP2", "two regimes parallel"} <= equal.keys()
    reasons = {each["variant"]: each["reason"] for each in table["not_run"]}
    assert reasons["peer copy"] == "there is no CUDA IPC on a processor"
    assert reasons["TP2, graph"] == "there are no CUDA graphs on a processor"
    rows = {row["variant"]: row for row in table["rows"]}
    assert (rows["layershard k=2"]["windows"], rows["layershard k=1, a third resident"]["residents"]) == (2, 0)
    assert rows["broadcast, last rank late"]["late_percent"] == 100
    assert all(row["host_ns"] > 0 for row in table["rows"] if not row["again"])


def test_the_whole_model_one_variant_after_the_other(tmp_path):
    done = bench(tmp_path, "--whole", "--tokens", "8", "--save", tmp_path / "whole.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))["result"]["rows"]
    assert [row["variant"] for row in rows] == ["layershard k=1", "TP2", "TP2 overlapped", "TP2", "layershard k=1"]
    assert rows[2]["not_run"] == "there is no symmetric memory of a processor"
    assert all(row["tokens_per_second_per_gpu"] > 0 for row in rows if "not_run" not in row)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--devices", "cpu,x"], "'cpu,x' is not one device a rank"),
        (["--devices", "0,cpu"], "'0,cpu' is not one device a rank"),
        (["--shape", "32,88"], "argument --shape"),
        (["--shape", "32,88,5,2"], "argument --shape"),
        (["--tokens", "8,0"], "argument --tokens"),
        (["--rounds", "0"], "argument --rounds"),
        (["--dtype", "int8"], "argument --dtype"),
    ],
)
def test_wrong_arguments_are_named_before_ranks_begin(tmp_path, wrong, said):
    done = bench(tmp_path, *wrong)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_variant_that_is_not_there(tmp_path):
    done = bench(tmp_path, "--tokens", "8", "--variants", "layershardd")
    assert done.returncode == 1
    assert "--list names all of them" in done.stderr


def test_a_rank_that_fails_ends_the_others():
    """The one test that starts the script as its users do."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "bench/torch/e2e.py", *SMALL, "--tokens", "8", "--transport", "nonsense"]
    command += ["--variants", "layershard k=1"]
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode != 0
    assert "layershard k=1" in done.stderr and "nonsense" in done.stderr


# ---- Ranks that do not do the same ----


def called(kind, rank):
    """What a rank of two runs in an uneven pass of a scheme whose pass is "pass", beside replicated layers 0 to 3."""
    calls = []
    bench = e2e_schemes.Bench(Ranks(rank, 2, [torch.device("cpu")] * 2, None), Shape(4, 32, 88, 4, 2), late_percent=150)
    variant = Variant("even", lambda: calls.append("pass"))
    even = types.SimpleNamespace(title="even", built=True, variants=lambda tokens: [variant])
    layers = [lambda x, number=number: calls.append(number) for number in range(4)]
    replicated = types.SimpleNamespace(built=True, model=types.SimpleNamespace(layers=layers))
    scheme = kind(bench, even, *([replicated] if kind is e2e_uneven.LastLate else []))
    scheme.open()
    (variant,) = scheme.variants(8)
    assert variant.baseline == "even"
    variant.run()
    return calls


def test_the_last_rank_computes_more_before_its_pass_the_others_do_not():
    assert called(e2e_uneven.LastLate, 1) == [0, 1, 2, 3, 0, 1, "pass"]
    assert called(e2e_uneven.LastLate, 0) == ["pass"]


def test_the_last_rank_alone_makes_passes():
    assert called(e2e_uneven.LastAlone, 1) == ["pass"]
    assert called(e2e_uneven.LastAlone, 0) == []


@pytest.mark.parametrize("transport", ["callback", "local:lockstep"])
def test_in_step_no_rank_is_alone(transport):
    bench = e2e_schemes.Bench(Ranks(0, 2, [torch.device("cpu")] * 2, None), Shape(), transport)
    assert transport in e2e_uneven.LastAlone(bench, types.SimpleNamespace(title="x")).refusal()


# ---- Rounds and ratios ----


class Alone(Ranks):
    def __init__(self):
        super().__init__(0, 1, [torch.device("cpu")], None)

    def barrier(self):
        pass

    def gather(self, mine):
        return [mine]


class WithASlowRank(Alone):
    """A second rank that measures ten times as much."""

    def gather(self, mine):
        if isinstance(mine, list):
            return [mine, [10 * each for each in mine]]
        return [mine, 10 * mine if isinstance(mine, float) else mine]


def rounds(**options):
    return Rounds(Alone(), passes=1, warm_ms=0, **options)


def test_another_result_ends_the_run():
    right = torch.arange(1.0, 5.0)
    near = Variant("near", lambda: right * (1 + 1e-4), check="close", tolerance=1e-3)
    table = rounds(rounds=2).run([Variant("right", lambda: right), near])
    assert table.equal == {"right": True, "near": False}
    with pytest.raises(torch_rounds.WrongBits, match="rank 0: near differs from right by 0.0001"):
        rounds(rounds=2).run([Variant("right", lambda: right), Variant("near", near.run)])


def test_a_result_that_goes_wrong_later_is_seen():
    calls = iter(range(1000))
    late = Variant("late", lambda: torch.ones(3) if next(calls) < 8 else torch.zeros(3))
    with pytest.raises(torch_rounds.WrongBits, match="late differs from right"):
        rounds(rounds=5).run([Variant("right", lambda: torch.ones(3)), late])


def test_rounds_end_in_time_and_the_last_one_is_compared():
    def slow():
        time.sleep(0.02)
        return next(outputs)

    outputs = iter([torch.ones(3)] * 9 + [torch.zeros(3)] * 100)
    right = Variant("right", lambda: torch.ones(3))
    table = rounds(rounds=1000, minutes=0.5 / 60).run([right, Variant("slow", slow, check="none")])
    assert 3 < len(table.times["slow"]) == len(table.times["right"]) == len(table.again) < 30
    assert len(rounds(rounds=2, minutes=0).run([right]).again) == 2
    assert len(rounds(rounds=9, minutes=0).run([right]).again) == Rounds.LEAST_ROUNDS
    outputs = iter([torch.ones(3)] * 9 + [torch.zeros(3)] * 100)
    with pytest.raises(torch_rounds.WrongBits, match="slow differs from right"):
        rounds(rounds=1000, minutes=0).run([right, Variant("slow", slow)])


def test_tables_share_the_minutes_that_are_left():
    ranks = Alone()
    ranks.began_s -= 120
    assert ranks.minutes_each(8, 3) == pytest.approx(2, abs=0.1) and ranks.minutes_each(None, 3) is None


def test_results_that_could_not_differ_are_refused():
    with pytest.raises(torch_rounds.WrongBits, match="mostly zero"):
        rounds(rounds=2).run([Variant("zeros", lambda: torch.zeros(3))])


def test_times_are_of_the_ranks_that_count():
    right = Variant("right", lambda: torch.ones(3))
    late = Variant("late", right.run, counted=slice(None, -1))
    alone = Variant("alone", right.run, counted=slice(-1, None))
    table = Rounds(WithASlowRank(), passes=1, warm_ms=0, rounds=3).run([right, late, alone])
    rows = {row["variant"]: row for row in table.rows()}
    times = {name: row["pass_ns"]["median"] for name, row in rows.items()}
    assert rows["late"]["others_ns"] == pytest.approx(10 * times["late"])
    assert rows["alone"]["others_ns"] == pytest.approx(times["alone"] / 10)
    assert "others_ns" not in rows["right"]


def test_how_long_the_host_takes_for_a_pass():
    def slow():
        time.sleep(0.01)
        return torch.ones(3)

    table = rounds(rounds=2).run([Variant("right", lambda: torch.ones(3)), Variant("slow", slow)])
    first, again, row = table.rows()
    assert row["host_ns"] >= 1e7 and first["host_ns"] > 0 and again["host_ns"] is None
    assert "host us" in table.as_text()


def test_a_variant_that_cannot_run_is_named():
    def broken():
        raise RuntimeError("no such thing\nat all")

    table = rounds(rounds=2).run([Variant("right", lambda: torch.ones(3)), Variant("broken", broken)])
    assert table.not_run == {"broken": "RuntimeError: no such thing"}
    assert [row["variant"] for row in table.rows()] == ["right", "right"]


def test_interval_holds_the_median_of_what_is_drawn():
    draw, held = random.Random(1), 0
    for _ in range(400):
        found = ratio_of([draw.expovariate(1) for _ in range(31)])
        assert found.low <= found.median <= found.high
        held += found.low <= 0.6931 <= found.high
    assert 370 <= held < 400


def table_of(drift=0.0, **times):
    table = Table([Variant(name.replace("_", " "), lambda: None) for name in ("replicated", *times)], 0.5)
    table.times = {name.replace("_", " "): list(values) for name, values in times.items()}
    table.times["replicated"] = [1.0, 2.0, 4.0]
    table.again = [each * (1 + drift) for each in table.times["replicated"]]
    return table


def test_ratios_are_the_rounds_own():
    table = table_of(other=[1.1, 2.2, 4.4])
    assert table.ratio("other", "replicated").median == pytest.approx(1.1)
    assert table.ratio("other", "absent") is None
    assert table.conclusive and not table_of(drift=0.006).conclusive


@pytest.mark.parametrize(
    "drift, slower, own_gpus, result",
    [
        (0, 1.031, True, "met"),
        (0, 1.033, True, "MISSED"),
        (0.01, 1.031, True, e2e_targets.INCONCLUSIVE),
        (0, 1.031, False, e2e_targets.NO_GPUS),
    ],
)
def test_targets_are_evaluated(drift, slower, own_gpus, result):
    table = table_of(drift)
    table.times["layershard k=1"] = [slower * each for each in (1.0, 2.0, 4.0)]
    table.times["layershard k=2"] = [3 * each for each in (1.0, 2.0, 4.0)]
    found = {row["what"]: row["result"] for row in e2e_targets.evaluate_tables({4096: table}, own_gpus)}
    assert found["layershard k=1 : replicated, 4096 tokens"] == result
    assert found["layershard k=1 : FSDP2*, 4096 tokens"] == "not run"


@pytest.mark.parametrize("variant", ["last rank late", "graph"])
@pytest.mark.parametrize("beyond, result", [(-0.001, "met"), (0.001, "MISSED")])
def test_a_late_rank_and_graphs_are_compared_with_the_even_eager_pass(variant, beyond, result):
    table = table_of()
    table.times["layershard k=1"] = [1.0, 2.0, 4.0]
    table.times[f"layershard k=1, {variant}"] = [(1.005 + beyond) * each for each in (1.0, 2.0, 4.0)]
    found = {row["what"]: row["result"] for row in e2e_targets.evaluate_tables({1024: table}, True)}
    assert found[f"layershard k=1, {variant} : layershard k=1, 1024 tokens"] == result


def test_memory_is_evaluated():
    memory = {"variant": "layershard k=1", "windows": 2, "layers_bytes": 300, "expected_bytes": 100}
    results = [
        e2e_targets.evaluate_memory([memory | {"driver_bytes": each}])[0]["result"] for each in (102, 103, 0, None)
    ]
    assert results == ["met", "MISSED", "MISSED", "not run"]


@pytest.mark.parametrize("model_bytes, result", [(137e9, "met"), (6.8e9, e2e_targets.NOT_WHOLE)])
def test_free_memory_beside_a_smaller_model_says_nothing(model_bytes, result):
    row = {"variant": "layershard k=1", "tokens": 8, "tokens_per_second_per_gpu": 1.0}
    row |= {"free_bytes": 80e9, "free_bytes_with_activations": 75e9}
    (found,) = e2e_whole._evaluate([row], True, model_bytes)
    assert found["result"] == result


@pytest.mark.parametrize("speed, results", [(1.07, ["met", "met"]), (1.03, ["MISSED", "met"])])
def test_tokens_a_second_of_the_whole_model_are_compared(speed, results):
    rows = [{"variant": name, "tokens": 8, "tokens_per_second_per_gpu": 1.0} for name in e2e_targets.WHOLE_SPEED]
    mine = {"variant": "layershard k=1", "tokens": 8, "tokens_per_second_per_gpu": speed, "free_bytes": None}
    found = e2e_whole._evaluate([mine, *rows, mine], True, e2e_targets.WHOLE_BYTES)
    assert [each["result"] for each in found] == results


# ---- Several sizes in one run -----------------------------------------------------------------------------------


def test_what_a_finished_number_of_tokens_had_is_gone(monkeypatch):
    """Inputs, passes, compiled programs: several sizes in one run need the memory of one."""
    interpreted, alive, left = torch.compile, [], []
    monkeypatch.setattr(torch, "compile", lambda layer, **how: interpreted(layer, backend="eager", **how))
    for name, value in e2e.SWITCHES.items():
        monkeypatch.setenv(name, value)

    class Watched(e2e_schemes.Replicated):
        def input(self, tokens):
            made = super().input(tokens)
            alive.append(weakref.ref(made))
            return made

        def variants(self, tokens):
            left.append([each() for each in alive])
            made = super().variants(tokens)
            alive.extend(weakref.ref(each.run) for each in made)
            return made

    bench = e2e_schemes.Bench(Alone(), Shape(2, 32, 88, 4, 2, dtype=torch.float32))
    schemes = e2e.Schemes(bench, ["*"], 16)
    schemes.open([Watched(bench)])
    options = types.SimpleNamespace(passes=1, rounds=2, warm_ms=0, margin=1000, minutes=None, save=None)
    with torch.no_grad():
        tables = e2e.run_tables(options, bench, schemes, [8, 16, 8])
    assert [len(each) for each in left] == [0, 3, 6] and not any(each is not None for size in left for each in size)
    assert all(set(table.equal) == {"replicated", "replicated, compiled"} for table in tables.values())


def test_what_passes_need_for_a_while_is_kept_free_for_the_neediest():
    bench = e2e_schemes.Bench(Alone(), Shape(4, 32, 88, 4, 2))
    schemes = e2e.Schemes(bench, ["*"], 8)
    small, large = e2e_schemes.Replicated(bench), e2e_fsdp.Fsdp(bench)
    bench.free_bytes = lambda: schemes._activations + small.needs()
    assert schemes._no_memory(small) is None
    schemes.opened.append(large)
    assert "no memory: with passes" in schemes._no_memory(small)
    bench.free_bytes = lambda: schemes._activations + large.passing() + small.needs()
    assert schemes._no_memory(small) is None

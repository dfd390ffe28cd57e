# SPDX-License-Identifier: Apache-2.0
"""`layershard-bench`: options, exit codes, the shape of the results, and that wrong bits never pass.

How long anything takes is not tested here, with one exception: a throttled link is never faster than its speed.
The program is build/layershard-bench, or that of the folder that LAYERSHARD_TEST_BUILD names.
"""

import json
import os
import subprocess

import pytest
from patience import LONG_S

PROGRAM = os.path.join(os.environ.get("LAYERSHARD_TEST_BUILD", "build"), "layershard-bench")

# A stack so small that all variants take a moment; --margin lets a busy machine pass.
SMALL = ["--layers", "12", "--layer-bytes", "4K", "--compute-us", "200", "--passes", "1", "--margin", "100"]
ONE_CASE = ["--ratio", "1.2", "--prefetch", "1"]


def bench(*arguments):
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=LONG_S, check=False)


def result_of(*arguments):
    done = bench(*arguments, "--json")
    assert done.returncode in (0, 3), done.stderr
    return json.loads(done.stdout)


def is_spread(value):
    return set(value) == {"median", "min", "max"} and value["min"] <= value["median"] <= value["max"]


# ---- Usage


@pytest.mark.parametrize("arguments", [[], ["calls"], ["step"]])
def test_help(arguments):
    done = bench(*arguments, "--help")
    assert done.returncode == 0
    assert "Usage: layershard-bench" in done.stdout
    assert "Exit status" in done.stdout


@pytest.mark.parametrize(
    "arguments, names",
    [
        ([], "calls, link, read, step"),
        (["walk"], "walk"),
        (["calls", "--max-ns", "0"], "--max-ns"),
        (["calls", "--max-ns", "fast"], "--max-ns"),
        (["calls", "--rounds", "8"], "--rounds"),
        (["calls", "--no-such-option"], "'--no-such-option'"),
        (["calls", "more"], "more"),
        (["step", "--layers", "0"], "--layers"),
        (["step", "--layer-bytes", "100"], "--layer-bytes"),
        (["step", "--compute-us", "-1"], "--compute-us"),
        (["step", "--ranks", "0"], "--ranks"),
        (["step", "--prefetch", "0,x"], "--prefetch"),
        (["step", "--prefetch", ""], "--prefetch"),
        (["step", "--prefetch", "0,1,2,3,4,5,6,7,8"], "more than 8"),
        (["step", "--placement", "round"], "--placement"),
        (["step", "--resident", "101%"], "at most 100%"),
        (["step", "--transport", "pigeon"], "pigeon"),
        (["step", "--transport", "cuda"], "GPU's memory"),
        (["step", "--ratio", "0"], "--ratio"),
        (["step", "--ratio", "1", "--link-bytes-per-s", "1M"], "--link-bytes-per-s"),
        (["step", "--rounds", "3"], "--rounds"),
        (["step", "--slow-rank-percent", "50", "--ranks", "1"], "--slow-rank-percent"),
        (["step", "--transport", "local:lockstep"], "--all-compute"),
        (["step", "--transport", "trace=/nowhere/run.json,local"], "give one --ratio"),
        (["step", "--ratio", "1,2", "--transport", "throttle=1e9,trace=/nowhere/run.json,local"], "give one --ratio"),
        (["step", "--margin", "nan"], "--margin"),
        (["step", "more"], "more"),
        (["step", "--devices", "0,1"], "bench/torch/e2e.py"),
        (["step", "--devices=0,1", "--graph"], "bench/torch/e2e.py"),
        (["step", "--rivals"], "bench/torch/e2e.py"),
    ],
)
def test_wrong_arguments_are_named(arguments, names):
    done = bench(*arguments)
    assert done.returncode == 2
    assert names in done.stderr
    assert done.stdout == ""


# ---- calls


def test_calls_lists_every_size_and_checks_the_bits():
    result = result_of("calls", "--max-ns", "1e9")
    assert result["bench"] == "calls"
    assert result["bits_checked"] is True
    assert result["met"] is True
    rows = result["rows"]
    assert all(is_spread(row["ns"]) for row in rows)
    for case in ("stored", "held"):
        assert {(row["ranks"], row["layers"]) for row in rows if row["case"] == case} == {
            (ranks, layers) for ranks in (2, 8, 64) for layers in (8, 64, 512, 8192)
        }
    direct = {row["layers"] for row in rows if row["case"] == "direct"}
    assert direct == (set() if result["no_shm"] else {8, 64, 512, 8192})


def test_calls_fails_when_the_target_is_missed():
    done = bench("calls", "--max-ns", "0.001")
    assert done.returncode == 1
    assert "NOT met" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "more than" in done.stderr


# ---- step


def test_step_has_every_case_and_variant():
    result = result_of("step", *SMALL, "--ratio", "2.6,0.6", "--prefetch", "0,2", "--resident", "0,34%")
    assert result["bench"] == "step"
    assert result["bits_checked"] is True
    assert result["config"]["layers"] == 12
    assert result["slow_rank"] == []
    for variant in ("replicated_first_ns", "replicated_last_ns", "control_ns"):
        assert is_spread(result[variant])
    cases = result["cases"]
    assert {(case["ratio"], case["prefetch"], case["resident"]) for case in cases} == {
        (ratio, prefetch, resident) for ratio in (2.6, 0.6) for prefetch in (0, 2) for resident in ("0", "34%")
    }
    for case in cases:
        assert all(is_spread(case[variant]) for variant in ("transfers_ns", "overlapped_ns", "serial_ns"))
        assert case["windows"] <= case["prefetch"] + 1
        assert case["residents"] + case["fetched_layers"] == 6
        assert case["residents"] == (0 if case["resident"] == "0" else 2)


def test_step_shares_follow_from_the_times():
    result = result_of("step", *SMALL, "--ratio", "1.2,0.6", "--prefetch", "1")
    step = result["replicated_first_ns"]["median"]
    drift = abs(result["replicated_last_ns"]["median"] / step - 1) * 100
    assert result["drift_percent"] == pytest.approx(drift, abs=1e-6)
    for case in result["cases"]:
        exposed = case["overlapped_ns"]["median"] - step
        assert case["exposed_ns"] == pytest.approx(exposed, abs=1)
        assert case["hidden_share"] == pytest.approx(1 - exposed / case["transfers_ns"]["median"], abs=1e-6)
        off = (exposed - case["predicted_exposed_ns"]) / step * 100
        assert case["difference_percent"] == pytest.approx(off, abs=1e-3)
        assert 0 < case["link_busy_share"] < 1.2


def test_step_is_never_faster_than_the_link():
    """Six layers of 4 KiB per pass at 1600 KiB/s are 15 ms, whatever the machine does."""
    result = result_of("step", *SMALL, "--prefetch", "0,2", "--link-bytes-per-s", "1600K")
    for case in result["cases"]:
        assert case["link_bytes_per_s"] == 1600 * 1024
        assert case["transfers_ns"]["min"] > 0.45 * 15e6  # up to three windows may be full when the sample begins
        assert case["serial_ns"]["min"] >= 15e6
        computed_ns = max(result[each]["max"] for each in ("replicated_first_ns", "replicated_last_ns"))
        assert case["predicted_exposed_ns"] > 0 or computed_ns > 15e6  # a slow machine hides all of it


def test_step_without_transfers_predicts_nothing_exposed():
    case = result_of("step", *SMALL, *ONE_CASE, "--resident", "100%")["cases"][0]
    assert case["fetched_layers"] == 0
    assert case["predicted_exposed_ns"] == 0
    assert case["hidden_share"] is None  # there was nothing to hide


@pytest.mark.parametrize("layers", ["1", "2", "3", "4"])
def test_step_where_all_layers_stay_in_the_windows(layers):
    """A steady pass brings nothing; the link still has the speed at which the layers came once, not a byte a second."""
    result = result_of("step", *SMALL, *ONE_CASE, "--layers", layers)
    case = result["cases"][0]
    stored_nowhere_else = (int(layers) + 1) // 2  # by the rank with the fewest of its own
    seconds = int(layers) * 200e-6
    assert case["fetched_layers"] == 0
    assert case["link_bytes_per_s"] == pytest.approx(1.2 * stored_nowhere_else * 4096 / seconds, rel=1e-3)
    assert case["hidden_share"] is None


def test_step_of_one_rank_has_no_link():
    result = result_of("step", *SMALL, *ONE_CASE, "--ranks", "1")
    assert result["cases"][0]["link_bytes_per_s"] is None
    assert result["cases"][0]["hidden_share"] is None
    result = result_of("step", *SMALL, "--prefetch", "1", "--ranks", "1", "--link-bytes-per-s", "1M")
    assert result["cases"][0]["link_bytes_per_s"] == 1 << 20
    assert result["cases"][0]["ratio"] is None
    table = bench("step", *SMALL, *ONE_CASE, "--ranks", "1")
    assert "nan" not in table.stdout and "inf" not in table.stdout


@pytest.mark.parametrize("placement", ["whole", "striped"])
@pytest.mark.parametrize("ranks", ["1", "3", "8"])
def test_step_with_any_number_of_ranks(placement, ranks):
    result = result_of("step", *SMALL, *ONE_CASE, "--ranks", ranks, "--placement", placement)
    assert result["config"]["ranks"] == int(ranks)
    assert (
        result["cases"][0]["fetched_layers"]
        == {
            ("whole", "1"): 0,
            ("whole", "3"): 8,
            ("whole", "8"): 10,
            ("striped", "1"): 0,
            ("striped", "3"): 12,
            ("striped", "8"): 12,
        }[placement, ranks]
    )


def test_step_in_lockstep():
    result = result_of("step", *SMALL, *ONE_CASE, "--transport", "local:lockstep", "--all-compute")
    assert len(result["cases"]) == 1
    assert result["config"]["all_compute"] is True


def test_step_with_a_slow_rank():
    """The delay is a lower bound: in lockstep nobody is faster than the slow rank."""
    result = result_of("step", *SMALL, *ONE_CASE, "--slow-rank-percent", "500")
    delay = 5 * 12 * 200e3
    ways = {way["variant"]: way for way in result["slow_rank"]}
    assert set(ways) == {"one-sided", "lockstep"}
    for way in ways.values():
        assert way["slow_rank_delayed_ns"]["min"] >= delay
    assert ways["lockstep"]["rank_0_delayed_ns"]["median"] >= 0.5 * delay


def test_step_table():
    done = bench("step", *SMALL, *ONE_CASE)
    assert done.returncode in (0, 3)
    for word in ("everything resident", "predicted", "exposed", "link busy"):
        assert word in done.stdout
    assert "\033" not in done.stdout + done.stderr  # colours are for terminals


def test_step_says_when_it_is_inconclusive():
    """No machine holds a drift of a millionth of a per cent over nine rounds of 2.4 ms; by chance not three times."""
    tries = (bench("step", *SMALL, *ONE_CASE, "--margin", "1e-9", "--json") for _ in range(3))
    done = next(each for each in tries if each.returncode != 0)
    assert done.returncode == 3
    assert json.loads(done.stdout)["conclusive"] is False
    assert "inconclusive" in done.stderr


def test_step_fails_when_the_prediction_is_missed():
    """No machine meets it to a billionth of a per cent."""
    done = bench("step", *SMALL, *ONE_CASE, "--max-off", "1e-9")
    assert done.returncode in (1, 3)
    if done.returncode == 1:
        assert "off the predicted one" in done.stderr


def test_step_with_a_trace_that_cannot_be_written():
    done = bench("step", *SMALL, *ONE_CASE, "--ranks", "1", "--transport", "trace=/dev/full,local")
    assert done.returncode == 1
    assert "trace: rank 0 could not write all of '/dev/full'" in done.stderr
    assert "No space left on device" in done.stderr


def test_step_on_a_flipped_bit():
    done = bench("step", *SMALL, *ONE_CASE, "--transport", "faults=r0.wait@*=flip,local")
    assert done.returncode == 1
    assert "layer" in done.stderr
    assert done.stdout == ""

# SPDX-License-Identifier: Apache-2.0
"""`layershard bench step --devices`: options, the shape of the results, and that wrong bits never pass; on stubs.

    LAYERSHARD_TEST_STUB_CUDA     the stubs of NVIDIA's driver, cuBLAS and NCCL that the tests build; what needs them
    LAYERSHARD_TEST_STUB_CUBLAS   is skipped without
    LAYERSHARD_TEST_STUB_NCCL
    LAYERSHARD_TEST_STUB_NVML     the directory of NVML's; it knows GPU 1 alone

On the stub driver any two events are equally far apart, so all ratios are 1: how long anything takes is not judged.
"""
import json
import os
import signal

import pytest

from programs import children_of, wait_until

SMALL = ["--layers", "7", "--dims", "32x64", "--tokens", "4", "--rounds", "3", "--passes", "2", "--warm-ms", "0.3"]
MANY = ["--layers", "16", "--dims", "128x256", "--tokens", "64", "--rounds", "1000", "--warm-ms", "1"]
NOWHERE = "/nonexistent/lib.so"
NCCL_RIVALS = {"broadcast", "allgather", "allgather-ce"}


@pytest.fixture(scope="module")
def stubs():
    found = {}
    for name in ("CUDA", "CUBLAS", "NCCL"):
        path = os.environ.get(f"LAYERSHARD_TEST_STUB_{name}")
        if not path:
            pytest.skip(f"LAYERSHARD_TEST_STUB_{name} names no stub: ctest sets it")
        found[f"LAYERSHARD_{name}_SO_PATH"] = path
    return found


def step(program, env, devices, *arguments):
    result = program.json("bench", "step", "--devices", devices, *SMALL, *arguments, env=env)
    assert result["bench"] == "step"
    assert result["bits_checked"] is True
    return result


def failed(program, env, devices, *arguments):
    done = program.run("bench", "step", "--devices", devices, *SMALL, *arguments, env=env)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    return done.stderr


def arms(result, tokens=4):
    (table,) = [table for table in result["tables"] if table["tokens"] == tokens]
    return table["rows"]


def names(result, tokens=4):
    return [row["arm"] for row in arms(result, tokens)]


def one_row(result, arm, **fields):
    rows = [row for row in arms(result) if row["arm"] == arm and all(row[k] == v for k, v in fields.items())]
    assert len(rows) == 1, rows
    return rows[0]


# ---- Usage


def test_help(program):
    done = program.run("bench", "step", "--devices", "0", "--help")
    assert done.returncode == 0
    assert "--rivals" in done.stdout
    assert "Exit status" in done.stdout
    assert "--devices" in program.run("bench", "step", "--help").stdout


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--devices", "x"], "--devices"),
        (["--devices="], "--devices"),
        (["--devices", "0,,1"], "'0,,1'"),
        (["--devices", "0,1", "--passes", "x"], "layershard bench step --devices 0 --help"),
        (["--devices", "0,1", "--dims", "7168"], "--dims"),
        (["--devices", "0,1", "--dims", "10x64"], "--dims"),
        (["--devices", "0,1", "--tokens", "0"], "--tokens"),
        (["--devices", "0,1", "--transport", "shm"], "--transport"),
        (["--devices", "0,1", "--rivals", "pigeon"], "pigeon"),
        (["--devices", "0,1", "--rounds", "2"], "--rounds"),
        (["--devices", "0,1", "--placement", "round"], "--placement"),
        (["--devices", "0,1", "--resident", "101%"], "--resident"),
        (["--devices", "0,1", "--compute-us", "5"], "--compute-us"),
        (["--devices", "0,0", "--slow-rank-percent", "50"], "--slow-rank-percent"),
        (["--devices", "0", "--slow-rank-percent", "50"], "--slow-rank-percent"),
        (["--devices", "0,1", "--save", "/nonexistent/file"], "--save"),
        (["--devices", "0,1", "--warm-ms", "0"], "--warm-ms"),
        (["--devices", "0,1", "more"], "more"),
        (["--devices", "0,1", "--only", "broadcast"], "--only"),
        (["--devices", "0,1", "--only", "serial", "--slow-rank-percent", "5"], "--slow-rank-percent"),
    ],
)
def test_wrong_arguments_are_named(program, arguments, named):
    done = program.run("bench", "step", *arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stdout == ""


# ---- What is missing on this machine


def test_without_a_driver_the_message_says_so(program, stubs):
    assert NOWHERE in failed(program, {**stubs, "LAYERSHARD_CUDA_SO_PATH": NOWHERE}, "0,1")


def test_without_cublas_the_message_says_how_to_name_it(program, stubs):
    text = failed(program, {**stubs, "LAYERSHARD_CUBLAS_SO_PATH": NOWHERE}, "0,1")
    assert "cuBLAS cannot be loaded" in text
    assert "LAYERSHARD_CUBLAS_SO_PATH" in text


def test_a_link_below_the_floor_is_shown(program, stubs):
    slow = ["--devices", "0,1", "--transport", "cuda:floor=100000", "--only", "control"]
    done = program.run("bench", "step", *SMALL, *slow, env=stubs)
    assert done.returncode == 0
    assert "slow: a pull goes at" in " ".join(done.stdout.split())
    assert "rank 0 (Stub 0" in done.stderr and "pulls from rank 1 (Stub 1" in done.stderr


def test_a_device_that_is_not_there_is_named(program, stubs):
    assert "no GPU 99" in failed(program, stubs, "0,99")


def test_without_nccl_the_rest_is_measured(program, stubs):
    result = step(program, {**stubs, "LAYERSHARD_NCCL_SO_PATH": NOWHERE}, "0,1", "--rivals", "broadcast,allgather-ce")
    assert {(entry["rival"], NOWHERE in entry["reason"]) for entry in result["rivals_not_run"]} == {
        ("broadcast", True),
        ("allgather-ce", True),
    }
    assert "overlapped" in names(result)
    assert not NCCL_RIVALS & set(names(result))


def test_a_communicator_that_fails_is_a_rival_not_run(program, stubs):
    result = step(program, {**stubs, "STUB_NCCL_FAIL": "1"}, "0,1", "--rivals", "broadcast")
    assert "ncclCommInitRank" in result["rivals_not_run"][0]["reason"]


def test_an_old_nccl_has_no_copy_engine_collectives(program, stubs):
    result = step(program, {**stubs, "STUB_NCCL_VERSION": "22706"}, "0,1", "--rivals", "allgather,allgather-ce")
    assert [entry["rival"] for entry in result["rivals_not_run"]] == ["allgather-ce"]
    assert "2.27.6" in result["rivals_not_run"][0]["reason"]
    assert "allgather" in names(result)


def test_copy_engines_without_symmetric_memory_are_not_believed(program, stubs):
    result = step(program, {**stubs, "STUB_NCCL_PLAIN": "1"}, "0,1", "--rivals", "allgather-ce")
    assert "symmetric memory" in result["rivals_not_run"][0]["reason"]


def test_one_device_for_two_ranks_is_told_of_nccl(program, stubs):
    result = step(program, stubs, "0,0", "--rivals", "all", "--transport", "cuda:copy")
    assert {entry["rival"] for entry in result["rivals_not_run"]} == NCCL_RIVALS
    assert "peer-copy" in names(result)


def test_without_nvml_clocks_are_unknown_not_zero(program, stubs):
    rows = arms(step(program, stubs, "0,1"))
    assert all(row["sm_mhz"] is None and row["watts"] is None for row in rows)


def test_clocks_and_power_are_of_the_arms_that_say_something(program, stubs):
    directory = os.environ.get("LAYERSHARD_TEST_STUB_NVML")
    if not directory:
        pytest.skip("LAYERSHARD_TEST_STUB_NVML names no directory: ctest sets it")
    result = step(program, {**stubs, "LD_LIBRARY_PATH": directory}, "1,2", "--graph", "--rivals", "broadcast")
    metered = {row["arm"] for row in arms(result) if row["sm_mhz"] is not None}
    assert metered == {"resident", "control", "copies", "overlapped", "serial", "broadcast"}
    row = one_row(result, "overlapped", graph=False)
    assert row["watts"] > 0
    assert row["sustained_pass_ns"] > 0
    assert row["throttled"] not in ("-", "none")


# ---- What is measured


def test_all_arms_are_there_and_agree_in_their_bits(program, stubs):
    result = step(program, stubs, "0,1", "--prefetch", "1,2", "--resident", "0,50%", "--graph", "--rivals", "all")
    found = names(result)
    assert found.count("resident") == 3  # first, again, graph
    assert found.count("control") == 1
    assert found.count("copies") == 4
    assert found.count("overlapped") == 8
    assert found.count("serial") == 2
    assert NCCL_RIVALS <= set(found)
    assert all(row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"] for row in arms(result))
    assert all((row["ratio_to_eager"] is not None) == row["graph"] for row in arms(result))
    for rival in NCCL_RIVALS:
        assert (one_row(result, rival)["prefetch"], one_row(result, rival)["windows"]) == (1, 2)
    rivals = [row for row in arms(result) if row["ratio_to_overlapped"] is not None]
    assert {row["arm"] for row in rivals} >= NCCL_RIVALS and "overlapped" not in {row["arm"] for row in rivals}
    overlapped = one_row(result, "overlapped", graph=False, prefetch=1, resident="0")
    assert overlapped["windows"] == 2
    assert overlapped["fetched_layers"] > 0
    assert overlapped["ratio_to_bound"] is not None
    assert overlapped["stalled_ns"] is not None


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("placement", ["owner", "striped"])
@pytest.mark.parametrize(
    "devices, transport", [("0,1", "cuda"), ("0,0", "cuda:copy"), ("0,0,0,0", "cuda"), ("0", "cuda")]
)
def test_work_in_any_order_gives_the_same_bits(program, stubs, late, placement, devices, transport):
    env = {**stubs, "STUB_CUBLAS_LATE": str(late)} if late else stubs
    step(
        program, env, devices, "--transport", transport, "--placement", placement, "--graph", "--rivals", "all",
        "--all-compute",
    )  # fmt: skip


def test_each_number_of_tokens_has_a_table(program, stubs):
    result = step(program, stubs, "0,1", "--tokens", "4,1,16")
    assert [table["tokens"] for table in result["tables"]] == [4, 1, 16]
    assert names(result, 1) == names(result, 16)


def test_ranks_on_one_device_read_in_place(program, stubs):
    result = step(program, stubs, "0,0,0,0")
    row = one_row(result, "overlapped")
    assert (row["windows"], row["fetched_layers"]) == (0, 0)
    (series,) = [series for series in result["series"] if series["prefetch"] == 1]
    assert series["counted_bytes_on_device"] == 7 * 32 * 64 * 2  # each layer once
    assert result["config"]["replicated_bytes_on_device"] == 4 * series["counted_bytes_on_device"]
    assert series["call_with_transfer_ns"] is None


def test_calls_with_a_transfer_are_told_from_those_without(program, stubs):
    result = step(program, stubs, "0,1")
    (series,) = [series for series in result["series"] if series["prefetch"] == 0 and series["resident"] == "0"]
    assert series["call_with_transfer_ns"] > 0
    assert series["worst_call_with_transfer_ns"] >= series["call_with_transfer_ns"]
    (control,) = [series for series in result["series"] if series["resident"] == "all"]
    assert control["call_with_transfer_ns"] is None


def test_a_delayed_rank_is_shown_on_pulls_and_on_broadcast(program, stubs):
    result = step(program, stubs, "0,1", "--slow-rank-percent", "50")
    delayed = {row["arm"] for row in arms(result) if row["last_rank_delayed"]}
    assert delayed == {"overlapped", "broadcast"}


def test_the_table_is_printed(program, stubs):
    done = program.run("bench", "step", "--devices", "0,0", *SMALL, "--rivals", "broadcast", env=stubs)
    assert done.returncode == 0, done.stderr
    assert "C overlapped" in done.stdout
    assert "broadcast: not run: NCCL refuses two ranks on one GPU" in done.stdout


def test_a_saved_result_says_where_it_came_from(program, stubs, tmp_path):
    path = tmp_path / "step.json"
    result = step(program, stubs, "0,1", "--save", path)
    saved = json.loads(path.read_text())
    assert saved["result"] == result
    assert saved["command"].startswith("layershard bench step --devices 0,1")
    assert [gpu["name"] for gpu in saved["gpus"]] == ["Stub 0", "Stub 1"]
    assert {"date", "machine", "version"} <= set(saved)


# ---- What ways really do, by the stubs' own counts


@pytest.fixture
def counted(program, stubs, tmp_path):
    """Runs a bench and returns the sums over its ranks of what the stubs have counted."""

    def run(devices, *arguments, late=None):
        tallies = {name: tmp_path / name for name in ("CUBLAS", "NCCL")}
        for path in tallies.values():
            path.write_text("")
        env = {**stubs, **{f"STUB_{name}_TALLY": str(path) for name, path in tallies.items()}}
        step(program, {**env, "STUB_CUBLAS_LATE": late}, devices, "--warm-ms", "1", *arguments)
        total = {}
        for path in tallies.values():
            for line in path.read_text().splitlines():
                for name, count in json.loads(line).items():
                    total[name] = total.get(name, 0) + count
        return total

    return run


PRODUCTS = 2 * 7  # of a pass
LAYER = 32 * 64 * 2  # bytes
COMPARED = 2 * 2 * 4 * 32 * 2  # bytes of the results of two rounds of two ranks


def test_a_way_from_a_graph_asks_for_its_products_once(counted):
    eager = counted("0", "--only", "control")
    graph = counted("0", "--only", "control", "--graph")  # and resident from a graph
    assert graph["asked"] - eager["asked"] == PRODUCTS
    assert graph["done"] - eager["done"] > 100 * PRODUCTS
    assert eager["asked"] == eager["done"]


def test_overlapped_passes_from_a_graph_ask_for_nothing_but_copy_as_much(counted):
    eager = counted("0,1", "--only", "overlapped")
    graph = counted("0,1", "--only", "overlapped", "--graph")
    assert graph["asked"] - eager["asked"] == 2 * 2 * PRODUCTS  # two ranks, resident and overlapped
    passes = (graph["done"] - eager["done"]) / (2 * 2 * PRODUCTS)
    assert passes > 100
    # In a pass 4 layers come to the one rank and 2 to the other, whose third has a window of its own.
    assert abs(passes * 6 * LAYER - (graph["copied"] - eager["copied"])) <= 2 * 7 * LAYER


@pytest.mark.parametrize("late", ["1", "2", "3"])
def test_one_after_the_other_never_computes_beside_a_transfer(counted, late):
    timed_calls = 2 * 9 * PRODUCTS  # nine passes on each rank that time the calls do not wait
    assert counted("0,1", "--only", "serial", late=late)["beside_copies"] <= timed_calls
    assert counted("0,1", "--only", "overlapped", late=late)["beside_copies"] > 4 * timed_calls  # it would be seen


@pytest.mark.parametrize(
    "rival, count, layers",
    [
        ("broadcast", "broadcast", 3 + 4),
        ("allgather", "gathered", 7),  # half of each to both
        ("allgather-ce", "gathered", 7),
        ("peer-copy", "copied", 3 + 4),
    ],
)
def test_rivals_move_all_that_a_rank_does_not_store(counted, rival, count, layers):
    without = counted("0,1", "--only", "control")
    rivals = counted("0,1", "--only", "control", "--rivals", rival)
    moved = rivals[count] - without.get(count, 0)
    passes = (rivals["done"] - without["done"]) / (2 * PRODUCTS)
    assert passes > 100
    # Up to two layers per rank are on their way when the last pass ends; what is compared is copied too.
    assert 0 <= moved - passes * layers * LAYER <= 4 * LAYER + COMPARED


def test_only_names_the_ways(program, stubs):
    assert names(step(program, stubs, "0,1", "--only", "overlapped,serial")) == [
        "resident", "resident", "overlapped", "serial",
    ]  # fmt: skip
    row = one_row(step(program, stubs, "0,1", "--only", "overlapped"), "overlapped")
    assert row["ratio_to_bound"] is None


# ---- What must not pass


def test_a_device_that_drifts_is_inconclusive(program, stubs):
    env = {**stubs, "STUB_CUBLAS_VOID": "1"}
    done = program.run("bench", "step", "--devices", "0,1", *SMALL, env=env)
    assert done.returncode == 3
    assert "VOID" in done.stdout
    assert "inconclusive: with 4 tokens" in done.stderr
    done = program.run("bench", "step", "--devices", "0,1", *SMALL, "--json", env=env)
    first, again = [row for row in arms(json.loads(done.stdout)) if row["arm"] == "resident"]
    assert first["ratio"]["median"] < 1 < again["ratio"]["median"]  # they stand for their mean
    assert first["ratio"]["low"] < first["ratio"]["high"]


def test_a_wrong_byte_that_a_pull_brings_is_noticed(program, stubs):
    text = failed(program, {**stubs, "STUB_CUBLAS_GARBLE": "70"}, "0,1")
    assert "wrong bits" in text


def test_a_wrong_byte_in_a_layer_that_no_compared_pass_reads_is_noticed(program, stubs):
    """The latest moment at which it is noticed at all: after the passes whose results are compared."""
    command = ["bench", "step", "--devices", "0,1", *SMALL, "--layers", "3", "--rounds", "3"]
    noticed, late, text = 1, 1 << 14, ""
    while late - noticed > 1:
        middle = (noticed + late) // 2
        done = program.run(*command, env={**stubs, "STUB_CUBLAS_GARBLE": str(middle)})
        noticed, late = (noticed, middle) if done.returncode == 0 else (middle, late)
        text = done.stderr or text
    assert noticed > 1
    assert "wrong bits: layer" in text


def test_a_wrong_bit_of_a_product_is_noticed(program, stubs):
    text = failed(program, {**stubs, "STUB_CUBLAS_SPOIL": "60"}, "0,1")
    assert "wrong bits: with 4 tokens" in text


def test_a_stack_that_leaves_the_numbers_is_refused(program, stubs):
    """Wrong layers would compute the same infinities."""
    assert "bfloat16" in failed(program, stubs, "0,1", "--layers", "300", "--dims", "32x32")


def test_a_rank_that_dies_ends_the_bench(program, stubs):
    process = program.start("bench", "step", "--devices", "0,0", *MANY, env=stubs)
    wait_until(lambda: len(children_of(process.pid)) == 2, "two ranks")
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    done = program.finish(process)
    assert done.returncode == 1
    assert "rank 1" in done.stderr  # by the signal, or by the library where it was in a call


def test_ranks_do_not_outlive_the_program(program, stubs):
    process = program.start("bench", "step", "--devices", "0,0", *MANY, env=stubs)
    children = wait_until(lambda: len(children_of(process.pid)) == 2 and children_of(process.pid), "two ranks")
    process.kill()
    program.finish(process)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), "their end")

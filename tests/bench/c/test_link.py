# SPDX-License-Identifier: Apache-2.0
"""`layershard-bench link`: options, the shape of the results, and that wrong bits never pass; GPUs by the stub driver.

    LAYERSHARD_TEST_STUB_CUDA   the stub of NVIDIA's driver that the tests build; what needs it is skipped without

How long anything takes is not tested here.
"""

import json
import os
import re

import pytest
from programs import children_of, wait_until

SMALL = ["--min-bytes", "4K", "--max-bytes", "64K", "--factor", "16", "--iters", "3", "--warmup", "1"]
SIZES = {4096, 65536}


@pytest.fixture(scope="module")
def stub():
    path = os.environ.get("LAYERSHARD_TEST_STUB_CUDA")
    if not path:
        pytest.skip("LAYERSHARD_TEST_STUB_CUDA names no stub of the driver: ctest sets it")
    return {"LAYERSHARD_CUDA_SO_PATH": path}


def link(program, *arguments, env=None):
    result = program.json("link", *SMALL, *arguments, env=env)
    assert result["bench"] == "link"
    assert result["bits_checked"] is True
    return result


def fetches(result, placement="whole", readers=False):
    return [row for row in result["rows"] if row["placement"] == placement and row["readers"] is readers]


def ends(rows):
    return {(row["bytes"], row["from"], row["first_to"]) for row in rows}


def check_figures(figures):
    assert 0 < figures["ns"]["min"] <= figures["ns"]["median"] <= figures["ns"]["max"]
    assert figures["alone_ns"] > 0
    assert figures["gigabytes_per_s"] == pytest.approx(figures["moved_bytes"] / figures["ns"]["median"])


# ---- Usage


def test_help(program):
    done = program.run("link", "--help")
    assert done.returncode == 0
    assert "Usage: layershard-bench link" in done.stdout
    assert "Exit status" in done.stdout


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--devices", "0"], "0,0 are two processes"),
        (["--devices", "0,x"], "'x'"),
        (["--devices", ",".join("0" * 9)], "more than 8"),
        (["--devices", "0,1", "--ranks", "2"], "--ranks"),
        (["--devices", "0,1", "--transport", "shm:copy"], "GPU's memory"),
        (["--transport", "cuda:copy"], "--devices"),
        (["--transport", "pigeon"], "pigeon"),
        (["--transport", "local:lockstep"], "no rank can fetch alone"),
        (["--ranks", "1"], "--ranks"),
        (["--ranks", "9"], "--ranks"),
        (["--placement", "round"], "round"),
        (["--placement", "whole,whole"], "twice"),
        (["--placement", ""], "--placement"),
        (["--min-bytes", "100"], "--min-bytes"),
        (["--min-bytes", "1M", "--max-bytes", "4K"], "--min-bytes"),
        (["--max-bytes", "17G"], "--max-bytes"),
        (["--factor", "1"], "--factor"),
        (["--iters", "0"], "--iters"),
        (["--warmup", "0"], "--warmup"),
        (["--rounds", "8"], "--rounds"),
        (["--readers", "2"], "--readers"),
        (["--save", "/no/such/directory/x.json"], "/no/such/directory"),
        (["--save", "/tmp/"], "directory"),
        (["--save", "/tmp"], "directory"),
        (["--save", ""], "directory"),
        (["--no-such-option"], "--no-such-option"),
        (["more"], "more"),
    ],
)
def test_wrong_arguments_are_named(program, arguments, names):
    done = program.run("link", *arguments)
    assert done.returncode == 2
    assert names in done.stderr
    assert done.stdout == ""


def test_a_driver_that_is_missing_is_told(program, tmp_path):
    done = program.run("link", "--devices", "0,1", env={"LAYERSHARD_CUDA_SO_PATH": str(tmp_path / "none.so")})
    assert done.returncode == 1
    assert "none.so" in done.stderr


# ---- Host memory


@pytest.mark.parametrize("transport", ["local", "shm:copy"])
def test_every_pair_and_size(program, transport):
    result = link(program, "--transport", transport, "--ranks", "3")
    rows = fetches(result)
    assert ends(rows) == {(size, a, b) for size in SIZES for a in range(3) for b in range(3) if a != b}
    for row in rows:
        assert row["in_place"] is False
        assert row["fetch"]["moved_bytes"] == row["bare"]["moved_bytes"] == row["bytes"]
        check_figures(row["fetch"])
        check_figures(row["bare"])
        assert row["share"] > 0
    inside = fetches(result, "inside")
    assert ends(inside) == {(size, rank, rank) for size in SIZES for rank in range(3)}
    for row in inside:
        assert "fetch" not in row
        check_figures(row["bare"])


def test_striped_layers_come_from_all_others(program):
    """Of 64 KiB on two ranks half is here already; bare copies move as much as the fetch beside them."""
    rows = fetches(link(program, "--transport", "local", "--placement", "whole,striped"), "striped")
    assert ends(rows) == {(size, -1, rank) for size in SIZES for rank in range(2)}
    for row in rows:
        assert row["fetch"]["moved_bytes"] == row["bare"]["moved_bytes"] == row["bytes"] // 2


@pytest.mark.parametrize("transport", ["local", "shm:copy"])
def test_readers_of_one_source(program, transport):
    result = link(program, "--transport", transport, "--ranks", "3", "--readers", "2", "--placement", "whole,striped")
    for placement, source in (("whole", 0), ("striped", -1)):
        rows = fetches(result, placement, readers=True)
        assert ends(rows) == {(size, source, 1) for size in SIZES}
        assert all(row["to_count"] == 2 for row in rows)
    for row in fetches(result, "whole", readers=True):
        assert row["fetch"]["moved_bytes"] == 2 * row["bytes"]
        assert row["bare"]["moved_bytes"] == 2 * row["bytes"]


def test_nothing_moves_where_ranks_share_memory(program):
    rows = fetches(link(program, "--transport", "shm"))
    assert rows and all(row["in_place"] is True and row["fetch"]["moved_bytes"] == 0 for row in rows)
    assert all(row["share"] is None for row in rows)  # of a copy's speed: there was no copy


def test_table(program):
    done = program.run("link", *SMALL, "--transport", "local", "--placement", "whole,striped")
    assert done.returncode == 0
    for word in ("every byte compared", "bare GB/s", "others", "inside"):
        assert word in done.stdout
    assert "\033" not in done.stdout + done.stderr


@pytest.mark.parametrize("transport", ["faults=r0.wait@*=flip,local", "faults=r1.wait@*=flip,shm:copy"])
def test_a_flipped_bit(program, transport):
    done = program.run("link", *SMALL, "--transport", transport)
    assert done.returncode == 1
    assert "wrong bits" in done.stderr
    assert done.stdout == ""


def test_a_killed_rank_ends_the_bench(program):
    process = program.start("link", "--max-bytes", "1M", "--rounds", "10000")
    children = wait_until(lambda: len(found := children_of(process.pid)) == 2 and found, "two ranks")
    os.kill(children[1], 9)
    done = program.finish(process)
    assert done.returncode == 1
    assert "rank" in done.stderr
    assert done.stdout == ""


def test_ranks_do_not_outlive_the_program(program):
    process = program.start("link", "--max-bytes", "1M", "--rounds", "10000")
    children = wait_until(lambda: len(found := children_of(process.pid)) == 2 and found, "two ranks")
    process.kill()
    program.finish(process)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), "their end")


# ---- Saving


def test_saved_results_say_where_they_come_from(program, tmp_path):
    path = tmp_path / "it's.json"
    printed = link(program, "--transport", "local", "--save", path)
    saved = json.loads(path.read_text())
    assert saved["result"] == printed
    assert next(iter(saved)) == next(iter(printed)) == "schema"
    assert saved["schema"] == "layershard-bench/2" and printed["schema"] == "layershard-bench-link/2"
    assert saved["command"].startswith("layershard-bench link --min-bytes 4K")
    assert "'\\''" in saved["command"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", saved["date"])
    assert saved["version"] in program.run("--version").stdout
    assert saved["machine"]["cores"] >= 1 and saved["machine"]["kernel"].startswith("Linux ")
    assert saved["gpus"] == []


def test_a_file_that_exists_is_replaced(program, tmp_path):
    path = tmp_path / "saved.json"
    path.write_text("x" * 100000)
    done = program.run("link", *SMALL, "--transport", "local", "--save", path)
    assert done.returncode == 0
    assert "every byte compared" in done.stdout  # the table is printed as well
    assert json.loads(path.read_text())["result"]["bench"] == "link"


@pytest.mark.parametrize(
    "bench",
    [
        ["calls", "--max-ns", "1e9"],
        [
            "step",
            "--layers",
            "4",
            "--layer-bytes",
            "4K",
            "--compute-us",
            "100",
            "--passes",
            "1",
            "--margin",
            "100",
            "--ratio",
            "1",
            "--prefetch",
            "1",
        ],
    ],
    ids=["calls", "step"],
)
def test_the_other_benches_save_too(program, tmp_path, bench):
    path = tmp_path / "saved.json"
    done = program.run(*bench, "--json", "--save", path)
    assert done.returncode in (0, 3), done.stderr  # 3: the machine is busy
    saved = json.loads(path.read_text())
    assert saved["result"] == json.loads(done.stdout)
    number = {"calls": 1, "link": 2, "step": 3}[bench[0]]
    assert saved["result"]["schema"] == f"layershard-bench-{bench[0]}/{number}"
    assert saved["command"].startswith(f"layershard-bench {bench[0]} ")


# ---- GPUs, by the stub


def test_gpus_pull(program, stub, tmp_path):
    path = tmp_path / "saved.json"
    result = link(program, "--devices", "0,1", "--save", path, env=stub)
    for row in fetches(result):
        assert row["in_place"] is False
        assert row["fetch"]["moved_bytes"] == row["bare"]["moved_bytes"] == row["bytes"]
    assert [gpu["name"] for gpu in json.loads(path.read_text())["gpus"]] == ["Stub 0", "Stub 1"]
    assert result["transport"].startswith("cuda")


def test_ranks_on_one_gpu_use_layers_in_place(program, stub):
    rows = fetches(link(program, "--devices", "0,0,1", env=stub))
    assert {(row["from"], row["first_to"]) for row in rows if row["in_place"]} == {(0, 1), (1, 0)}
    rows = fetches(link(program, "--devices", "0,0", "--transport", "cuda:copy", env=stub))
    assert rows and not any(row["in_place"] for row in rows)


def test_striped_layers_and_readers_on_gpus(program, stub):
    """A stripe is whole granules of 2 MiB: what is copied beside it is as much."""
    result = link(program, "--devices", "0,1,2", "--placement", "whole,striped", "--readers", "2", env=stub)
    for row in fetches(result, "striped") + fetches(result, "striped", readers=True):
        assert row["in_place"] or row["fetch"]["moved_bytes"] == row["bare"]["moved_bytes"]
    assert len(fetches(result, "whole", readers=True)) == len(SIZES)


def test_large_striped_layers_move_although_each_has_its_own_address(program, stub):
    sizes = ["--min-bytes", "8M", "--max-bytes", "8M"]
    rows = fetches(link(program, "--devices", "0,1", "--placement", "striped", *sizes, env=stub), "striped")
    assert [row["fetch"]["moved_bytes"] for row in rows] == [4 << 20, 4 << 20]
    assert not any(row["in_place"] for row in rows)


def test_a_gpu_that_is_not_there(program, stub):
    done = program.run("link", *SMALL, "--devices", "0,99", env=stub)
    assert done.returncode == 1
    assert "99" in done.stderr


def test_what_hides_gpus_is_named(program, stub):
    done = program.run("link", *SMALL, "--devices", "0,99", env={**stub, "CUDA_VISIBLE_DEVICES": "0,1,2"})
    assert "counted from 0 (CUDA_VISIBLE_DEVICES=0,1,2)" in done.stderr


def test_a_link_below_the_floor_is_shown(program, stub):
    slow = ["--devices", "0,1", "--transport", "cuda:floor=100000"]
    done = program.run("link", *SMALL, *slow, env=stub)
    assert done.returncode == 0
    assert "slow: a fetch goes at" in done.stdout
    assert "rank 0 (Stub 0" in done.stderr and "fetches from rank 1 (Stub 1" in done.stderr
    assert "fetches from" not in program.run("link", *SMALL, "--devices", "0,1", env=stub).stderr


def test_a_mistake_in_the_transport_names_one_rank(program, stub):
    done = program.run("link", *SMALL, "--devices", "0,1", "--transport", "cuda:nope", env=stub)
    assert done.returncode == 1
    assert "cuda has no option 'nope'" in done.stderr and done.stderr.count("rank ") == 1, done.stderr


def test_the_gpus_table_names_them(program, stub):
    done = program.run("link", *SMALL, "--devices", "0,1", env=stub)
    assert done.returncode == 0
    assert "rank 1: GPU 1, Stub 1, 0000:01:00.0" in done.stdout

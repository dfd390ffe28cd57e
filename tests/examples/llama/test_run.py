# SPDX-License-Identifier: Apache-2.0
"""`layershard-llama`: the same tokens whatever the sharding, memory and reads as promised, output as documented."""

import itertools
import json
import os
import pathlib
import pty
import re
import select
import subprocess

import pytest
from patience import LONG_S
from programs import (
    clean_environment,
    cpu_ticks,
    make_model,
    shard_mappings,
    tokens_of,
    two_nodes,
    wait_until,
    wait_until_generating,
)  # fmt: skip

PROMPTS = ["one", "the second prompt is longer", "3", "and a fourth", "fünf"]
PROMPT_OPTIONS = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
RANKS = [1, 2, 3, 4, 7]
PREFETCHES = [0, 1, 2, 5, 29]
PLACEMENTS = ["whole", "striped"]
MODES = {
    "auto": [],
    "shm": ["--transport", "shm"],
    "shm-copy": ["--shm-copy"],
    "local": ["--transport", "local"],
}
RESIDENTS = ["0", "20%", "300K", "66.6%", "100%"]
LAYER_KEYS = {"layers", "layer_bytes"}
RANK_KEYS = {"rank", "pid", "share_bytes", "window_bytes", "private_bytes", "pss_bytes", "read_bytes"}
RANK_KEYS |= {"wait_ns", "total_ns", "shared_hugetlb_bytes", "large_bytes", "numa_copy_bytes"}
PROMPT_KEYS = {"index", "rank", "prompt_tokens", "tokens", "text", "error"}

# Every number of ranks, every prefetch step, placement and mode together; the residents go round, so that each of them
# meets each of the others somewhere.
SHARDINGS = [
    (*sharding, RESIDENTS[i % len(RESIDENTS)])
    for i, sharding in enumerate(itertools.product(MODES, PLACEMENTS, PREFETCHES, RANKS))
]


@pytest.fixture(scope="module")
def expected(program, tiny):
    """One rank that keeps everything, without the library's part in it."""
    result = program.json("--model", tiny, "--ranks", 1, "--replicated", "--max-tokens", 12, *PROMPT_OPTIONS)
    assert all(len(tokens) == 12 for tokens in tokens_of(result)), "the tiny model ended early"
    assert len(set(map(tuple, tokens_of(result)))) == len(PROMPTS)
    return result


@pytest.mark.parametrize("mode,placement", itertools.product(MODES, PLACEMENTS))
def test_same_tokens_for_every_sharding(program, tiny, expected, mode, placement):
    for _, _, prefetch, ranks, resident in [s for s in SHARDINGS if s[:2] == (mode, placement)]:
        options = ["--ranks", ranks, "--prefetch", prefetch, "--resident", resident, "--placement", placement]
        options += MODES[mode]
        result = program.json("--model", tiny, "--max-tokens", 12, *options, *PROMPT_OPTIONS)
        assert tokens_of(result) == tokens_of(expected), options
        assert [p["rank"] for p in result["prompts"]] == [j % ranks for j in range(len(PROMPTS))], options


def test_same_tokens_replicated_and_over_a_slow_link(program, tiny, expected):
    for options in (
        ["--ranks", 3, "--replicated"],
        ["--ranks", 3, "--shm-copy", "--link-gbits", "2"],
        ["--ranks", 20],  # more than layers
        ["--ranks", 2, "--prefetch", 4294967295],
    ):
        result = program.json("--model", tiny, "--max-tokens", 12, *options, *PROMPT_OPTIONS)
        assert tokens_of(result) == tokens_of(expected), options


def test_prompts_from_a_file_and_from_standard_input(program, tiny, expected, tmp_path):
    (tmp_path / "prompts").write_text("\n".join(PROMPTS[1:]) + "\n\n")
    result = program.json(
        "--model",
        tiny,
        "--max-tokens",
        12,
        "--ranks",
        2,
        "--prompt",
        PROMPTS[0],
        "--prompts",
        tmp_path / "prompts",
    )
    assert tokens_of(result) == tokens_of(expected)
    done = program.run("--model", tiny, "--max-tokens", 3, "--prompts", "-", "--ranks", 2, input=b"only one\r\n")
    assert done.returncode == 0 and "only one" in done.stdout
    assert "[prompt 1" not in done.stdout and "\r" not in done.stdout


# ---- Output ----------------------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys(program, tiny, expected):
    result = program.json("--model", tiny, "--ranks", 3, "--max-tokens", 12, *PROMPT_OPTIONS)
    assert list(result) == ["schema", "ranks", "prompts", "model", "config"]
    assert result["schema"] == "layershard-llama/1"
    assert set(result["model"]) == LAYER_KEYS
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1, 2]
    assert len({rank["pid"] for rank in result["ranks"]}) == 3
    for rank in result["ranks"]:
        assert set(rank) == RANK_KEYS | {"tokens_per_s"}
        assert rank["total_ns"] > 0 and rank["wait_ns"] <= rank["total_ns"] and rank["tokens_per_s"] > 0
    for index, prompt in enumerate(result["prompts"]):
        assert set(prompt) == PROMPT_KEYS
        assert prompt["index"] == index and prompt["error"] is None and prompt["prompt_tokens"]
    whole = result["model"]["layers"] * result["model"]["layer_bytes"]
    assert sum(rank["share_bytes"] for rank in result["ranks"]) == whole
    assert all(rank["window_bytes"] == 0 for rank in result["ranks"]), "nothing needs a window where pages are shared"


def test_what_was_asked_for_is_told_again(program, tiny):
    config = program.json("--model", tiny, "--prompt", "a")["config"]
    assert (config["ranks"], config["max_tokens"], config["prefetch"], config["resident_bytes"]) == (4, 64, 1, 0)
    assert config["placement"] == "whole" and config["link_gbits"] is None and config["shm_copy"] is False
    options = ["--ranks", 2, "--prefetch", 3, "--resident", "300K", "--placement", "striped", "--max-tokens", 1]
    config = program.json("--model", tiny, *options, "--shm-copy", "--link-gbits", 4)["config"]
    assert (config["ranks"], config["max_tokens"], config["prefetch"]) == (2, 1, 3)
    assert config["resident_bytes"] == 300 * 1024
    assert config["placement"] == "striped" and config["link_gbits"] == 4 and config["shm_copy"] is True
    assert config["transport"] == "throttle=500000000,shm:copy"


def test_wrappers_stay_with_the_copying_transport(program, tiny, tmp_path):
    spec = f"trace={tmp_path}/x.json,shm"
    result = program.json("--model", tiny, "--ranks", 2, "--max-tokens", 1, "--transport", spec, "--shm-copy")
    assert result["config"]["transport"] == spec + ":copy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.0.json", "x.1.json"]


def test_a_slow_link_takes_its_time_and_ranks_wait_for_it(program, tiny):
    """One prompt, eight passes, and every pass brings what the rank does not store; one window may be full before."""
    options = ["--ranks", 2, "--prefetch", 0, "--max-tokens", 8, "--prompt", "a", "--shm-copy", "--link-gbits", 0.1]
    result = program.json("--model", tiny, *options)
    rank, model = result["ranks"][0], result["model"]
    passes = len(result["prompts"][0]["tokens"])
    bytes_ = passes * (model["layers"] * model["layer_bytes"] - rank["share_bytes"]) - model["layer_bytes"]
    link_ns = bytes_ * 8 / 0.1
    assert rank["total_ns"] >= 0.95 * link_ns
    assert 0.5 * link_ns <= rank["wait_ns"] <= rank["total_ns"]
    assert rank["tokens_per_s"] == pytest.approx(passes * 1e9 / rank["total_ns"])
    cells = table_of(program.run("--model", tiny, *options).stdout)["0"]
    assert cells[6].endswith("%") and float(cells[6][:-1]) > 50, "waiting"


def table_of(output):
    """Rows by their first cell."""
    rows = re.findall(r"^(\d|all|replicated) {2,}(\S.*)$", output, re.MULTILINE)
    return {name: [cell.replace(" ", "") for cell in re.split(" {2,}", cells)] for name, cells in rows}


@pytest.mark.parametrize("resident,share", [("0", 0), ("50%", 0.5), ("100%", 1)])
def test_the_table_says_what_the_json_says(program, tiny, resident, share):
    """Stored, windows, residents and reads are the same in every run."""
    options = ["--model", tiny, "--ranks", 2, "--max-tokens", 2, "--shm-copy", "--resident", resident]
    result = program.json(*options)
    table = table_of(program.run(*options).stdout)
    whole = result["model"]["layers"] * result["model"]["layer_bytes"]
    for rank in result["ranks"]:
        stored, windows, residents, private, proportional, read = (float(cell) for cell in table[str(rank["rank"])][:6])
        for cell, key in ((stored, "share_bytes"), (windows, "window_bytes"), (read, "read_bytes")):
            assert cell == pytest.approx(rank[key] / 2**20, abs=0.051), key
        assert residents == pytest.approx(share * (whole - rank["share_bytes"]) / 2**20, abs=0.051)
        assert (windows == 0) == (share == 1)
        assert private == pytest.approx(rank["private_bytes"] / 2**20, abs=2)
        assert proportional == pytest.approx(rank["pss_bytes"] / 2**20, abs=2)
        assert rank["large_bytes"] >= rank["shared_hugetlb_bytes"] >= 0
    computed = table["replicated"]
    assert float(computed[0]) == pytest.approx(2 * whole / 2**20, abs=0.051)
    assert computed[1:4] == ["0.0", "0.0", "-"]
    replicated = program.json(*options[:6], "--replicated")
    assert float(computed[5]) == pytest.approx(sum(r["read_bytes"] for r in replicated["ranks"]) / 2**20, abs=0.051)


def test_a_rank_computes_with_one_thread_unless_told_otherwise(program, tiny, sanitized, tmp_path):
    if sanitized:
        pytest.skip("a sanitizer has threads of its own")
    larger = make_model(tmp_path, "--layers", "4", "--hidden", "256", "--types", "F32")
    (tmp_path / "prompts").write_text("".join(f"prompt {j} is long enough for threads\n" for j in range(200)))
    process = program.start(
        "--model", larger, "--ranks", 2, "--prompts", tmp_path / "prompts", "--max-tokens", 200,
        env={"OPENBLAS_NUM_THREADS": None},
    )  # fmt: skip
    children = wait_until_generating(process, 2)
    tasks = {pid: [int(path.name) for path in pathlib.Path(f"/proc/{pid}/task").iterdir()] for pid in children}

    def spent():
        """By the ranks themselves, and by whatever other threads they have: OpenBLAS keeps some that have no work."""
        return [sum(cpu_ticks(f"{pid}/task/{pid}") for pid in children)] + [
            cpu_ticks(f"{pid}/task/{task}") for pid in children for task in tasks[pid] if task != pid
        ]

    start = spent()
    wait_until(lambda: spent()[0] > start[0] + 20, "threads that had just been started have gone to sleep")
    before = spent()
    wait_until(lambda: spent()[0] > before[0] + 20, "the ranks compute")
    others = [now - then for now, then in zip(spent()[1:], before[1:])]
    process.kill()
    program.finish(process)
    assert sum(others) <= 2


def test_windows_are_as_many_as_promised(program, tiny):
    """At most k + 1, and no more than blocks of equal length need."""
    for ranks, prefetch in itertools.product((2, 3), (0, 1, 3, 29)):
        result = program.json(
            "--model",
            tiny,
            "--ranks",
            ranks,
            "--prefetch",
            prefetch,
            "--shm-copy",
            "--max-tokens",
            2,
            "--prompt",
            "a",
        )
        layers, layer_bytes = result["model"]["layers"], result["model"]["layer_bytes"]
        for rank in result["ranks"]:
            remote = layers - rank["share_bytes"] // layer_bytes
            blocks = -(-remote // min(prefetch + 1, remote))
            assert rank["window_bytes"] == -(-remote // blocks) * layer_bytes, (ranks, prefetch)


def test_threads_of_one_process_report_its_memory_once(program, tiny):
    result = program.json("--model", tiny, "--ranks", 3, "--transport", "local", "--max-tokens", 2)
    assert result["ranks"][0]["pss_bytes"] > 0 and result["ranks"][0]["private_bytes"] > 0
    assert all(rank["pss_bytes"] is None and rank["private_bytes"] is None for rank in result["ranks"][1:])
    done = program.run("--model", tiny, "--ranks", 3, "--transport", "local", "--max-tokens", 2)
    assert "threads of one process" in done.stdout


def test_text_comes_in_order_and_the_table_adds_up(program, tiny):
    done = program.run("--model", tiny, "--ranks", 4, "--max-tokens", 5, *PROMPT_OPTIONS)
    assert done.returncode == 0 and done.stderr == "" and "\033" not in done.stdout
    places = [done.stdout.index(f"[prompt {j}, rank {j % 4}] {prompt}") for j, prompt in enumerate(PROMPTS)]
    assert places == sorted(places)
    rows = re.findall(r"^(\d|all|replicated) +([\d.]+) ", done.stdout, re.MULTILINE)
    stored = {name: float(value) for name, value in rows}
    assert set(stored) == {"0", "1", "2", "3", "all", "replicated"}
    assert abs(sum(stored[str(rank)] for rank in range(4)) - stored["all"]) < 0.3
    assert abs(stored["replicated"] - 4 * stored["all"]) < 0.3
    assert "4 ranks hold the sharded layers once" in done.stdout


def read_terminal(program, arguments):
    """Standard output and error as a terminal of 80 columns would get them."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [program.path, *arguments], stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, close_fds=True,
        env=clean_environment({"TERM": "xterm"}),
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while select.select([master], [], [], LONG_S)[0]:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    return process.wait(LONG_S), shown.decode(errors="replace")


def test_terminal_gets_progress_and_one_text_at_a_time(program, tiny):
    code, shown = read_terminal(
        program,
        ["--model", tiny, "--ranks", "2", "--max-tokens", "40", "--prompt", "first", "--prompt", "second"],
    )
    assert code == 0
    assert "loading: " in shown and "\033[1mfirst" in shown
    first, second = shown.index("\033[1mfirst"), shown.index("\033[1msecond")
    assert first < second < shown.index("tok/s")
    assert "loading: " not in shown[first:]
    controls = set(re.findall(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", re.sub(r"\033\[[0-9;]*[mK]", "", shown)))
    assert not controls, "the model's control characters reach the terminal"


# ---- Memory and reads ------------------------------------------------------------------------------------------------


def test_four_ranks_hold_the_layers_once(program, real):
    """What four ranks hold is one copy of the layers and four times the rest."""
    one = program.json("--model", real, "--ranks", 1, "--max-tokens", 4, "--prompt", "The capital of France is")
    four = program.json("--model", real, "--ranks", 4, "--max-tokens", 4, "--transport", "shm")
    series = one["model"]["layers"] * one["model"]["layer_bytes"]
    rest = one["ranks"][0]["pss_bytes"] - series
    assert 0 < rest < series
    together = sum(rank["pss_bytes"] + rank["shared_hugetlb_bytes"] // 4 for rank in four["ranks"])
    assert together < series + 4 * rest + one["model"]["layer_bytes"]
    assert together > series


def test_large_pages_are_told(program, tmp_path):
    """What a rank maps of the layers, its own and the others'; where there are no large pages the library says so."""
    model = make_model(tmp_path, "--layers", "4", "--hidden", "512", "--feed-forward", "2048", "--types", "Q4_1")
    large, told = {}, {}
    for pages in ("never", "auto"):
        done = program.run(
            "--model", model, "--ranks", 2, "--max-tokens", 2, "--transport", "shm", "--json",
            env={"LAYERSHARD_LARGE_PAGES": pages, "LAYERSHARD_LOG": "info"},
        )  # fmt: skip
        result = json.loads(done.stdout)
        large[pages] = min(rank["large_bytes"] for rank in result["ranks"])
        told[pages] = "small pages" in done.stderr
    series = result["model"]["layers"] * result["model"]["layer_bytes"]
    assert told["auto"] or large["auto"] - large["never"] > 0.8 * series, (large, series)
    done = program.run("--model", model, "--ranks", 2, "--max-tokens", 2, "--transport", "shm")
    (least,) = re.findall(r"^In large pages: ([\d.]+)(?: to [\d.]+)? MiB of what each process maps", done.stdout, re.M)
    assert told["auto"] or float(least) * 2**20 > 0.8 * series


def test_copies_for_another_node_are_told(program, tmp_path):
    """Two ranks on a machine of two nodes that is feigned: each has copied what the other stores."""
    options = ["--model", make_model(tmp_path), "--ranks", 2, "--max-tokens", 4, "--transport", "shm"]
    env = {**two_nodes(tmp_path / "turns"), "LAYERSHARD_NUMA": "copy"}
    result = program.json(*options, env=env)
    series = result["model"]["layers"] * result["model"]["layer_bytes"]
    assert sum(rank["numa_copy_bytes"] for rank in result["ranks"]) == series
    plain = program.json(*options)
    assert all(rank["numa_copy_bytes"] == 0 for rank in plain["ranks"])
    assert [each["tokens"] for each in result["prompts"]] == [each["tokens"] for each in plain["prompts"]]
    assert "MiB of copies for other NUMA nodes" in " ".join(program.run(*options, env=env).stdout.split())


def whole_pages(count):
    page = os.sysconf("SC_PAGESIZE")
    return -(-count // page) * page


@pytest.mark.parametrize(
    "options",
    [[], ["--shm-copy"], ["--shm-copy", "--placement", "striped"], ["--shm-copy", "--prefetch", "3"]],
    ids=str,
)
def test_shares_and_windows_are_named_mappings(program, tiny, tmp_path, options):
    (tmp_path / "prompts").write_text("".join(f"prompt {j}\n" for j in range(60)))
    process = program.start(
        "--model", tiny, "--ranks", 3, "--prompts", tmp_path / "prompts", "--max-tokens", 400, *options, "--json"
    )
    children = wait_until_generating(process, 3)
    mappings = [shard_mappings(pid) for pid in children]
    assert process.poll() is None
    process.kill()
    program.finish(process)
    result = program.json("--model", tiny, "--ranks", 3, "--max-tokens", 2, *options)
    for rank, found in zip(result["ranks"], mappings):
        own = {
            kind: sum(size for size, mode, name in found if kind in name and "w" in mode)
            for kind in (":shard", ":windows")
        }
        assert own[":shard"] == whole_pages(rank["share_bytes"])
        assert own[":windows"] == whole_pages(rank["window_bytes"])
        foreign = [mode for size, mode, name in found if "w" not in mode]
        assert foreign and all(mode.startswith("r--") for mode in foreign), "others' shards are mapped, to read only"


def test_a_rank_reads_its_own_layers_and_what_is_not_sharded(program, real):
    """Reads are linear in the number of own layers: the slope is a layer in the file, the rest once on each rank."""
    one, four = (program.json("--model", real, "--ranks", ranks, "--max-tokens", 1) for ranks in (1, 4))
    layers = one["model"]["layers"]
    everything = one["ranks"][0]["read_bytes"]
    assert everything == pytest.approx(os.path.getsize(real), rel=0.03)
    own = [rank["share_bytes"] // one["model"]["layer_bytes"] for rank in four["ranks"]]
    assert own == [8, 8, 7, 7]
    reads = [rank["read_bytes"] for rank in four["ranks"]]
    layer_in_file = (reads[0] - reads[3]) / (own[0] - own[3])
    rest = everything - layers * layer_in_file
    for count, read in zip(own, reads):
        assert read == pytest.approx(rest + count * layer_in_file, rel=0.02)
    assert sum(reads) == pytest.approx(everything + 3 * rest, rel=0.02)


def test_the_kernel_counts_the_same_reads(program, tiny, sanitized, tmp_path):
    """/proc/PID/io counts everything that a rank's process has read."""
    if sanitized:
        pytest.skip("a sanitizer reads files of its own")
    larger = make_model(tmp_path, "--layers", "12", "--hidden", "256", "--types", "F32")
    (tmp_path / "prompts").write_text("".join(f"prompt {j}\n" for j in range(200)))
    options = ["--model", larger, "--ranks", 3, "--prompts", tmp_path / "prompts", "--max-tokens", 200, "--json"]
    process = program.start(*options)
    children = wait_until_generating(process, 3)
    kernel = []
    for pid in children:
        counted = dict(line.split(": ") for line in pathlib.Path(f"/proc/{pid}/io").read_text().splitlines())
        kernel.append(int(counted["rchar"]))
    process.kill()
    program.finish(process)
    result = program.json("--model", larger, "--ranks", 3, "--max-tokens", 1)
    for counted, rank in zip(kernel, result["ranks"]):
        assert counted == pytest.approx(rank["read_bytes"], rel=0.02)


# ---- The real model --------------------------------------------------------------------------------------------------


def agrees(tokens, case):
    """Equal up to the end of text, or to a place where two tokens were equally good for the reference too."""
    for ours, theirs, gap in zip(tokens, case["tokens"], case["gaps"]):
        if ours != theirs:
            return gap <= 1e-4
    return True


@pytest.mark.parametrize(
    "options",
    [
        ["--ranks", 1],
        ["--ranks", 4, "--max-tokens", 32],
        ["--ranks", 4, "--replicated"],
        ["--ranks", 3, "--shm-copy", "--prefetch", 2, "--resident", "33%"],
        ["--ranks", 2, "--placement", "striped"],
        ["--ranks", 7, "--placement", "striped", "--shm-copy", "--prefetch", 0],
        ["--ranks", 3, "--transport", "local", "--prefetch", 29],
    ],
    ids=lambda options: "-".join(map(str, options)).replace("--", ""),
)
def test_real_model_says_what_the_reference_says(program, real, fixture_cases, options):
    cases = fixture_cases if options == ["--ranks", 4, "--max-tokens", 32] else fixture_cases[:3]
    prompts = [word for case in cases for word in ("--prompt", case["prompt"])]
    result = program.json("--model", real, "--max-tokens", 16, *options, *prompts)
    for case, prompt in zip(cases, result["prompts"]):
        assert prompt["prompt_tokens"] == case["prompt_tokens"], case["prompt"]
        assert prompt["tokens"] and agrees(prompt["tokens"], case), case["prompt"]
        ended = len(prompt["tokens"]) == result["config"]["max_tokens"] or prompt["tokens"][-1] == 2
        assert ended, "neither by the limit nor by end of text"


def test_a_model_may_ask_for_a_first_token_and_have_its_own_output(program, tiny, expected, tmp_path):
    """The same seed, so that nothing else differs."""
    first = program.json(
        "--model", make_model(tmp_path, "--bos"), "--ranks", 2, "--max-tokens", 12, *PROMPT_OPTIONS
    )  # fmt: skip
    assert [p["prompt_tokens"] for p in first["prompts"]] == [[1, *p["prompt_tokens"]] for p in expected["prompts"]]
    assert tokens_of(first) != tokens_of(expected)
    untied = [tmp_path / "untied.gguf", tmp_path / "zero.gguf"]
    os.rename(make_model(tmp_path, "--untied", "--types", "F32"), untied[0])
    whole = untied[0].read_bytes()
    vocabulary = 275 * 64 * 4  # bytes of the embedding, the file's first tensor, and of the output, its second
    layers = 8 * (2 * 64 + 64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64) * 4
    start = len(whole) - 64 * 4 - layers - vocabulary
    untied[1].write_bytes(whole[:start] + bytes(vocabulary) + whole[start + vocabulary :])
    options = ["--ranks", 2, "--max-tokens", 5, "--prompt", "a"]
    used, zero = (program.json("--model", model, *options) for model in untied)
    assert tokens_of(used) != [[0] * 5]
    assert tokens_of(zero) == [[0] * 5], "all are equally good: the lowest"


def test_without_a_model_option_the_variable_is_used(program, tiny, expected):
    result = program.json("--max-tokens", 12, "--ranks", 2, *PROMPT_OPTIONS, env={"LAYERSHARD_MODEL": tiny})
    assert tokens_of(result) == tokens_of(expected)

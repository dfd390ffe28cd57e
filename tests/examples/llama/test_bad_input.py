# SPDX-License-Identifier: Apache-2.0
"""Wrong options, models and companions: a message that names what is wrong, the documented exit status."""

import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess

import pytest
from programs import (
    BAD_MODEL,
    FAILED,
    USAGE,
    cpu_ticks,
    refused,
    shard_mappings,
    takes_closed_descriptors,
    tells_that_the_disk_is_full,
    tokens_of,
    wait_until,
)  # fmt: skip

# ---- Options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,words",
    [
        (["--ranks", "0"], ["--ranks", "'0'", "1 to"]),
        (["--ranks", "-1"], ["--ranks", "'-1'"]),
        (["--ranks", "four"], ["--ranks", "'four'"]),
        (["--ranks", "3x"], ["--ranks", "'3x'"]),
        (["--ranks", "99999999999999999999"], ["--ranks"]),
        (["--ranks"], ["'--ranks'", "value"]),
        (["--max-tokens", "0"], ["--max-tokens"]),
        (["--prefetch", "-1"], ["--prefetch", "'-1'"]),
        (["--prefetch", "4294967296"], ["--prefetch"]),
        (["--placement", "scattered"], ["--placement", "'scattered'", "whole", "striped"]),
        (["--resident", "101%"], ["--resident", "'101%'", "at most 100%"]),
        (["--resident", "lots"], ["--resident", "'lots'"]),
        (["--resident", "-5M"], ["--resident"]),
        (["--transport", "carrier-pigeon"], ["--transport", "'carrier-pigeon'", "auto", "shm", "local"]),
        (["--transport", "cuda"], ["--transport", "'cuda'", "GPU's memory", "processor"]),
        (["--transport", "local", "--shm-copy"], ["--shm-copy", "'local'"]),
        (["--link-gbits", "10"], ["--link-gbits", "--shm-copy"]),
        (["--shm-copy", "--link-gbits", "0"], ["--link-gbits", "'0'"]),
        (["--shm-copy", "--link-gbits", "nan"], ["--link-gbits", "'nan'"]),
        (["--prompt", ""], ["--prompt"]),
        (["--prompts", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["--shm-copy", "--link-gbits", "1e-9"], ["--link-gbits", "'1e-9'"]),
        (["--shm-copy", "--link-gbits", "1e200"], ["--link-gbits", "'1e200'"]),
        (["--shm-copy", "--transport", "shm:bogus"], ["--shm-copy", "'shm:bogus'"]),
        (["--transport", "shm:bogus"], ["'bogus'"]),
        (["--transport", "throttle=abc,shm:copy"], ["throttle", "'abc'"]),
        (["--transport", "local:lockstep"], ["'local:lockstep'", "in step"]),
        (["--frobnicate"], ["'--frobnicate'"]),
        (["--ranks", "2", "-abc"], ["'-a'"]),
        (["--json=3"], ["'--json=3'", "no value"]),
        (["Hello"], ["'Hello'", "--prompt"]),
        (["--verify", "--prompt", "a"], ["--verify", "prompts"]),
        (["--verify", "--max-tokens", "3"], ["--verify", "--max-tokens"]),
        (["--verify", "--replicated"], ["--verify", "--replicated"]),
        (["--verify", "Hello"], ["'Hello'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_options_are_named(program, tiny, options, words):
    done = program.run("--model", tiny, *options)
    refused(done, USAGE, *words)
    assert "of this command" not in done.stderr  # the program has none


def test_wrong_environment_is_named(program, tiny):
    run = ["--model", tiny]
    refused(program.run(*run, env={"LAYERSHARD_TRANSPORT": "pigeon"}), USAGE, "LAYERSHARD_TRANSPORT", "'pigeon'")
    refused(program.run(*run, env={"LAYERSHARD_LOG": "loud"}), USAGE, "LAYERSHARD_LOG", "'loud'", "debug")
    refused(program.run(*run, env={"LAYERSHARD_RANK": "1"}), USAGE, "LAYERSHARD_SIZE", "--ranks")
    refused(program.run(*run, env={"LAYERSHARD_TIMEOUT_MS": "abc"}), USAGE, "LAYERSHARD_TIMEOUT_MS", "'abc'")
    refused(program.run(*run, env={"LAYERSHARD_TRANSPORT": "local:lockstep"}), USAGE, "'local:lockstep'")


def test_one_failure_of_all_ranks_is_told_once(program, tiny):
    done = program.run("--verify", "--model", tiny, "--ranks", 3, "--transport", "throttle=abc,shm:copy")
    refused(done, USAGE, "throttle")
    assert done.stderr.count("throttle: 'abc'") == 1 and "rank 1: rank 0" not in done.stderr


def test_prompts_that_hold_nothing(program, tiny, tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    refused(program.run("--model", tiny, "--prompts", tmp_path / "empty"), USAGE, str(tmp_path / "empty"))
    (tmp_path / "zero").write_bytes(b"a\0b\n")
    done = program.run("--model", tiny, "--prompts", tmp_path / "zero")
    refused(done, USAGE, str(tmp_path / "zero"), "zero byte")


def test_one_bad_prompt_spares_the_others(program, tiny):
    good = program.json("--model", tiny, "--ranks", 2, "--max-tokens", 4, "--prompt", "a", "--prompt", "b")
    done = program.run(
        "--model",
        tiny,
        "--ranks",
        2,
        "--max-tokens",
        4,
        "--prompt",
        "a",
        "--prompt",
        "x" * 5000,
        "--prompt",
        "b",
    )
    refused(done, FAILED, "prompt 1 was not finished", "context")
    assert good["prompts"][0]["text"] in done.stdout
    assert "[prompt 2, rank 0] b" in done.stdout


def test_a_prompt_too_long_for_a_message_is_a_failure(program, tiny, tmp_path):
    (tmp_path / "prompts").write_text("z " * 2_200_000 + "\nshort\n")
    done = program.run("--model", tiny, "--ranks", 2, "--prompts", tmp_path / "prompts", "--max-tokens", 2)
    refused(done, FAILED, "prompt 0 was not finished: 4400000 prompt tokens", "context of 512")
    assert "[prompt 1, rank 1] short" in done.stdout


def test_closed_descriptors(program, tiny):
    takes_closed_descriptors(program, "--max-tokens", "1", "--model", tiny)


@pytest.mark.parametrize("options", [[], ["--json"], ["--verify"], ["--verify", "--json"]], ids=" ".join)
def test_output_that_cannot_be_written(program, tiny, options):
    tells_that_the_disk_is_full(program, *options, "--model", tiny, "--ranks", "2")


@pytest.mark.parametrize("options", [["--help"], ["--version"]], ids=" ".join)
def test_words_that_cannot_be_written(program, options):
    tells_that_the_disk_is_full(program, *options)


@pytest.mark.parametrize("mode", [[], ["--verify"]], ids=["prompts", "verify"])
def test_a_trace_that_cannot_be_written(program, tiny, mode):
    arguments = (*mode, "--model", tiny, "--ranks", 1, "--transport", "trace=/dev/full,local")
    done = program.run(*arguments)
    assert done.returncode == FAILED
    assert "trace: rank 0 could not write all of '/dev/full'" in done.stderr
    assert "No space left on device" in done.stderr


@pytest.fixture
def full_disk(tmp_path):
    """A disk of one page, which is taken."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted: {mounted.stderr.decode().strip()}")
    (tmp_path / "taken").write_bytes(bytes(4096))
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_traces_on_a_full_disk(program, tiny, full_disk):
    spec = f"trace={full_disk}/run.json,shm"
    done = program.run("--model", tiny, "--ranks", 2, "--max-tokens", 1, "--transport", spec)
    assert done.returncode == FAILED
    assert "could not write all of" in done.stderr and "No space left on device" in done.stderr


# ---- Models ----------------------------------------------------------------------------------------------------------


def test_no_model_says_how_to_get_one(program, tmp_path):
    done = program.run(env={"LAYERSHARD_CACHE": str(tmp_path)})
    refused(done, BAD_MODEL, str(tmp_path), "make demo", "scripts/fetch_model.sh", "--model")


@pytest.mark.parametrize("mode", [[], ["--verify"]], ids=["prompts", "verify"])
def test_a_model_that_is_no_model(program, tmp_path, mode):
    refused(program.run(*mode, "--model", "/no/such.gguf"), BAD_MODEL, "/no/such.gguf", "No such file")
    refused(program.run(*mode, "--model", tmp_path), BAD_MODEL, str(tmp_path))
    (tmp_path / "text").write_text("This is not a model.\n" * 1000)
    refused(program.run(*mode, "--model", tmp_path / "text"), BAD_MODEL, str(tmp_path / "text"))
    (tmp_path / "empty").touch()
    refused(program.run(*mode, "--model", tmp_path / "empty"), BAD_MODEL, str(tmp_path / "empty"))


def test_a_model_cut_short_at_every_percent(program, tiny, tmp_path):
    whole = pathlib.Path(tiny).read_bytes()
    cut = tmp_path / "cut.gguf"
    for percent in range(100):
        cut.write_bytes(whole[: len(whole) * percent // 100])
        refused(program.run("--model", cut, "--ranks", 2, "--max-tokens", 1), BAD_MODEL, str(cut))


def test_another_architecture(program, tiny, tmp_path):
    changed = tmp_path / "gemma.gguf"
    llama = b"\x05\0\0\0\0\0\0\0llama"
    whole = pathlib.Path(tiny).read_bytes()
    assert whole.count(llama) == 1
    changed.write_bytes(whole.replace(llama, b"\x05\0\0\0\0\0\0\0gemma"))
    refused(program.run("--model", changed), BAD_MODEL, str(changed), "'gemma'", "'llama'")


U16, U32, I32, F32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9
PACKED = {U16: "<H", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}


def text_of(value):
    return struct.pack("<Q", len(value)) + value.encode()


def key_of(name, kind, value):
    if kind == ARRAY:
        return text_of(name) + struct.pack("<IIQ", ARRAY, U32, len(value)) + struct.pack(f"<{len(value)}I", *value)
    packed = text_of(value) if kind == STRING else struct.pack(PACKED[kind], value)
    return text_of(name) + struct.pack("<I", kind) + packed


def with_keys(model, path, *keys):
    """A copy with further keys in front of the others. What follows is aligned: so the keys are filled up."""
    whole = pathlib.Path(model).read_bytes()
    tensors, count = struct.unpack_from("<QQ", whole, 8)
    added = b"".join(key_of(*key) for key in keys)
    added += key_of("general.filler", STRING, "x" * (-(len(added) + len(key_of("general.filler", STRING, ""))) % 32))
    path.write_bytes(whole[:8] + struct.pack("<QQ", tensors, count + len(keys) + 1) + added + whole[24:])
    return path


def without_key(model, path, name):
    """A copy in which the key has another name of the same length, which means nothing."""
    whole, old = pathlib.Path(model).read_bytes(), text_of(name)
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, text_of("x" * len(name))))
    return path


UNSUPPORTED = {
    "split": ([("split.count", U16, 3)], ["'split.count'", "3", "one file"]),
    "adapter": ([("general.type", STRING, "adapter")], ["'general.type'", "'adapter'", "'model'"]),
    "projector": ([("general.type", STRING, "mmproj")], ["'general.type'", "'mmproj'"]),
    "yarn": ([("llama.rope.scaling.type", STRING, "yarn")], ["'llama.rope.scaling.type'", "'yarn'"]),
    "longrope": ([("llama.rope.scaling.type", STRING, "longrope")], ["'llama.rope.scaling.type'", "'longrope'"]),
    "factor alone": ([("llama.rope.scaling.factor", F32, 4.0)], ["'llama.rope.scaling.factor'", "4", "positions"]),
    "linear": (
        [("llama.rope.scaling.type", STRING, "linear"), ("llama.rope.scaling.factor", F32, 2.0)],
        ["'llama.rope.scaling.factor'", "2"],
    ),
    "old factor": ([("llama.rope.scale_linear", F32, 8.0)], ["'llama.rope.scale_linear'", "8"]),
    "attention factor": ([("llama.rope.scaling.attn_factor", F32, 1.5)], ["'llama.rope.scaling.attn_factor'"]),
    "experts": ([("llama.expert_count", U32, 8)], ["'llama.expert_count'", "8"]),
    "sliding window": ([("llama.attention.sliding_window", U32, 4096)], ["'llama.attention.sliding_window'", "4096"]),
    "both directions": ([("llama.attention.causal", BOOL, False)], ["'llama.attention.causal'"]),
    "embeddings": ([("llama.pooling_type", U32, 1)], ["'llama.pooling_type'"]),
    "heads of other lengths": ([("llama.attention.value_length", U32, 8)], ["heads", "of one size"]),
    "sizes that differ by layer": ([("llama.attention.key_length", ARRAY, [16] * 8)], ["array", "key_length"]),
    "a key of tomorrow": ([("llama.attention.sinks", U32, 1)], ["'llama.attention.sinks'", "not understood"]),
    "an end behind each prompt": ([("tokenizer.ggml.add_eos_token", BOOL, True)], ["'tokenizer.ggml.add_eos_token'"]),
}


@pytest.mark.parametrize("mode", [[], ["--verify"]], ids=["prompts", "verify"])
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_models_of_another_kind_are_refused_once(program, tiny, tmp_path, case, mode):
    keys, words = UNSUPPORTED[case]
    model = with_keys(tiny, tmp_path / "changed.gguf", *keys)
    done = program.run(*mode, "--model", model, "--ranks", 3)
    refused(done, BAD_MODEL, str(model), *words)
    assert done.stderr.count("\n") == 1 and "rank" not in done.stderr.replace(str(model), ""), done.stderr


@pytest.mark.parametrize("change", [("gpt2", "bert"), ("smollm", "llama3"), ("smollm", "qwen2 ")])
def test_other_tokenizers_are_refused_once(program, tiny, tmp_path, change):
    whole = pathlib.Path(tiny).read_bytes()
    old, new = (text_of(word) for word in change)
    assert whole.count(old) == 1
    model = tmp_path / "changed.gguf"
    model.write_bytes(whole.replace(old, new))
    for mode in ([], ["--verify"]):
        done = program.run(*mode, "--model", model, "--ranks", 3)
        refused(done, BAD_MODEL, str(model), "'tokenizer.ggml.", f"'{change[1]}'", f"'{change[0]}'")
        assert done.stderr.count("\n") == 1 and "rank" not in done.stderr


@pytest.mark.parametrize("mode", [[], ["--verify"]], ids=["prompts", "verify"])
def test_a_model_of_before_pre_tokenizers_is_another_one(program, tiny, tmp_path, mode):
    """Nothing is damaged in it, but llama.cpp would split text in another way than is supported here."""
    model = without_key(tiny, tmp_path / "changed.gguf", "tokenizer.ggml.pre")
    done = program.run(*mode, "--model", model, "--ranks", 3)
    refused(done, BAD_MODEL, str(model), "'tokenizer.ggml.pre'", "missing", "'default'", "'smollm'", "convert it again")
    assert done.stderr.count("\n") == 1 and "rank" not in done.stderr


@pytest.mark.parametrize("name", ["tokenizer.ggml.model", "tokenizer.ggml.merges"])
def test_models_without_a_tokenizer_are_refused_once(program, tiny, tmp_path, name):
    done = program.run("--model", without_key(tiny, tmp_path / "changed.gguf", name), "--ranks", 3)
    refused(done, BAD_MODEL, f"'{name}'", "missing")
    assert done.stderr.count("\n") == 1 and "rank" not in done.stderr


def test_a_damaged_vocabulary_is_refused_once(program, tiny, tmp_path):
    whole = pathlib.Path(tiny).read_bytes()
    model = tmp_path / "changed.gguf"
    model.write_bytes(whole.replace(text_of("th e"), text_of("thxe")))
    done = program.run("--model", model, "--ranks", 3)
    refused(done, BAD_MODEL, str(model), "no space in merge")
    assert done.stderr.count("\n") == 1 and "rank" not in done.stderr


@pytest.mark.parametrize(
    "keys",
    [
        [("llama.rope.scaling.type", STRING, "none"), ("llama.rope.scaling.factor", F32, 4.0)],
        [("llama.rope.scaling.type", STRING, "linear")],
        [("llama.rope.scaling.factor", F32, 1.0)],
        [("llama.rope.scaling.factor", F32, 0.0), ("llama.rope.scaling.original_context_length", U32, 512)],
        [("split.count", U16, 1), ("split.no", U16, 0), ("general.type", STRING, "model")],
        [("llama.vocab_size", U32, 275), ("llama.attention.causal", BOOL, True), ("llama.expert_count", U32, 0)],
    ],
    ids=lambda keys: " ".join(key[0] for key in keys),
)
def test_keys_that_change_nothing_are_accepted(program, tiny, tmp_path, keys):
    work = ["--ranks", 1, "--max-tokens", 4, "--prompt", "a"]
    model = with_keys(tiny, tmp_path / "changed.gguf", *keys)
    expected = program.json("--model", tiny, *work)["prompts"]
    assert program.json("--model", model, *work)["prompts"] == expected


def test_a_model_whose_numbers_are_none_is_a_failure(program, tiny, tmp_path):
    """The norm of the output is the last tensor of the file; a NaN in it makes every logit one."""
    whole = pathlib.Path(tiny).read_bytes()
    model = tmp_path / "nan.gguf"
    model.write_bytes(whole[:-4] + struct.pack("<f", float("nan")))
    done = program.run("--model", model, "--ranks", 2, "--max-tokens", 3, "--prompt", "a", "--prompt", "bc d")
    refused(done, FAILED, "prompt 0 was not finished: after 1 tokens", "prompt 1 was not finished: after ", "finite")
    assert "after 1 tokens" not in done.stderr.split("prompt 1 ")[1]


# ---- Verify ----------------------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_bit(program, tiny):
    done = program.run("--verify", "--model", tiny, "--ranks", 3, "--transport", "faults=r1.wait@*=flip,shm:copy")
    refused(done, FAILED, "rank 1", "layer")
    assert re.search("^rank 0 .* ok$", done.stdout, re.MULTILINE)
    assert not re.search("^rank 1 .* ok$", done.stdout, re.MULTILINE)


def test_verify_finds_a_flipped_bit_of_a_read(program, tiny):
    """Residents and stripes come by reads."""
    done = program.run(
        "--verify", "--model", tiny, "--ranks", 2, "--resident", "100%", "--transport", "faults=r1.read@*=flip,shm:copy"
    )
    refused(done, FAILED)
    assert not re.search("^rank 1 .* ok$", done.stdout, re.MULTILINE)


def test_a_rank_that_cannot_load_ends_the_run(program, tiny):
    for place in ("open", "store_open"):
        options = ["--ranks", 3, "--transport", f"faults=r1.{place}@1=fail,shm"]
        done = program.run("--model", tiny, *options, env={"LAYERSHARD_TIMEOUT_MS": "20000"})
        refused(done, FAILED, "rank 1", "fault injected")


# ---- Ranks that somebody else started --------------------------------------------------------------------------------


def start_rank(program, rank, size, job, *options, **environment):
    variables = {"LAYERSHARD_RANK": rank, "LAYERSHARD_SIZE": size, "LAYERSHARD_JOB": job}
    variables.update({"LAYERSHARD_TIMEOUT_MS": 20000, **environment})
    return program.start(*options, env={name: str(value) for name, value in variables.items()})


@pytest.fixture
def job(tmp_path):
    return f"test-{os.getpid()}-{tmp_path.name}"


def test_separate_ranks_work_together(program, tiny, job):
    prompts = [word for text in ("one", "two", "three", "four", "five") for word in ("--prompt", text)]
    alone = program.json("--model", tiny, "--ranks", 1, "--max-tokens", 6, *prompts)
    processes = [
        start_rank(program, rank, 3, job, "--model", tiny, "--max-tokens", 6, *prompts, "--json") for rank in range(3)
    ]
    for rank, process in enumerate(processes):
        done = program.finish(process)
        assert done.returncode == 0 and done.stderr == ""
        result = json.loads(done.stdout)
        assert [r["rank"] for r in result["ranks"]] == [rank] and result["ranks"][0]["pid"] == process.pid
        assert [p["index"] for p in result["prompts"]] == list(range(rank, 5, 3))
        assert tokens_of(result) == tokens_of(alone)[rank::3]


def test_ranks_option_is_above_the_environment(program, tiny):
    environment = {"LAYERSHARD_RANK": "5", "LAYERSHARD_SIZE": "9", "LAYERSHARD_JOB": "of somebody else"}
    environment.update({"RANK": "1", "WORLD_SIZE": "2"})
    result = program.json("--model", tiny, "--ranks", 2, "--max-tokens", 1, env=environment)
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]


@pytest.mark.parametrize(
    "other,words",
    [
        (["--placement", "striped"], ["placement"]),
        (["--transport", "shm:copy"], ["transport", "shm:copy"]),
        (["--model", "other"], ["rank 0", "rank 1"]),
    ],
    ids=["placement", "transport", "model"],
)
def test_ranks_that_disagree_are_told_so(program, tiny, other_tiny, job, other, words):
    options = [other_tiny if word == "other" else word for word in other]
    processes = [
        start_rank(program, 0, 2, job, "--model", tiny, "--max-tokens", 1),
        start_rank(program, 1, 2, job, "--model", tiny, "--max-tokens", 1, *options),
    ]
    for process in processes:
        refused(program.finish(process), FAILED, "rank 0", "rank 1", *words)


def test_models_that_differ_in_their_layers_only_are_told_apart(program, tiny, job, tmp_path):
    """Same size, head and norms: the time of change tells."""
    whole = bytearray(pathlib.Path(tiny).read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "other.gguf").write_bytes(whole)
    processes = [
        start_rank(program, rank, 2, job, "--model", model, "--max-tokens", 1)
        for rank, model in enumerate((tiny, tmp_path / "other.gguf"))
    ]
    for process in processes:
        refused(program.finish(process), FAILED, "rank 0", "rank 1", "model")


def test_a_copy_with_its_time_stamps_is_the_same_model(program, tiny, job, tmp_path):
    shutil.copy2(tiny, tmp_path / "copy.gguf")
    processes = [
        start_rank(program, rank, 2, job, "--model", model, "--max-tokens", 1)
        for rank, model in enumerate((tiny, tmp_path / "copy.gguf"))
    ]
    for process in processes:
        assert program.finish(process).returncode == 0


def test_the_log_names_the_launcher(program, tiny, job):
    environment = {"WORLD_SIZE": "2", "LAYERSHARD_JOB": job, "LAYERSHARD_LOG": "info"}
    processes = [
        program.start("--model", tiny, "--max-tokens", 1, env={**environment, "RANK": str(rank)}) for rank in range(2)
    ]
    for rank, process in enumerate(processes):
        done = program.finish(process)
        assert done.returncode == 0 and f"rank {rank} of 2 (torchrun)" in done.stderr


def test_a_job_of_one_rank_is_one_rank(program, tiny):
    result = program.json("--model", tiny, "--max-tokens", 1, env={"RANK": "0", "WORLD_SIZE": "1"})
    assert result["config"]["ranks"] == 1 and [rank["rank"] for rank in result["ranks"]] == [0]


def test_ranks_that_disagree_on_the_size_are_told_so(program, tiny, job):
    processes = [start_rank(program, rank, size, job, "--model", tiny) for rank, size in ((0, 2), (1, 3))]
    ends = [program.finish(process) for process in processes]
    assert all(done.returncode == FAILED for done in ends)
    told = [done.stderr for done in ends]
    assert any(re.search("rank 0 .* 2 ranks, rank 1 .* 3", text) for text in told), told


def test_a_missing_rank_is_named(program, tiny, job):
    done = program.finish(start_rank(program, 0, 2, job, "--model", tiny, LAYERSHARD_TIMEOUT_MS=1000))
    refused(done, FAILED, "1000 ms", "1", job, "LAYERSHARD_TIMEOUT_MS")


def test_a_separate_rank_goes_on_when_another_is_killed(program, tiny, job, tmp_path, sanitized):
    count = 8 if sanitized else 30
    (tmp_path / "prompts").write_text("".join(f"prompt number {j} is about\n" for j in range(count)))
    work = ["--model", tiny, "--prompts", tmp_path / "prompts", "--max-tokens", 480, "--json"]
    processes = [start_rank(program, rank, 2, job, *work) for rank in range(2)]
    for process in processes:
        wait_until(lambda process=process: shard_mappings(process.pid), "the rank maps its layers")
    before = cpu_ticks(processes[1].pid)
    wait_until(lambda: cpu_ticks(processes[1].pid) > before + 5, "the rank computes")
    processes[1].send_signal(signal.SIGKILL)
    program.finish(processes[1])
    done = program.finish(processes[0])
    assert done.returncode == 0, done.stderr
    right = program.json("--ranks", 1, *work[:-1])
    assert tokens_of(json.loads(done.stdout)) == tokens_of(right)[0::2]

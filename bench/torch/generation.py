#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Generation from shared layers against private ones: SmolLM2 through transformers, token by token in turns.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so bench/torch/generation.py [--ranks 2]

One process has three copies of the model: two private ones, and one whose blocks it shares with the other ranks, whose
pages it reads in place (transport shm). Every token is computed by all three, in an order that turns, on one thread;
the logits must be the same bits. A round is five blocks of tokens, and the least of the blocks counts for each copy.
The machine's own scatter is what the two private copies differ by, found in the same way: the largest of the rounds.
The shared copy may be slower than the first private one by no more, in the median round. Exit status 1 if it is.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from typing import Any

import torch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCKS = 5
NAMES = ("private", "private too", "shared")


def default_model() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("LAYERSHARD_CACHE") or pathlib.Path(home) / "layershard") / GGUF


def load(path: pathlib.Path) -> tuple[Any, torch.Tensor]:
    """The model and the tokens of a prompt: a GGUF file, or a directory as Hugging Face saves it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    where = (
        {"pretrained_model_name_or_path": path}
        if path.is_dir()
        else {
            "pretrained_model_name_or_path": path.parent,
            "gguf_file": path.name,
        }
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    return model, tokenizer("The capital of France is", return_tensors="pt")["input_ids"]


def shard(model: Any, rank: int, size: int) -> str:
    """Returns what the handle says of the transport; refuses one that moves layers."""
    import layershard.torch as sharding

    os.environ.update(LAYERSHARD_RANK=str(rank), LAYERSHARD_SIZE=str(size))
    sharding.shard(model, "model.layers.*", scope="block", transport="shm")
    handle = sharding.of(model)
    if any(each.windows for each in handle.stats().values()):
        raise SystemExit("layers are fetched through windows: none is used in place, and there is nothing to measure")
    return handle.report()


def be_a_rank(model: Any, rank: int, size: int, done: Any) -> None:
    shard(model, rank, size)
    done.wait()


def one_token(model: Any, token: torch.Tensor, cache: Any) -> tuple[int, Any]:
    begin = time.perf_counter_ns()
    output = model(token, past_key_values=cache, use_cache=True)
    return time.perf_counter_ns() - begin, output


def block_ms(models: list[Any], prompt: torch.Tensor, n_tokens: int) -> list[float]:
    """Milliseconds a token of each model. All must say the same, bit for bit."""
    outputs = [model(prompt, use_cache=True) for model in models]
    spent = [0] * len(models)
    for number in range(n_tokens):
        if any(not torch.equal(outputs[0].logits, each.logits) for each in outputs[1:]):
            raise SystemExit(f"the logits differ at token {number}")
        token = outputs[0].logits[:, -1:].argmax(-1)
        for index in sorted(range(len(models)), key=lambda index: (index + number) % len(models)):
            took, outputs[index] = one_token(models[index], token, outputs[index].past_key_values)
            spent[index] += took
    return [each / n_tokens / 1e6 for each in spent]


def round_ms(models: list[Any], prompt: torch.Tensor, n_tokens: int) -> list[float]:
    blocks = [block_ms(models, prompt, n_tokens) for _ in range(BLOCKS)]
    return [min(each) for each in zip(*blocks, strict=True)]


def evaluate(rounds: list[list[float]]) -> bool:
    """Print what was found; whether the shared copy is as fast as the machine can tell."""
    scatter = max(abs(too / private - 1) for private, too, _ in rounds)
    ratio = statistics.median(shared / private for private, _, shared in rounds)
    for index, name in enumerate(NAMES):
        values = [each[index] for each in rounds]
        print(f"{name:12} {min(values):8.3f} ms a token at best, {statistics.median(values):8.3f} in the median round")
    met = ratio <= 1 + scatter
    print(f"scatter of the machine (private against private): {100 * scatter:.2f} %")
    print(f"shared against private: {100 * (ratio - 1):+.2f} %: {'as fast' if met else 'SLOWER'}")
    return met


def measure(options: argparse.Namespace, model: Any, prompt: torch.Tensor) -> bool:
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    report = shard(models[2], 0, options.ranks)
    gc.collect()
    gc.disable()
    with torch.inference_mode():
        round_ms(models, prompt, 4)  # warm
        rounds = []
        for number in range(options.rounds):
            rounds.append(round_ms(models, prompt, options.tokens))
            times = ", ".join(f"{name} {value:.3f}" for name, value in zip(NAMES, rounds[-1], strict=True))
            print(f"round {number + 1}: {times} ms a token", flush=True)
    print(report)
    print(f"torch {torch.__version__}, one thread, {options.tokens} tokens a block; logits are the same bits")
    return evaluate(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=default_model(), help="a GGUF file or a directory")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="tokens a block")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["LAYERSHARD_JOB"] = f"generation-{os.getpid()}"
    model, prompt = load(options.model)
    context = multiprocessing.get_context("fork")  # the others begin with the model that is loaded
    done = context.Event()
    others = [
        context.Process(target=be_a_rank, args=(model, rank, options.ranks, done), daemon=True)
        for rank in range(1, options.ranks)
    ]
    for process in others:
        process.start()
    try:
        met = measure(options, model, prompt)
    finally:
        done.set()
        for process in others:
            process.join()
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()

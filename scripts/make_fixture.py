#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make tests/examples/llama/fixtures/smollm2.json: what Hugging Face transformers makes of the test model.

The fixture is committed; run this again only to add prompts. In a virtual environment of its own (about 6 GB):

    python3 -m venv fixture-venv
    fixture-venv/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
    export HF_HUB_OFFLINE=1
    fixture-venv/bin/python scripts/make_fixture.py "$(scripts/fetch_model.sh)" \\
        tests/examples/llama/fixtures/smollm2.json

For each prompt: its token ids, 32 greedy token ids, the gap between the two largest logits at each of these steps, and
the 50 largest logits after the prompt. Weights and arithmetic are float32. The vocabulary and the merges come from the
file; the rule for splitting text is the one that the file names ("smollm"): digits one by one, then GPT-2's pattern.
"""

import hashlib
import json
import os
import sys

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

PROMPTS = [
    "The capital of France is",
    "In 1969 Neil Armstrong walked on the Moon;  12345.678 metres later, 3½ hours had passed.\n\n  Then",
    "def fibonacci(n):\n    if n < 2:\n\treturn n\n    return ",
    "Grüße, 世界! Καλημέρα 😀 — l'été, naïve café: they're, we'll, I'd, you've\u00a0and\u3000more",
    "<|im_start|>user\nWhat is 7 times 8?<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a small village by the sea, there lived an old clockmaker who had never been late in his "
    "life. One morning he woke up, looked at the wall, and saw that every single one of his clocks had stopped at",
    "a",
]
STEPS = 32
LARGEST = 50
CONTROL = 3


def read_tokenizer(path):
    fields = GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds) if kind == CONTROL]
    )
    return tokenizer


@torch.inference_mode()
def run(model, ids):
    """Greedy continuation with a cache, step by step."""
    largest, tokens, gaps, cache = None, [], [], None
    given = torch.tensor([ids])
    for _ in range(STEPS):
        out = model(input_ids=given, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        if largest is None:
            values, indices = logits.topk(LARGEST)
            largest = [[int(i), round(float(v), 6)] for v, i in zip(values, indices)]
        top = logits.topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(round(float(top.values[0] - top.values[1]), 6))
        given = torch.tensor([[tokens[-1]]])
    return {"tokens": tokens, "gaps": gaps, "logits": largest}


def main():
    path, fixture = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    directory, name = os.path.split(os.path.abspath(path))
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = read_tokenizer(path)
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        cases.append({"prompt": prompt, "prompt_tokens": ids, **run(model, ids)})
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    with open(fixture, "w", encoding="utf-8") as file:
        made = {"schema": "layershard-fixture/1", "model": name, "sha256": digest, "eos": 2, "cases": cases}
        json.dump(made, file, ensure_ascii=True, indent=None)
        file.write("\n")


if __name__ == "__main__":
    main()

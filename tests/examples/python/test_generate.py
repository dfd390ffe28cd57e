# SPDX-License-Identifier: Apache-2.0
"""examples/python/generate.py says what the whole model says."""

import whole_programs


def test_generate(tmp_path):
    say = whole_programs.random_llama(tmp_path)
    prompts = ["the capital of france is", "water boils"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    options = ["--model", str(tmp_path), "--tokens", "6", "--transport", "shm:copy"]
    lines = whole_programs.torchrun(2, "examples/python/generate.py", *options, *flags).splitlines()
    assert any(line.startswith("model.layers.*") for line in lines)
    for rank, prompt in enumerate(prompts):
        assert f"[rank {rank}] {say(prompt)}" in lines

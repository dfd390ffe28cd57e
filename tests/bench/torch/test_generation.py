# SPDX-License-Identifier: Apache-2.0
"""bench/torch/generation.py, with a small model."""

import os
import subprocess
import sys

import whole_programs
from patience import LONG_S


def test_generation_is_measured(tmp_path):
    """With a model so small the verdict is the clock's; what is the same is said by the bits."""
    whole_programs.random_llama(tmp_path)
    command = [sys.executable, "bench/torch/generation.py", "--model", str(tmp_path), "--rounds", "2", "--tokens", "3"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        command, cwd=whole_programs.TREE, env=environment, capture_output=True, text=True, timeout=LONG_S
    )
    lines = done.stdout.splitlines()
    assert done.returncode == (1 if "SLOWER" in lines[-1] else 0), done.stderr
    assert "as fast" in lines[-1] or "SLOWER" in lines[-1]
    assert any("logits are the same bits" in line for line in lines) and "scatter" in lines[-2]
    assert any(line.startswith("model.layers.*") for line in lines)

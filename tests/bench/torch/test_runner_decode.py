# SPDX-License-Identifier: Apache-2.0
"""bench/torch/runner_decode.py, with a model of a few layers."""

import json
import os
import subprocess
import sys

import whole_programs
from patience import LONG_S


def decode(*options):
    command = [sys.executable, "bench/torch/runner_decode.py", "--build", os.environ["LAYERSHARD_TEST_BUILD"]]
    command += ["--rounds", "1", "--max-tokens", "4", *options]
    environment = dict(os.environ, LAYERSHARD_MODEL=os.environ["LAYERSHARD_TEST_MODEL_TINY"])
    return subprocess.run(
        command, cwd=whole_programs.TREE, env=environment, capture_output=True, text=True, timeout=LONG_S
    )


def test_decode_is_measured_by_one_rank_and_by_two(tmp_path):
    done = decode("--save", str(tmp_path / "decode.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "decode.json").read_text())["result"]["rows"]
    assert [row["ranks"] for row in rows] == [1, 1, 2, 2]
    assert [row["layers"] for row in rows] == ["shared", "private"] * 2
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert len(done.stdout.splitlines()) == len(rows) + 1


def test_a_target_that_is_missed_is_told():
    assert decode("--min-ratio", "1000").returncode == 1

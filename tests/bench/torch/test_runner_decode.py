# SPDX-License-Identifier: Apache-2.0
"""bench/torch/runner_decode.py, with a model of a few layers."""

import json
import os
import pathlib
import subprocess
import sys

import whole_programs
from patience import LONG_S


def test_decode_is_measured_by_one_rank_and_by_two(tmp_path):
    saved = tmp_path / "decode.json"
    build = pathlib.Path(os.environ["LAYERSHARD_TEST_BUILD"])
    command = [sys.executable, "bench/torch/runner_decode.py", "--build", str(build), "--rounds", "2", "--max-tokens", "4"]
    environment = dict(os.environ, LAYERSHARD_MODEL=os.environ["LAYERSHARD_TEST_MODEL_TINY"])
    done = subprocess.run(
        [*command, "--save", str(saved)],
        cwd=whole_programs.TREE, env=environment, capture_output=True, text=True, timeout=LONG_S,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(saved.read_text())["result"]["rows"]
    assert [(row["ranks"], row["layers"]) for row in rows] == [
        (1, "shared"), (1, "private"), (2, "shared"), (2, "private")
    ]
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert len(done.stdout.splitlines()) == len(rows) + 1
    worse = subprocess.run(
        [*command, "--min-ratio", "1000"],
        cwd=whole_programs.TREE, env=environment, capture_output=True, text=True, timeout=LONG_S,
    )
    assert worse.returncode == 1, "a target that cannot be met is met"

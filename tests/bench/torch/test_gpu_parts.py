# SPDX-License-Identifier: Apache-2.0
"""bench/gpu.sh without a GPU: each part of two GPUs calls a script with options that it takes, and ends in time."""

import os
import pathlib
import runpy
import shlex
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")
TREE = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(TREE / "bench" / "torch"))

import torch_launch  # noqa: E402

RECORDER = '#!/bin/sh\nfor each; do printf "%s\\0" "$each"; done | tr "\\n\\0" " \\n" >>"$0.said"; echo >>"$0.said"\n'


def gpu_sh(folder, *options):
    """Its end, and the command lines of programs that do nothing."""
    stand_in = folder / "program"
    stand_in.write_text(RECORDER)
    stand_in.chmod(0o755)
    said = folder / "program.said"
    said.unlink(missing_ok=True)
    command = ["sh", "bench/gpu.sh", "-p", str(stand_in), "-o", str(folder), "-n", "2", *options]
    environment = os.environ | {"LAYERSHARD_PYTHON": str(stand_in)}
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, timeout=60, check=False)
    found = [each.split("\n") for each in said.read_text().strip("\n").split("\n\n")] if said.exists() else []
    return done, found


def scripts_of(commands):
    return [each for each in commands if each[0].endswith(".py") and not each[0].endswith("columns.py")]


def test_scripts_take_the_options(tmp_path, monkeypatch):
    done, commands = gpu_sh(tmp_path)
    assert done.returncode == 0, done.stderr
    saved = [each[each.index("--save") + 1] for each in commands if "--save" in each]
    assert len(set(saved)) == len(saved) > 15
    monkeypatch.setattr(torch_launch, "launch", lambda _size: 0)
    for name, *options in scripts_of(commands):
        monkeypatch.setattr(sys, "argv", [name, *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TREE / name), run_name="__main__")
        assert end.value.code == 0, shlex.join([name, *options])


def test_parts_end_in_time(tmp_path):
    done, commands = gpu_sh(tmp_path, "-m", "5", "in-place", "wan", "e2e-16,512", "e2e-compiled-16", "prompt-65536")
    assert done.returncode == 0, done.stderr
    assert all(each[each.index("--minutes") + 1] == "5" for each in scripts_of(commands))
    assert [each[each.index("--tokens") + 1] for each in scripts_of(commands)[2:]] == ["16,512", "16", "65536"]


@pytest.mark.parametrize("part", ["e2e-", "e2e-compiled-", "e2e-x", "e2e-compiled-16x", "other"])
def test_parts_that_are_not_there(tmp_path, part):
    done, commands = gpu_sh(tmp_path, part)
    assert done.returncode == 2 and f"there is no part '{part}'" in done.stderr and not commands

# SPDX-License-Identifier: Apache-2.0
"""The package's types, by mypy: a minute of computing, most of it on those of torch."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from patience import LONG_S

TREE = pathlib.Path(__file__).resolve().parents[2]
NEWEST = "3.14"


def check(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        cwd="/",
    )


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Its command, with a cache that the tests share."""
    pytest.importorskip("mypy", reason="mypy is not installed: scripts/python_env.sh installs it")
    cache = tmp_path_factory.mktemp("mypy")
    return ["-m", "mypy", "--strict", f"--cache-dir={cache}"]


@pytest.mark.parametrize("version", ["3.10", NEWEST])
def test_types_check_strictly_and_the_standard_library_has_what_is_used(mypy, version):
    """By the oldest and the newest Python that the package promises: also what each one's library holds."""
    folder = TREE / "python" / "layershard"
    modules = [str(folder)]
    if importlib.util.find_spec("torch") is None:
        modules = [str(path) for path in sorted(folder.glob("*.py")) if path.name not in ("diffusers.py", "vllm.py")]
    done = check(*mypy, "--python-version", version, *modules)
    assert done.returncode == 0, done.stdout


def test_a_users_types_check(mypy, tmp_path):
    (tmp_path / "user.py").write_text(
        "import layershard\n"
        "with layershard.Group(0, 1) as group:\n"
        "    found: int = group.series('w', first_layer=0, layer_count=1, tensors=[]).address(0, 'weight')\n"
    )
    done = check(*mypy, "--python-version", NEWEST, str(tmp_path / "user.py"), MYPYPATH=str(TREE / "python"))
    assert done.returncode == 1 and done.stdout.count("error:") == 1 and 'has incompatible type "str"' in done.stdout

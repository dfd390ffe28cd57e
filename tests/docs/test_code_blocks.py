# SPDX-License-Identifier: Apache-2.0
"""Every block of shell in the pages of the tree is run as a reader would run it, or says right before it why not:

<!-- not run: it needs two GPUs -->         its programs, files, options and targets exist at least
<!-- run by make check-long -->             it is run, by the tests of label long

It runs in a folder that looks like the tree, with the page's earlier programs saved under the names in their first
lines. A block of text after it is what it prints. tests/python/test_torch_docs.py runs pieces of programs.
"""

import os
import re
import shutil
import socket
import subprocess

import pages
import pytest
from commands import Checker, NoSuchThing, commands_of
from patience import LONG_MS, LONG_S
from programs import clean_environment

BUILD = os.environ.get("LAYERSHARD_TEST_BUILD", str(pages.TREE / "build"))
NOT_RUN, LONG = "not run: ", "run by make check-long"
SHELL = [block for block in pages.BLOCKS if block.kind == "sh"]
COMMAND = re.compile(r"(make|ctest|pip|layershard(-bench|-llama| info)|build/layershard\S*)( |$)|\S+/\S+ ")


def those(blocks):
    return pytest.mark.parametrize("block", blocks, ids=[block.place for block in blocks])


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Where the build is installed, as by `make install`."""
    stage = tmp_path_factory.mktemp("stage")
    command = ["cmake", "--install", BUILD]
    subprocess.run(command, env={**os.environ, "DESTDIR": str(stage)}, check=True, capture_output=True)
    (described,) = stage.rglob("layershard.pc")
    library = described.parents[1]
    described.write_text(described.read_text().replace("prefix=/", f"prefix={stage}/", 1))
    return library


@pytest.fixture
def environment(tmp_path, installed):
    """A user who has installed the library and the package, and is in the middle of nothing else."""
    return clean_environment(
        {
            "HOME": str(tmp_path),
            "PATH": os.pathsep.join([f"{BUILD}/venv/bin", BUILD, os.environ["PATH"]]),
            "PKG_CONFIG_PATH": f"{installed}/pkgconfig",
            "LD_LIBRARY_PATH": str(installed),
            "PYTHONPATH": str(pages.TREE / "python"),
            "LAYERSHARD_LIBRARY": f"{BUILD}/liblayershard.so",
            "LAYERSHARD_TIMEOUT_MS": str(LONG_MS),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PET_MASTER_PORT": str(free_port()),
        }
    )


def free_port():
    """For torchrun, whose own is the same for all that run at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def like_the_tree(tmp_path):
    """A folder with all that the tree has, and the build; what a block writes is not written into the tree."""
    folder = tmp_path / "layershard"
    folder.mkdir()
    for each in pages.TREE.iterdir():
        if not each.name.startswith("build"):
            (folder / each.name).symlink_to(each)
    (folder / "build").symlink_to(BUILD)
    return folder


@pytest.fixture
def copy_of_the_tree(tmp_path):
    """The same to build in."""
    left_out = shutil.ignore_patterns("build*", ".git", "results", "__pycache__")
    return shutil.copytree(pages.TREE, tmp_path / "layershard", ignore=left_out)


def run(block, folder, environment):
    page = [each for each in pages.BLOCKS if each.page == block.page]
    before, after = page[: page.index(block)], page[page.index(block) + 1 :]
    for each in before:
        if each.file_name:
            (folder / each.file_name).write_text(each.text, encoding="utf-8")
    if "torchrun" in block.text and not os.path.exists(f"{BUILD}/venv/bin/torchrun"):
        pytest.skip("the build has no environment with torch")
    done = subprocess.run(
        ["sh", "-e"], input=block.text, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONG_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if after and after[0].kind == "text":
        assert done.stdout == after[0].text, f"not what {after[0].place} has"


@those([block for block in SHELL if not block.comment.startswith((NOT_RUN, LONG))])
def test_run(block, like_the_tree, environment):
    run(block, like_the_tree, environment)


@those([block for block in SHELL if block.comment.startswith(LONG)])
def test_long_run(block, copy_of_the_tree, environment):
    run(block, copy_of_the_tree, environment)


def complaints(scripts, folder, environment):
    checker, found = Checker(folder, environment), []
    for place, script in scripts:
        for command in commands_of(script):
            try:
                checker.check(command)
            except NoSuchThing as reason:
                found.append(f"{place}: {' '.join(command)}: {reason}")
    return found


def test_what_is_not_run_could_be_typed(like_the_tree, environment):
    """Nor are commands in sentences run."""
    scripts = [(block.place, block.text) for block in SHELL if block.comment.startswith(NOT_RUN)]
    scripts += [(place, code) for place, code in pages.CODES if COMMAND.match(code)]
    assert len(scripts) > 50
    assert complaints(scripts, like_the_tree, environment) == []


def test_each_block_says_what_it_is():
    assert [block.place for block in pages.BLOCKS if block.kind not in ("c", "python", "sh", "text")] == []
    reasons = [block.comment.removeprefix(NOT_RUN) for block in SHELL if block.comment.startswith(NOT_RUN)]
    assert all(reasons)


def is_run(block):
    """By the shell beside it, under the name that it has there; docs/python.md has a test of its own."""
    beside = [shell for shell in SHELL if shell.page == block.page and not shell.comment.startswith(NOT_RUN)]
    return block.page.name == "python.md" or any(block.file_name in shell.text.split() for shell in beside)


def test_each_program_is_run():
    assert [block.place for block in pages.BLOCKS if block.kind in ("c", "python") and not is_run(block)] == []


@pytest.mark.parametrize(
    "command, names",
    [
        ("scripts/no_such.sh", "no_such.sh"),
        ("build/layershard-bench link --no-such 3", "--no-such"),
        ("A=1 python3 bench/results/targets.py --no-such", "--no-such"),
        ("sudo make && make no-such", "no-such"),
        ("pip install '.[no_such]'", "no_such"),
        ("sh scripts/demo.sh tests/no_such", "tests/no_such"),
        ("no-such-program", "no-such-program"),
    ],
)
def test_what_could_not_be_typed_is_found(command, names, like_the_tree, environment):
    (found,) = complaints([("page", command)], like_the_tree, environment)
    assert names in found

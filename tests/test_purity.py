# SPDX-License-Identifier: Apache-2.0
"""purity.py, each rule seen to fail: on copies of the sources with one fault put in, and on small objects."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
SOURCE = TESTS.parent


def violations(check, *arguments):
    command = [sys.executable, str(TESTS / "purity.py"), check, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1 if ended.stdout else 0, "")
    return ended.stdout.splitlines()


@pytest.fixture
def tree(tmp_path):
    """What the includes are looked for in."""
    for folder in ("include", "src", "tools", "examples/llama", "bench/c", "tests"):
        shutil.copytree(SOURCE / folder, tmp_path / folder, ignore=shutil.ignore_patterns("corpus", "mutants", "*.py"))
    return tmp_path


def begin_with(path, line):
    path.write_text(f"{line}\n{path.read_text()}")


def test_the_sources_as_they_are(tree):
    assert violations("includes", tree) == []


@pytest.mark.parametrize(
    "path, line, told",
    [
        ("src/host/mesh.c", '#include "ring.h"', 'src/host/mesh.c:1: "ring.h" is not for this directory'),
        ("src/transport/shm/shm.c", '#include "local.h"', '"local.h" is not for this directory'),
        ("src/core/ring.c", "#include <unistd.h>", "<unistd.h>: src/core uses no operating system"),
        ("tools/support/cli.h", "#include <layershard/transport.h>", "<layershard/transport.h> is not for this"),
        ("bench/c/bench_step.c", '#include "cuda_driver.h"', '"cuda_driver.h" is not for this directory'),
    ],
)
def test_an_include_across_a_border(tree, path, line, told):
    begin_with(tree / path, line)
    (violation,) = violations("includes", tree)
    assert told in violation


def test_two_headers_of_one_name(tree):
    (tree / "src/host/verdict.h").write_text("")
    assert 'src/host: "verdict.h" is in more than one of the folders that it sees' in violations("includes", tree)


def test_a_folder_without_a_line(tree):
    (tree / "src/more").mkdir()
    (tree / "src/more/more.h").write_text("")
    assert violations("includes", tree) == ["src/more: no line of BORDERS says what it may include"]


def test_a_folder_that_is_gone(tree):
    shutil.rmtree(tree / "src/host")
    assert "src/host: no files; is this the right directory?" in violations("includes", tree)


@pytest.mark.parametrize("folder", ["src/core", "tests/host"])
def test_a_file_that_is_not_built(tree, folder):
    (tree / folder / "forgotten.c").write_text("")
    assert violations("includes", tree) == [f"{folder}/forgotten.c: not in {folder}/CMakeLists.txt"]


@pytest.fixture
def compiled(tmp_path):
    """Objects of texts, by the names of their files."""

    def compile_all(**texts):
        for name, text in texts.items():
            command = [os.environ.get("CC", "cc"), "-w", "-fPIC", "-c", "-x", "c", "-", "-o", f"{name}.c.o"]
            subprocess.run(command, input=text, text=True, cwd=tmp_path, check=True)
        return [tmp_path / f"{name}.c.o" for name in texts]

    return compile_all


def test_base_asks_for_something(compiled):
    objects = compiled(a="void b(void); void a(void) { b(); }", b="int getpid(void); void b(void) { getpid(); }")
    told = "b.c.o: needs getpid, which is neither in these objects nor what they may use of others"
    assert violations("base", SOURCE, *objects) == [told]


def test_core_asks_for_what_is_not_outside(compiled):
    objects = compiled(a="void lshard__process_open(void), lshard__mesh_open(void), lshard_fail(void);"
                       "void a(void) { lshard__process_open(); lshard_fail(); lshard__mesh_open(); }")  # fmt: skip
    (violation,) = violations("core", SOURCE, *objects)
    assert "needs lshard__mesh_open" in violation


def test_two_files_in_a_circle(compiled):
    objects = compiled(a="void b(void); void a(void) { b(); }", b="void a(void); void b(void) { a(); }")
    assert violations("circles", SOURCE, *objects) == ["a circle of files: a.c needs b of b.c needs a of a.c"]


def test_a_circle_by_way_of_a_table(compiled):
    objects = compiled(
        a="void b(void); void a(void) { b(); } void end(void) {}",
        b="extern void *const table[]; void b(void) { ((void (*)(void))table[0])(); }",
        c="void end(void); void *const table[] = {end}; void begin(void) { end(); }",
        d="void begin(void), a(void); void d(void) { begin(); a(); }",
    )
    told = "a circle of files: a.c needs b of b.c needs table of c.c needs end of a.c"
    assert violations("circles", SOURCE, *objects) == [told]


def test_files_in_no_circle(compiled):
    objects = compiled(
        a="void b(void), c(void); void a(void) { b(); c(); }",
        b="void c(void); void b(void) { c(); }",
        c='int puts(const char *); void c(void) { puts(""); }',
    )
    assert violations("circles", SOURCE, *objects) == []


@pytest.mark.parametrize("check", ["base", "core", "circles"])
def test_no_objects(check):
    assert violations(check, SOURCE) == ["no objects given"]


def test_exports(compiled, tmp_path):
    objects = compiled(a="void lshard_fail(void) {} void stray(void) {}")
    shared, archive = tmp_path / "a.so", tmp_path / "a.a"
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-o", shared, *objects], check=True)
    subprocess.run(["ar", "rc", archive, *objects], check=True)
    told = violations("exports", SOURCE, shared, archive)
    for library in (shared, archive):
        assert f"{library}: lshard_reach is declared LSHARD_API but not there" in told
        assert f"{library}: stray is visible but not declared LSHARD_API in a public header" in told
        assert not any(f"{library}: lshard_fail" in line for line in told)

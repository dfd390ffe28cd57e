#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Apply every mutant of tests/mutants to a copy of the sources, one at a time, and see the test it names fail.

A mutant is a small fault that somebody could make in src/. Its file, tests/mutants/ID, says in lines "key: value"

    what: versions are not compared
    function: compare       where it is, in whatever file under src/ defines a function of that name
    test: registry          the ctest test that finds it
    case: two_versions*     which of the test's cases to run; * and ? as in file names

and then, each after a line of three dashes, the text that is there once in that function and what replaces it. Blanks
and line ends count as one blank. Nothing after the last dashes: the text is left out.

First every named test must pass on the sources as they are. Then a mutant whose text is not found, that does not
compile, or that its test passes over or hangs in, makes the exit status 1. Copies and builds are kept in build-mutants/
for the next run.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
# A test that runs longer hangs: the slowest of them takes a few seconds.
LIMIT_S = 60 * int(os.environ.get("LAYERSHARD_TEST_PATIENCE", "1"))
BUILD_LIMIT_S = 600


class Refused(Exception):
    """What is said about one mutant, or about all."""


# ---- Mutants ----


@dataclass(frozen=True)
class Mutant:
    name: str
    what: str
    function: str
    test: str
    case: str
    old: str
    new: str


def read_mutant(path: Path) -> Mutant:
    parts = re.split(r"^---\n", path.read_text(), flags=re.MULTILINE)
    if len(parts) != 3:
        raise Refused(f"{path}: needs keys, the old text and the new one, with two lines of three dashes between them")
    keys: dict[str, str] = {}
    for line in parts[0].splitlines():
        key, colon, value = line.partition(":")
        if not colon or key not in ("what", "function", "test", "case") or key in keys:
            raise Refused(f"{path}: '{line}' is not one of what:, function:, test:, case:")
        keys[key] = value.strip()
    for key in ("what", "function", "test"):
        if not keys.get(key):
            raise Refused(f"{path}: has no {key}:")
    if not parts[1].strip():
        raise Refused(f"{path}: has no old text")
    return Mutant(path.name, keys["what"], keys["function"], keys["test"], keys.get("case", "*"), parts[1], parts[2])


def read_mutants(folder: Path, wanted: list[str]) -> list[Mutant]:
    there = {path.name: path for path in sorted(folder.iterdir())}
    for name in wanted:
        if name not in there:
            raise Refused(f"there is no mutant {name} in {folder}")
    return [read_mutant(there[name]) for name in (wanted or there)]


def definitions(text: str, function: str) -> Iterator[tuple[int, int]]:
    """Where the function's definitions begin and end: a name at the left edge's line, a body between braces there."""
    for head in re.finditer(rf"^[a-z][^\n;]*\b{function}\([^;{{]*?\)\n\{{\n", text, flags=re.MULTILINE):
        end = text.find("\n}\n", head.end() - 1)
        if end >= 0:
            yield head.start(), end + 3


def mutated(sources: Path, mutant: Mutant) -> tuple[Path, str]:
    """The file and its new text."""
    words = r"\s+".join(re.escape(word) for word in mutant.old.split())
    places: list[tuple[Path, str, int, int]] = []
    defined = False
    for path in sorted(sources.rglob("*.[ch]")):
        text = path.read_text()
        for begin, end in definitions(text, mutant.function):
            defined = True
            for found in re.finditer(words, text[begin:end]):
                places.append((path, text, begin + found.start(), begin + found.end()))
    if len(places) != 1:
        why = f"{len(places)} places in it have the old text" if defined else "nothing under src/ defines it"
        raise Refused(f"does not apply to {mutant.function}: {why}")
    path, text, begin, end = places[0]
    return path, text[:begin] + mutant.new.strip() + text[end:]


# ---- A copy of the sources and its build ----


def copy_tree(source: Path, copy: Path) -> None:
    """Only what differs is written, so that only that is built again."""
    skipped = re.compile(r"\.|build|__pycache__")
    wanted: set[Path] = set()
    for folder, folders, files in os.walk(source):
        folders[:] = [each for each in folders if not skipped.match(each)]
        for each in files:
            path = Path(folder) / each
            to = copy / path.relative_to(source)
            wanted.add(to)
            to.parent.mkdir(parents=True, exist_ok=True)
            if not to.exists() or to.read_bytes() != path.read_bytes():
                shutil.copy(path, to)
    for path in [path for path in copy.rglob("*") if path.is_file() and path not in wanted]:
        path.unlink()


@dataclass
class Result:
    passed: bool
    hung: bool
    output: str
    seconds: float


def run(command: list[str], limit_s: float, folder: str = ".", environment: dict[str, str] | None = None) -> Result:
    """With all it has started: ranks that a mutant left behind end with it."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    hung = False
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        hung = True
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return Result(process.returncode == 0 and not hung, hung, output, time.monotonic() - begin)


@dataclass
class Test:
    command: list[str]
    folder: str
    environment: dict[str, str]


class Copy:
    """The sources and what is built of them, apart from those of other workers."""

    def __init__(self, folder: Path) -> None:
        self.sources = folder / "tree"
        self.build = folder / "build"
        copy_tree(TREE, self.sources)
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
        done = run(
            [
                "cmake",
                *ninja,
                "-DCMAKE_BUILD_TYPE=Debug",
                "-DCMAKE_C_FLAGS_DEBUG=-O0",
                "-DLAYERSHARD_BUILD_TESTS=ON",
                "-S",
                str(self.sources),
                "-B",
                str(self.build),
            ],
            BUILD_LIMIT_S,
        )
        if not done.passed:
            raise Refused(f"the copy in {folder} cannot be configured:\n{done.output}")
        self.targets = self._targets()
        self.tests: dict[str, Test] = {}

    def _targets(self) -> dict[str, list[str]]:
        """What each test is made of: the files of the build directory in its command, each named like its target."""
        targets: dict[str, list[str]] = {}
        files = sorted((self.build / "tests").rglob("CTestTestfile.cmake"))
        for line in [line for file in files for line in file.read_text().splitlines()]:
            listed = re.match(r"add_test\((?:\[(=*)\[(?P<bracketed>.*?)\]\1\]|(?P<plain>\S+)) (?P<command>.*)\)$", line)
            if not listed:
                continue
            paths = [Path(each.rpartition("=")[2]) for each in re.findall(r'"([^"]*)"', listed["command"])]
            targets[listed["bracketed"] or listed["plain"]] = [
                path.stem[3:] if path.suffix == ".so" else path.name for path in paths if self.build in path.parents
            ]
        return targets

    def learn_tests(self) -> None:
        """How tests are called, which ctest tells of those that are built."""
        done = subprocess.run(
            ["ctest", "--test-dir", str(self.build), "--show-only=json-v1"], capture_output=True, text=True, check=True
        )
        for each in json.loads(done.stdout)["tests"]:
            properties = {every["name"]: every["value"] for every in each["properties"]}
            environment = dict(every.split("=", 1) for every in properties.get("ENVIRONMENT", []))
            if "command" in each:
                self.tests[each["name"]] = Test(each["command"], properties["WORKING_DIRECTORY"], environment)

    def make(self, targets: Iterable[str]) -> Result:
        return run(["cmake", "--build", str(self.build), "--target", *targets], BUILD_LIMIT_S)

    def try_case(self, test: str, case: str) -> Result:
        known = self.tests[test]
        environment = {**os.environ, **known.environment, "LAYERSHARD_TEST_CASE": case}
        return run(known.command, LIMIT_S, known.folder, environment)


# ---- Trials ----


@dataclass
class Trial:
    """Of all mutants; workers add to it."""

    mutants: list[Mutant]
    lock: threading.Lock = field(default_factory=threading.Lock)
    found: int = 0
    failures: int = 0

    def say(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)

    def tell(self, mutant: Mutant, seconds: float, failure: str = "") -> None:
        by = f"{mutant.test}: {mutant.case}"
        with self.lock:
            self.found += not failure
            self.failures += bool(failure)
        self.say(
            f"NOT FOUND  {mutant.name} ({mutant.what}) by {by}: {failure}"
            if failure
            else f"found      {mutant.name} by {by} ({seconds:.1f} s)"
        )


def check_unchanged(copy: Copy, mutants: list[Mutant]) -> None:
    tests = {(mutant.test, mutant.case) for mutant in mutants}
    unknown = sorted(test for test, _ in tests if not copy.targets.get(test))
    if unknown:
        raise Refused(f"there is no test {unknown[0]}")
    done = copy.make(sorted({target for test, _ in tests for target in copy.targets[test]}))
    if not done.passed:
        raise Refused(f"the sources as they are do not build:\n{done.output}")
    copy.learn_tests()
    for test, case in sorted(tests):
        done = copy.try_case(test, case)
        if not done.passed:
            raise Refused(f"{test}: {case} fails on the sources as they are:\n{done.output}")
        if case != "*" and not re.search(r"\[  PASSED  \] [1-9]\d* test", done.output):
            raise Refused(f"{test} has no case {case}:\n{done.output}")


def try_mutant(copy: Copy, mutant: Mutant) -> None:
    path, text = mutated(copy.sources / "src", mutant)
    before = path.read_text()
    path.write_text(text)
    try:
        built = copy.make(copy.targets[mutant.test])
        if not built.passed:
            raise Refused(f"does not compile:\n{built.output}")
        done = copy.try_case(mutant.test, mutant.case)
    finally:
        path.write_text(before)
    if done.hung:
        raise Refused(f"the test does not end within {LIMIT_S} s, which says nothing")
    if done.passed:
        raise Refused("survives")


def work(trial: Trial, folder: Path, mutants: list[Mutant]) -> None:
    try:
        copy = Copy(folder)
        check_unchanged(copy, mutants)
    except Refused as refused:
        with trial.lock:
            trial.failures += len(mutants)
        trial.say(f"FAILED     {refused}")
        return
    for mutant in mutants:
        begin = time.monotonic()
        try:
            try_mutant(copy, mutant)
            trial.tell(mutant, time.monotonic() - begin)
        except Refused as refused:
            trial.tell(mutant, 0, str(refused))


def divided(mutants: list[Mutant], workers: int) -> list[list[Mutant]]:
    """Those of one test together: each worker builds its tests itself."""
    shares: list[list[Mutant]] = [[] for _ in range(workers)]
    of_tests: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        of_tests.setdefault(mutant.test, []).append(mutant)
    for each in sorted(of_tests.values(), key=len, reverse=True):
        min(shares, key=len).extend(each)
    return [share for share in shares if share]


def all_apply(mutants: list[Mutant]) -> bool:
    applied = 0
    for mutant in mutants:
        try:
            mutated(TREE / "src", mutant)
            applied += 1
        except Refused as refused:
            print(f"{mutant.name} ({mutant.what}): {refused}")
    print(f"{len(mutants)} mutants: {applied} apply")
    return applied == len(mutants)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these mutants")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="copies worked on at once")
    parser.add_argument("--apply", action="store_true", help="only look whether each mutant applies, and build nothing")
    arguments = parser.parse_args()
    begin = time.monotonic()
    try:
        trial = Trial(read_mutants(TREE / "tests" / "mutants", arguments.ids))
    except Refused as refused:
        print(f"mutants: {refused}", file=sys.stderr)
        return 2
    if arguments.apply:
        return 0 if all_apply(trial.mutants) else 1
    threads = [
        threading.Thread(target=work, args=(trial, TREE / "build-mutants" / str(number), share))
        for number, share in enumerate(divided(trial.mutants, arguments.jobs))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(
        f"{len(trial.mutants)} mutants: {trial.found} found, {trial.failures} not, in {time.monotonic() - begin:.0f} s"
    )
    return 1 if trial.failures else 0


if __name__ == "__main__":
    sys.exit(main())

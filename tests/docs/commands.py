# SPDX-License-Identifier: Apache-2.0
"""Could a command be typed as it stands? Its program, files, options and targets have to exist; it is not run."""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil
import subprocess

from pages import is_missing

OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
SEPARATORS = {";", "&", "&&", "|", "||"}
BUILT_IN = {"cd", "export", "wait"}


class NoSuchThing(Exception):
    """The text says what is not there."""


def commands_of(script: str) -> list[list[str]]:
    """The simple commands of a script, without the variables in front of them."""
    commands: list[list[str]] = []
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        words.whitespace_split = True
        commands.append([])
        for word in words:
            if word in SEPARATORS:
                commands.append([])
            elif commands[-1] or not re.match(r"\w+=", word):
                commands[-1].append(word)
    return [command for command in commands if command and command[0] not in BUILT_IN]


class Checker:
    """For a reader in a folder like the tree, with an environment to start programs in."""

    def __init__(self, folder: pathlib.Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.help: dict[tuple[str, ...], str] = {}

    def check(self, command: list[str]) -> None:
        program, *arguments = command
        if program == "sudo":
            return self.check(arguments)
        self._check_program(program)
        for word in arguments:
            if is_missing(word, self.folder):
                raise NoSuchThing(f"there is no {word}")
        if program == "make":
            return self._check_make(command)
        if program == "pip":
            self._check_extras(arguments)
        self._check_options(program, arguments)

    def _check_program(self, program: str) -> None:
        found = self.folder / program if "/" in program else program
        if not shutil.which(found, path=self.environment["PATH"]):
            raise NoSuchThing(f"there is no program {program}")

    def _check_make(self, command: list[str]) -> None:
        done = self._run([command[0], "-n", *command[1:]])
        if done.returncode:
            raise NoSuchThing(done.stderr.strip())

    def _check_extras(self, arguments: list[str]) -> None:
        project = (self.folder / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"\.\[(\w+)\]", " ".join(arguments)):
            if not re.search(rf"^{extra} = \[", project, re.MULTILINE):
                raise NoSuchThing(f"the package has no extra {extra}")

    def _check_options(self, program: str, arguments: list[str]) -> None:
        """Those of a Python script are its own, not the launcher's in front of it."""
        script = next((place for place, word in enumerate(arguments) if word.endswith(".py")), None)
        if script is not None and "=" not in arguments[script]:
            self._check_options(arguments[script], arguments[script + 1 :])
            arguments = arguments[:script]
        asked = [found[0] for found in map(OPTION.match, arguments) if found]
        if not asked:
            return
        what = (program, arguments[0]) if arguments[0].isalpha() else (program,)
        known = self._options(what)
        for option in asked:  # a short one may have its value right behind it
            if option not in known and (option.startswith("--") or option[:2] not in known):
                raise NoSuchThing(f"{' '.join(what)} has no option {option}")

    def _options(self, what: tuple[str, ...]) -> set[str]:
        if what not in self.help:
            done = self._run([*what, "--help"])
            if done.returncode:
                raise NoSuchThing(f"{' '.join(what)} --help fails: {done.stderr.strip()}")
            self.help[what] = done.stdout
        return set(OPTION.findall(self.help[what]))

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )

# SPDX-License-Identifier: Apache-2.0
"""The pages of the tree: their fenced blocks, the comment right before each, and commands within the text."""

from __future__ import annotations

import dataclasses
import pathlib
import re

TREE = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("bench", "docs", "examples", "scripts", "src", "tests", "tools", ".github")
PAGES = sorted([*TREE.glob("*.md"), *(page for folder in FOLDERS for page in (TREE / folder).rglob("*.md"))])

BLOCK = re.compile(r"(?:^<!-- (?P<comment>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
# What made a table is told as it was called then.
TABLE = re.compile(r"^<!-- table .*?<!-- end of table -->$", re.M | re.S)
CODE = re.compile(r"`([^`]+)`")
NAME = re.compile(r"(?:# |/\* )(\w+\.\w+)")


@dataclasses.dataclass
class Block:
    page: pathlib.Path
    line: int
    comment: str  # "" where there is none
    kind: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(TREE)}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """What a reader saves it as: the name that its first line gives it."""
        found = NAME.match(self.text)
        return found[1] if found else None


def blocks_of(page: pathlib.Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("kind")) + 1, found["comment"] or "", found["kind"], found["text"])
        for found in BLOCK.finditer(text)
    ]


def prose_of(page: pathlib.Path) -> str:
    """Sentences, and tables written by hand."""
    return BLOCK.sub("", TABLE.sub("", page.read_text(encoding="utf-8")))


def code_in_text(page: pathlib.Path) -> list[str]:
    return [" ".join(code.split()) for code in CODE.findall(prose_of(page))]


def is_missing(path: str, tree: pathlib.Path = TREE) -> bool:
    """Whether a path from the top of the tree leads nowhere; nobody knows of what the build makes."""
    first, slash, rest = path.rstrip("/").partition("/")
    is_ours = slash and not first.startswith(("build", "..")) and (tree / first).is_dir()
    return bool(is_ours) and not any((tree / first).glob(rest))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
CODES = [(str(page.relative_to(TREE)), code) for page in PAGES for code in code_in_text(page)]

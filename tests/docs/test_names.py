# SPDX-License-Identifier: Apache-2.0
"""Files, folders and headings that the pages of the tree name or link to are there."""

import os
import re

import pages

FILE = re.compile(r"[\w.]+(/[\w.*-]*)+|\w+\.(c|h|md|py|sh)")
LINK = re.compile(r"\[[^\]]+\]\((?!https?:)(?P<file>[^)#]*)(#(?P<heading>[^)]*))?\)")


def names_in_the_tree():
    found = set()
    for _, folders, files in os.walk(pages.TREE):
        folders[:] = [each for each in folders if not each.startswith(("build", ".git"))]
        found |= set(files)
    return found


def test_files_that_are_named_are_there():
    """By their path from the top of the tree or, from anywhere, by their name; NAME is the reader's to choose."""
    names = names_in_the_tree()
    files = [(place, code) for place, code in pages.CODES if FILE.fullmatch(code) and "NAME" not in code]
    assert len(files) > 150
    assert [each for each in files if pages.is_missing(each[1])] == []
    assert [each for each in files if "/" not in each[1] and each[1] not in names] == []


def heading_names(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_nowhere(page, link):
    target = page.parent / link["file"] if link["file"] else page
    return not target.exists() or bool(link["heading"]) and link["heading"] not in heading_names(target)


def test_links_lead_somewhere():
    links = [(page, link) for page in pages.PAGES for link in LINK.finditer(pages.prose_of(page))]
    assert len(links) > 30
    assert [(str(page), link[0]) for page, link in links if leads_nowhere(page, link)] == []


def test_transports_have_a_row():
    """Each line of the list of transports, in the page that says which one to take."""
    listed = re.findall(r"^\s*X\((\w+),", (pages.TREE / "src/transport/transports.h").read_text("utf-8"), re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)`", (pages.TREE / "docs/c.md").read_text("utf-8"), re.MULTILINE)
    assert len(listed) >= 4
    assert set(listed) <= set(rows)

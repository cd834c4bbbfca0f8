"""Prose in the documentation has lines of at most 100 characters, so that a diff can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
LIMIT = 100


def long_lines(text: str) -> list[int]:
    """Numbers of the lines of prose that are too long; code, tables, pictures and HTML may be."""
    found, fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        start = line.lstrip()
        if start.startswith("```"):
            fenced = not fenced
        elif (
            not fenced and not line.startswith("    ") and not start.startswith(("|", "<", "![")) and len(line) > LIMIT
        ):
            found.append(number)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_of_prose_are_short(page: Path):
    assert long_lines(page.read_text("utf-8")) == []


def test_the_counter_counts():
    long = "x" * 101
    text = f"short\n{long}\n| {long} |\n```\n{long}\n```\n    {long}\n- {long}\n![{long}](y)\n{long}"
    assert long_lines(text) == [2, 8, 10]

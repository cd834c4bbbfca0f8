"""A number before a thing is written by `runtime.progress.counted`, so that one is no "1 votes"."""

from __future__ import annotations

import ast
import itertools
import re

import pytest
from support import ROOT

from palate.runtime.progress import counted

FLOORS = ("cli", "evaluate", "plan", "report", "runs", "studio", "train")
THINGS = (
    r"(?:(?:new|more|stored) )?(?:adapters|answers|checkpoints|choices|files|images|latents|metrics|pairs|pictures|"
    r"prompts|questions|rows|runs|seconds|seeds|sessions|steps|ties|updates|votes|wins)\b"
)
SEVERAL = {  # numbers that are never one
    "known.size": "prompts of a published set",
    "len(own)": "more than a form takes",
    "len(images)": "a reward is tried on two",
    "now": "a fraction, as 69 of 100",
    "num_metrics": "an evaluation has many",
    "taste.repeats.of": "one is said in other words",
    "start": "choices",
    "good": "choices",
    "most": "pairs",
}


def miscounted(source: str) -> list[str]:
    """The f-strings of a module in which a number is followed by its thing in the plural."""
    found = []
    for node in ast.walk(ast.parse(source)):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for value, text in itertools.pairwise(parts):
            if not isinstance(value, ast.FormattedValue) or not isinstance(text, ast.Constant):
                continue
            number = ast.unparse(value.value)
            plural = re.match(rf" {THINGS}", text.value)
            if plural and not number.isupper() and number not in SEVERAL:
                found.append(f"{number}{text.value[:30]}")
    return found


def miscounted_on_a_page(template: str) -> list[str]:
    """The same of a template: {{ number }} things."""
    found = re.findall(rf"\{{\{{ (\S+(?: \| length)?) \}}\}} {THINGS}", template)
    return [number for number in found if number not in SEVERAL]


@pytest.mark.parametrize("floor", FLOORS)
def test_one_of_a_thing_is_no_plural(floor):
    folder = ROOT / "src/palate" / floor
    modules = {path.name: miscounted(path.read_text("utf-8")) for path in folder.rglob("*.py")}
    pages = {path.name: miscounted_on_a_page(path.read_text("utf-8")) for path in folder.rglob("*.html")}
    assert {name: found for name, found in (modules | pages).items() if found} == {}


def test_the_reader_reads():
    assert miscounted('f"{n} votes: {MOST} pictures, {m} new votes of {k} voters"') == ["n votes: ", "m new votes of "]
    page = "<p>{{ votes }} votes, {{ rows | length }} rows, {{ most }} pairs</p>"
    assert miscounted_on_a_page(page) == ["votes", "rows | length"]
    assert (counted(0, "vote"), counted(1, "vote"), counted(2, "vote")) == ("0 votes", "1 vote", "2 votes")

"""tests/durations.txt: what is measured is marked `slow`, and what it names is there."""

from __future__ import annotations

import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import slow_tests

LOG = """
============================= slowest durations ==============================
9.50s setup    tests/a/test_a.py::test_one[x y]
2.25s call     tests/a/test_a.py::test_one[x y]
0.90s call     tests/a/test_a.py::test_two
FAILED tests/a/test_a.py::test_two - 3.00s call of something
"""


def test_set_up_and_call_are_added_and_written_slowest_first():
    found = slow_tests.measured(LOG)
    assert found == {"tests/a/test_a.py::test_one[x y]": pytest.approx(11.75), "tests/a/test_a.py::test_two": 0.9}
    text = slow_tests.written(found)
    assert text.splitlines()[0] == "11.8 tests/a/test_a.py::test_one[x y]"
    assert slow_tests.read(text) == {"tests/a/test_a.py::test_one[x y]": 11.8, "tests/a/test_a.py::test_two": 0.9}


def test_most_lines_name_a_test_that_is_there():
    """A test that was renamed keeps its line until the next measurement."""
    names = slow_tests.read(slow_tests.FILE.read_text("utf-8"))
    there = [
        name
        for file, _, function in (name.partition("::") for name in names)
        if (ROOT / file).is_file() and f"def {function.partition('[')[0]}(" in (ROOT / file).read_text("utf-8")
        for name in [f"{file}::{function}"]
    ]
    assert len(there) >= 0.8 * len(names)


class Item:
    def __init__(self, nodeid: str):
        self.nodeid, self.marks = nodeid, []

    def add_marker(self, mark: str) -> None:
        self.marks.append(mark)


def test_the_slow_ones_are_marked(request):
    ours = next(
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if str(getattr(plugin, "__file__", "")) == str(ROOT / "tests" / "conftest.py")
    )
    slowest = next(iter(slow_tests.read(slow_tests.FILE.read_text("utf-8"))))
    items = [Item(slowest), Item("tests/tools/test_slow_tests.py::test_the_slow_ones_are_marked")]
    ours.pytest_collection_modifyitems(items)
    assert [item.marks for item in items] == [["slow"], []]

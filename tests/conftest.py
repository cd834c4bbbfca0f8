"""Fixtures of all tests."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.commands import RECIPE

from palate import cli
from palate.testing import TinyFlow, tiny_reward

pytest_plugins = ["support.studio_fixtures"]

SLOW_SECONDS = 0.5  # from here on a test is left out of `make test-fast`
DURATIONS = Path(__file__).with_name("durations.txt")  # as measured; tools/slow_tests.py writes it


def pytest_collection_modifyitems(items):
    """Mark `slow` what was measured to be; where processes share the tests, the longest files come first."""
    rows = [line.split(" ", 1) for line in DURATIONS.read_text("utf-8").splitlines()]
    slow = {name for seconds, name in rows if float(seconds) >= SLOW_SECONDS}
    for item in items:
        if item.nodeid in slow:
            item.add_marker("slow")
    if "PYTEST_XDIST_WORKER" in os.environ:
        seconds = Counter()
        for took, name in rows:
            seconds[name.partition("::")[0]] += float(took)
        items.sort(key=lambda item: -seconds[item.nodeid.partition("::")[0]])


@pytest.fixture(scope="session", autouse=True)
def state_of_its_own(tmp_path_factory):
    """What a user has run is remembered in a home of the tests' own."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    os.environ.pop("XDG_STATE_HOME") if before is None else os.environ.update(XDG_STATE_HOME=before)


@pytest.fixture
def palate(monkeypatch, capfd):
    """Runs the command in this process: palate("train", ...) -> (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["palate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A recipe whose model and reward are the stand-ins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("palate.recipe.builder.build_model", lambda recipe, **options: TinyFlow())
    monkeypatch.setattr("palate.recipe.builder.reward_and_tower", lambda settings: (tiny_reward, None))
    monkeypatch.setattr("palate.cli.model_source.base_model", TinyFlow)
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(folder="runs/tiny"))
    return tmp_path


@pytest.fixture(scope="module")
def one_thread():
    """This process computes on one thread, as ranks do, and its children find what it finds."""
    before, path = torch.get_num_threads(), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    yield
    torch.set_num_threads(before)
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)

"""A command opens a run's recipe once, however many of its parts ask for it."""

from __future__ import annotations

import sys

import pytest

opened: list[str] = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and watching else None)
watching: list[bool] = []  # an audit hook cannot be taken away again: it listens while this is not empty


@pytest.mark.parametrize(
    "command",
    [
        ("resume", "runs/tiny", "trainer.steps=5"),
        ("sample", "runs/tiny", "--prompt", "a red fox", "--seeds", "0"),
        ("report", "runs/tiny"),
        ("steer", "runs/tiny", "--positive", "warm"),
        ("runs", "runs"),
    ],
    ids=["resume", "sample", "report", "steer", "runs"],
)
def test_a_command_opens_the_recipe_once(tiny, palate, command):
    code, _, err = palate("train", "tiny.yaml")
    assert code == 0, err
    opened.clear()
    watching.append(True)
    try:
        palate(*command)
    finally:
        watching.clear()
    assert sum(path.endswith("/recipe.yaml") or path == "recipe.yaml" for path in opened) == 1

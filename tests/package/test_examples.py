"""Every program of examples/ does what it says, in a few steps; the notebook runs and shows pictures."""

from __future__ import annotations

import importlib.util
import math

import nbclient
import nbformat
import pytest
from support import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "embedded_model.ipynb"


def main_of(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_own_model_learns_its_colours(tmp_path):
    assert main_of("own_model")(tmp_path, 30) > 0.2


@pytest.mark.slow
def test_own_reward_rises(tmp_path):
    assert main_of("own_reward")(tmp_path, 2) > 0


@pytest.mark.slow
def test_own_algorithm_trains(tmp_path):
    rewards = main_of("own_algorithm")(tmp_path, 2)
    assert len(rewards) == 2 and all(0 < value < 1 for value in rewards) and rewards[0] != rewards[1]


@pytest.mark.slow
def test_seeds_differ_and_are_compared_on_what_was_not_optimised(tmp_path, capsys):
    changes = main_of("three_seeds")(tmp_path, 1, seeds=(0, 1))
    assert {"reward/emoji", "reward/emoji-heldout"} <= set(
        changes
    ) and "reward/emoji-heldout" in capsys.readouterr().out
    assert all(len(values) == 2 and all(map(math.isfinite, values)) for values in changes.values())
    assert len(set(changes["reward/emoji"])) == 2


@pytest.mark.slow
def test_steering_changes_the_words_from_the_step_on_that_is_logged(tmp_path):
    (change,) = main_of("steering")(tmp_path, 6)
    assert (change["positive"], change["negative"]) == (["outline"], ["3d"]) and 4 <= change["step"] <= 6


def test_every_example_is_tested_here():
    source = (ROOT / "tests/package/test_examples.py").read_text("utf-8")
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        name for name in (path.stem for path in EXAMPLES.glob("*.py")) if f'main_of("{name}")' in source
    }


@pytest.mark.slow
def test_the_notebook_runs_and_shows_pictures(tmp_path):
    notebook = nbformat.read(NOTEBOOK, 4)
    stored = pictures(notebook)
    first = notebook.cells[[cell.cell_type for cell in notebook.cells].index("code")]
    last = notebook.cells[-1]
    assert "STEPS = 50 " in first.source and "[:24]" in last.source, "what is shown was made so; less runs every line"
    first.source = first.source.replace("STEPS = 50 ", "STEPS = 2 ")
    last.source = last.source.replace("[:24]", "[:2]")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert stored == pictures(notebook) == 3  # drawn, guided, before beside after


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)

"""An own algorithm, reward and objective by path: the commands that judge, show and search read them, from anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

FILES = Path(__file__).parent.parent / "support" / "their_package" / "src" / "their_package"
RECIPE = """
run: {folder: runs/own}
model: {name: emoji, lora_rank: 2}
algorithm: {name: algorithm.py:TheirAlgorithm, temperature: 0.2}
reward: {name: reward.py:score}
prompts: {list: [a dog, an apple]}
trainer: {steps: 1, batch_size: 2, guard: {every: 0}}
"""
SEARCH = """
optimize: {oracle: {function: "reward.py:score", batch: 4}, budget: 6, rounds: 1, heads: 2}
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of own parts with two recipes; the current one is another."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("algorithm.py", "reward.py"):
        shutil.copy(FILES / name, home / name)
    (home / "own.yaml").write_text(RECIPE)
    (home / "search.yaml").write_text(RECIPE.replace("reward: {name: reward.py:score}\n", "") + SEARCH)
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    return home, other


def well(palate, *words):
    code, out, error = palate("--quiet", *words)
    assert code == 0, (words, error)
    return out


def test_a_run_of_own_parts_is_judged_shown_and_compared(elsewhere, palate):
    home, other = elsewhere
    runs = [other / "a", other / "b"]
    for seed, run in enumerate(runs):
        well(palate, "train", home / "own.yaml", f"run.folder={run}", f"trainer.seed={seed}")
    found = json.loads(well(palate, "evaluate", *runs, "--count", 2, "--seeds", 1, "--json"))
    assert set(found["runs"]) == {"a", "b"}
    for evaluation in found["runs"].values():
        assert evaluation["optimised"] == ["reward.py:score"] and "reward/reward.py:score" in evaluation["metrics"]
    well(palate, "report", runs[0])
    page = (runs[0] / "report.html").read_text("utf-8")
    assert "reward.py:score" in page
    assert "reward.py:score" in well(palate, "compare", *runs, "--format", "csv")
    # the part has changed: it is to be read first, and then what is judged is told so
    with (home / "reward.py").open("a") as file:
        file.write("\n# another\n")
    code, _, error = palate("evaluate", runs[0], "--count", 1, "--seeds", 1)
    assert code == 2 and f"palate trust {home / 'reward.py'}" in error
    well(palate, "trust", home / "reward.py")
    code, _, error = palate("evaluate", runs[0], "--count", 1, "--seeds", 1)
    assert code == 0 and "reward reward.py:score: what it names has changed" in error


def test_a_search_asks_an_own_objective_and_trains_with_an_own_algorithm(elsewhere, palate):
    home, other = elsewhere
    run = other / "search"
    well(palate, "optimize", home / "search.yaml", f"run.folder={run}")
    answers = [json.loads(line) for line in (run / "queries.jsonl").read_text().splitlines()]
    assert sum("score" in row for row in answers) == 6
    well(palate, "report", run)
    found = json.loads(well(palate, "evaluate", run, "--count", 1, "--seeds", 1, "--json"))
    assert "reward/emoji-heldout" in found["runs"]["search"]["metrics"] and (run / "adapter").is_dir()

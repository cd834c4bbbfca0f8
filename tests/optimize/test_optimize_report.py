"""`palate report` and `palate evaluate` on the folder that `palate optimize` writes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from palate import recipe, report, runs
from palate.optimize import from_recipe
from palate.report import blackbox
from palate.rewards.simple import jpeg_size
from palate.runtime.errors import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("black-box") / "run"
    from_recipe(
        recipe.read(
            "optimize-emoji",
            [
                f"run.folder='{folder}'",
                "optimize.oracle={name: jpeg-size, batch: 4, noise: 0.3}",
                "optimize.budget=12",
                "optimize.rounds=2",
                "trainer.steps=1",
                "trainer.batch_size=2",
                "algorithm.rollout_steps=2",
                "sample.steps=2",
            ],
        ),
        say=lambda text: None,
    )
    return folder


def test_the_evaluation_judges_the_last_round_by_the_oracle_without_noise(folder):
    found = runs.evaluate_run(folder, prompts=["a dog on a blue background", "a cat on a red background"], seeds=[0])
    assert found["optimised"] == ["oracle-jpeg-size"]
    for side, key in (("result", "value"), ("base", "base")):
        images, _ = runs.read_samples(folder / "evaluation" / side)
        assert found["metrics"]["reward/oracle-jpeg-size"][key] == pytest.approx(
            float(-jpeg_size(images).mean() / 1000), rel=1e-5
        )
    assert found["verdict"]["text"].startswith("Optimised reward ")
    ours, _ = runs.trained_model(folder)
    plan = recipe.read(str(folder / "recipe.yaml"))
    last = recipe.build_model(plan)
    last.load_adapter(folder / "round-02/adapter")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), last.parameters(), strict=True))


def test_a_judge_that_was_the_oracle_is_no_independent_check(folder, tmp_path):
    other = runs.evaluate_run(folder, prompts=["a dog", "a cat"], seeds=[0])
    text = (folder / "recipe.yaml").read_text().replace("jpeg-size", "hidden-judge")
    shutil.copytree(folder / "evaluation", tmp_path / "evaluation")
    (tmp_path / "recipe.yaml").write_text(text)
    found = runs.evaluate_run(tmp_path, stored=True)
    assert found["optimised"] == ["oracle-hidden-judge"]
    assert "concepts, diversity and drift are not independent" in found["verdict"]["warnings"][-1]
    assert not any("independent" in text for text in other["verdict"]["warnings"])


def test_the_report_shows_what_was_asked(folder):
    page = report.write_report(folder).read_text("utf-8")
    assert "12 of 12: 12 answered, 0 failed" in page and "palate optimize " in page and "jpeg-size" in page
    asked = report.read_queries(folder)
    assert [row["query"] for row in asked] == list(range(12)) and {row["round"] for row in asked} == {1, 2}
    best = max((row for row in asked if row["round"] == 2), key=lambda row: row["score"])
    assert blackbox.query_grid(folder, asked)["rows"][1]["cells"][0]["src"] == report.picture(folder / best["file"])
    steps = [row["step"] for row in report.read_rounds(folder) if row.get("event") == "step"]
    assert steps == [1, 2]  # one update in each round, one after the other
    curve = blackbox.noiseless_scores(folder, asked, recipe.as_tree(recipe.read(str(folder / "recipe.yaml"))))
    noise = torch.tensor([row["score"] for row in asked]) - torch.tensor(curve)
    assert 0.1 < float(noise.std()) < 0.6
    images, _, _, _ = runs_answers(folder)
    torch.testing.assert_close(torch.tensor(curve), -jpeg_size(images[:]) / 1000)


def runs_answers(folder):
    from palate.optimize import Queries

    return Queries(folder).evaluated(2)


def test_curves_over_questions(tmp_path):
    """80 questions: bins of two; the best so far never falls; failed ones leave a gap, not a zero."""
    asked = [
        {"query": k, "round": 1, "file": f"queries/{k:06d}.png", "prompt": "a dog", "score": float(k % 10)}
        for k in range(82)
    ]
    for k in (3, 5):
        del asked[k]["score"]
        asked[k]["failed"] = "no"
    plain = {"optimize": {"oracle": {"function": "mine:score"}, "budget": 100, "surrogate": "ucb"}}
    (title, what, svg), *_ = blackbox.query_curves(tmp_path, asked, plain)
    assert title == "Scores of the queries" and "means of 2" in what and "best so far" in svg
    assert "best so far from 1 to 9" in svg
    assert "without noise" not in svg  # a question to one's own oracle would be a further one
    facts = dict(blackbox.query_summary(tmp_path, asked, plain))
    assert facts == {"Objective": "function mine:score", "Queries": "82 of 100: 80 answered, 2 failed"}


def test_an_oracle_of_ones_own_is_not_asked_again(folder, tmp_path):
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    tree["optimize"]["oracle"] |= {"name": None, "noise": 0.0, "function": "nowhere:score"}
    assert runs.RunFolder(folder).objective().description() == {"weights": {"oracle-jpeg-size": 1.0}}
    assert recipe.objective_of(recipe.parse(yaml.safe_dump(tree))).terms == ()
    shutil.copy(folder / "recipe.yaml", tmp_path / "recipe.yaml")
    with pytest.raises(CheckpointError, match="has no result yet"):
        runs.trained_model(tmp_path)
    assert "Queries" in report.write_report(tmp_path).read_text("utf-8")


def test_a_hostile_log_reads_nothing_outside(folder, tmp_path):
    shutil.copy(folder / "recipe.yaml", tmp_path / "recipe.yaml")
    row = {"query": 0, "round": 1, "index": 0, "prompt": "a dog", "file": "../secret.png", "score": 1.0}
    (tmp_path / "queries.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="expected a file in queries/"):
        report.write_report(tmp_path)

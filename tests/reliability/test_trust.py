"""Code that comes with a recipe or a run of somebody else does not run because somebody looks at it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from starlette.testclient import TestClient

from palate import recipe
from palate.recipe import RecipeError
from palate.rewards.load import load_reward
from palate.runtime import trust
from palate.runtime.code import code_digest, load_object
from palate.runtime.errors import InputError
from palate.runtime.files import file_digest
from palate.studio.app import make_app
from palate.taste.taste import load_objective

CODE = """from pathlib import Path
Path({marker!r}).touch()
def score(images, prompts):
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """(a run folder that names code of its own, what that code leaves behind where it runs)."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    run, marker = tmp_path / "runs/shared", tmp_path / "it-ran"
    run.mkdir(parents=True)
    (run / "evil.py").write_text(CODE.format(marker=str(marker)))
    tree = recipe.as_tree(recipe.read("srpo-emoji", [f"run.folder={run}"]))
    tree["reward"]["name"] = "evil.py:score"
    (run / "recipe.yaml").write_text(json.dumps(tree))
    (run / "metrics.jsonl").write_text('{"step": 0, "event": "reference"}\n')
    return run, marker


LOOKING = [  # those that read the recipe's meaning
    ["resume", "runs/shared"], ["sample", "runs/shared", "--prompt", "a dog"], ["evaluate", "runs/shared"],
    ["export", "runs/shared"], ["steer", "runs/shared", "--positive", "3d"], ["plan", "runs/shared/recipe.yaml"],
    ["doctor", "runs/shared/recipe.yaml"], ["train", "runs/shared/recipe.yaml", "--dry-run"],
    ["relocate", "runs/shared", "--from", "HERE", "--to", "THERE"],
]  # fmt: skip


@pytest.mark.parametrize("command", LOOKING, ids=lambda command: command[0])
@pytest.mark.parametrize("key", ["reward", "algorithm", "model"])
def test_looking_runs_nothing(command, key, theirs, palate):
    run, marker = theirs
    tree = json.loads((run / "recipe.yaml").read_text())
    tree["reward"]["name"] = "emoji"
    tree[key]["name"] = f"{run / 'evil.py'}:score"
    (run / "recipe.yaml").write_text(json.dumps(tree))
    there = shutil.copytree(run.parent, run.parent.with_name("there"))
    code, _, error = palate(*({"HERE": run.parent, "THERE": there}.get(part, part) for part in command))
    assert code == 2 and "evil.py is code that has not run here before" in error and not marker.exists()


@pytest.mark.parametrize("command", [["runs", "runs"], ["report", "runs/shared"]], ids=lambda command: command[0])
def test_what_shows_a_run_shows_it_without_its_code(command, theirs, palate):
    _, marker = theirs
    assert palate(*command)[0] == 0 and not marker.exists()


def test_a_taste_brings_no_code_along(theirs, tmp_path):
    run, marker = theirs
    about = {"source": f"{run / 'evil.py'}:score", "card": {}}
    save_file({"mean": torch.zeros(1)}, tmp_path / "taste.safetensors", {"taste": json.dumps(about)})
    with pytest.raises(InputError, match="a taste brings no code along"):
        load_objective(str(tmp_path), absolute=False, confidence=0.0, base=load_reward)
    assert not marker.exists()


def test_the_digest_of_a_module_is_found_without_importing_its_package(theirs, tmp_path):
    _, marker = theirs
    package = tmp_path / "their_pkg"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(marker)!r}, 'w')")
    (package / "scores.py").write_text("def score(images, prompts): ...")
    assert code_digest("their_pkg.scores:score") == file_digest(package / "scores.py") and not marker.exists()
    assert code_digest("their_pkg.none:score") == code_digest("no_such.thing:score") == ""


def test_opening_the_studio_runs_nothing(theirs):
    run, marker = theirs
    client = TestClient(make_app(run.parent, token="a-token-of-the-tests"), base_url="http://localhost")
    assert client.get("/?token=a-token-of-the-tests").status_code == 200
    for page in ("/", "/runs", "/runs/shared"):
        assert client.get(page).status_code < 500
    text = (run / "recipe.yaml").read_text().replace("evil.py", str(run / "evil.py"))
    answer = client.post("/recipe/check", data={"text": text})
    assert "has not run here before" in answer.text and not marker.exists()


def test_the_message_says_how_and_the_file_as_it_was_then_runs(theirs, palate):
    run, marker = theirs
    code, _, error = palate("steer", run, "--positive", "3d")
    assert code == 2 and f"palate trust {run / 'evil.py'}" in error and not marker.exists()
    assert palate("trust", run / "evil.py")[0] == 0
    assert palate("steer", run, "--positive", "3d")[0] == 0 and marker.exists()
    marker.unlink()
    (run / "evil.py").write_text(CODE.format(marker=str(marker)) + "# changed on a shared disk\n")
    code, _, error = palate("resume", run)
    assert code == 2 and "or is not what ran" in error and not marker.exists()
    assert palate("trust", run / "none.py")[0] == 2


def test_what_was_trained_by_is_known_and_its_recipe_may_be_looked_at_after_a_change(theirs):
    run, marker = theirs
    file = run / "evil.py"
    load_object(f"{file}:score", key="reward.name")  # as training does
    assert recipe.read(str(run / "recipe.yaml"), stored=True).reward.name == f"{file}:score"
    file.write_text(file.read_text() + "# still being written\n")
    marker.unlink()
    with pytest.raises(RecipeError, match="or is not what ran"):
        recipe.read(str(run / "recipe.yaml"), stored=True)
    assert not marker.exists()
    with trust.only_looking("recipe"):
        recipe.read(str(run / "recipe.yaml"))
    assert marker.exists()


def test_a_home_that_cannot_be_written_to_is_said(theirs, palate, monkeypatch, tmp_path):
    run, _ = theirs
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    code, _, error = palate("trust", run / "evil.py")
    assert code == 2 and "set PALATE_TRUST_CODE=1" in error
    monkeypatch.setenv("PALATE_TRUST_CODE", "1")
    assert palate("steer", run, "--positive", "3d")[0] == 0


def test_the_stricter_look_stays_inside_the_other(theirs):
    run, _ = theirs
    load_object(f"{run / 'evil.py'}:score", key="reward.name")
    (run / "evil.py").write_text("def score(images, prompts):\n    return None\n")
    with trust.only_looking("run"), trust.only_looking("recipe"), pytest.raises(InputError, match="not what ran"):
        load_object(f"{run / 'evil.py'}:score", key="reward.name")

"""Runs whose base, prompts or neighbours were moved: one command says where they lie, and the runs stay as they are."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib.resources import files
from types import SimpleNamespace

import pytest
from support.commands import SMALL

from palate import recipe
from palate.optimize.start import identity_of
from palate.recipe.relocation import gone, relocated, remembering, with_first_texts
from palate.runs.relocate import relocation
from palate.runtime.errors import InputError
from palate.studio.moved import follow_move
from palate.studio.runview import RunView
from palate.studio.workspace import Workspace

LIST = next(part for part in SMALL if part.startswith("prompts="))


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run of one step on a base and a file of prompts beside it."""
    from palate.train import Job, run_job

    home = tmp_path_factory.mktemp("before")
    shutil.copytree(str(files("palate") / "assets/emoji"), home / "disk/base")
    (home / "disk/prompts.txt").write_text("a dog\nan apple\n")
    made = recipe.read("srpo-emoji", [
        *(part for part in SMALL if part != LIST), f"prompts={{file: {home / 'disk/prompts.txt'}}}",
        f"run.folder={home / 'disk/runs/mine'}", f"model.folder={home / 'disk/base'}",
    ])  # fmt: skip
    parts = recipe.build(made)
    run_job(Job(
        parts.model, parts.algorithm, parts.reward, parts.prompts, home / "disk/runs/mine", made.trainer,
        parts.preview_prompts, identity=recipe.run_identity(made), recipe=recipe.dump(made),
        kept=recipe.identity_text(made),
    ), progress=False)  # fmt: skip
    return home / "disk"


@pytest.fixture
def moved(before, tmp_path):
    """(where all of it lay, where it lies now); the first is empty while the test runs."""
    shutil.copytree(before, tmp_path / "now")
    away = before.rename(before.with_name("away"))
    yield SimpleNamespace(old=before, new=tmp_path / "now", run=tmp_path / "now/runs/mine")
    away.rename(before)


def test_a_run_goes_on_bit_for_bit_after_its_files_were_moved(moved, palate, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for command in (["resume", moved.run, "trainer.steps=2"],
                    ["sample", moved.run, "--prompt", "a dog", "--seeds", "0", "--out", "drawn"]):  # fmt: skip
        code, _, error = palate(*command)
        assert code == 2 and f"palate relocate {moved.run} --from {moved.old / 'base'} --to NEW" in error, command
    code, out, _ = palate("relocate", moved.run, "--from", moved.old, "--to", moved.new)
    assert code == 0 and out == f"{moved.run}: run.folder, model.folder, prompts.file\n"
    kept = json.loads((moved.run / "relocated.json").read_text())
    assert kept == {"model.folder": [str(moved.old / "base"), str(moved.new / "base")]}
    assert palate("resume", moved.run, "trainer.steps=2")[0] == 0
    assert palate("resume", moved.run, "trainer.steps=3")[0] == 0  # from a checkpoint made after the move
    assert palate("sample", moved.run, "--prompt", "a dog", "--seeds", "0", "--out", "drawn")[0] == 0
    code, _, error = palate("resume", moved.run, "trainer.steps=4", "trainer.lr=1e-3")
    assert code == 2 and "would change the run itself" in error
    shutil.copytree(moved.old.with_name("away"), moved.old)
    assert palate("resume", moved.old / "runs/mine", "trainer.steps=3")[0] == 0  # the one that was never moved
    weights = [(disk / "runs/mine/adapter/pytorch_lora_weights.safetensors").read_bytes()
               for disk in (moved.old, moved.new)]  # fmt: skip
    assert weights[0] == weights[1]
    shutil.rmtree(moved.old)


def test_another_file_or_none_at_the_new_place_is_refused_and_nothing_is_written(moved, palate):
    whole = shutil.copytree(moved.run, moved.new / "runs/other")
    texts = [(run / "recipe.yaml").read_text() for run in (whole, moved.run)]
    code, _, error = palate("relocate", moved.run, "--from", moved.old, "--to", moved.new / "nowhere")
    assert code == 2 and f"model.folder: nothing lies at {moved.new / 'nowhere/base'}" in error
    code, _, error = palate("relocate", moved.run, "--from", f"{moved.old}x", "--to", moved.new)
    assert code == 2 and f"nothing of {moved.run} lies under {moved.old}x" in error
    (moved.new / "prompts.txt").write_text("a cat\n")
    code, _, error = palate("relocate", whole, moved.run, "--from", moved.old, "--to", moved.new)
    assert code == 2 and "prompts.file: what it names has changed since the run began" in error
    assert [(run / "recipe.yaml").read_text() for run in (whole, moved.run)] == texts
    (moved.new / "prompts.txt").write_text("a dog\nan apple\n")
    (moved.run / "identity.json").write_text(json.dumps({"prompts.file": "0" * 64}))
    code, _, error = palate("relocate", whole, moved.run, "--from", moved.old, "--to", moved.new)
    assert code == 2 and (whole / "recipe.yaml").read_text() == texts[0]  # the second is wrong: the first waits


def test_paths_alone_are_named_anew_and_whole_folders_of_them():
    tree = {
        "run": {"folder": "runs/a"},
        "model": {"folder": "/old/base", "file": "/old", "start": "/older/base", "name": "/old/my.py:Mine"},
        "prompts": {"list": ["/old/base is no path"], "file": "/old/a b.txt"},
        "reward": {"weights": {"/old/own.py:score": 1.0},
                   "source": {"taste": "/old/t:0.5, /old/u:1", "checklist": "/old/q.jsonl http://h/old#m"}},
        "algorithm": {"positive": ["/old/x"], "teachers": {"a": {"adapter": "/old/a"}}},
    }  # fmt: skip
    now, changed = relocated(tree, "/old", "/new")
    assert now == {
        "run": {"folder": "runs/a"},
        "model": {"folder": "/new/base", "file": "/new", "start": "/older/base", "name": "/new/my.py:Mine"},
        "prompts": {"list": ["/old/base is no path"], "file": "/new/a b.txt"},
        "reward": {"weights": {"/new/own.py:score": 1.0},
                   "source": {"taste": "/new/t:0.5, /new/u:1", "checklist": "/new/q.jsonl http://h/old#m"}},
        "algorithm": {"positive": ["/old/x"], "teachers": {"a": {"adapter": "/new/a"}}},
    }  # fmt: skip
    assert changed["algorithm.teachers.a.adapter"] == "/old/a" and changed["reward.source.taste"].startswith("/old/t")
    kept = remembering({}, changed, now)
    assert not {"prompts.file", "model.name"} & kept.keys()  # their content counts, not their place
    assert kept["model.folder"] == ["/old/base", "/new/base"] and with_first_texts(now, kept)["model"] == {
        **tree["model"], "name": "/new/my.py:Mine"
    }  # fmt: skip
    newest, moved_again = relocated(now, "/new", "/newest")
    again = remembering(kept, moved_again, newest)
    assert again["model.folder"] == ["/old/base", "/newest/base"]  # the first of all
    assert with_first_texts({"model": {"folder": "/another"}}, again)["model"]["folder"] == "/another"
    missing = list(gone(now))
    assert ("reward.source.taste", "/new/t") in missing and ("reward.source.taste", "/new/u") in missing
    keys = {key for key, _ in missing}
    assert {"model.folder", "prompts.file"} <= keys and not {"run.folder", "prompts.list"} & keys
    assert list(gone({"reward": {"source": {"taste": "/:-1.5e-1"}}})) == []  # a folder and its weight


def test_a_run_from_python_keeps_its_head_and_folders_that_are_no_runs_are_passed_over(tmp_path, palate):
    run, old = tmp_path / "runs/a", tmp_path / "was"
    (tmp_path / "runs/studio").mkdir(parents=True)
    run.mkdir()
    (run / "recipe.yaml").write_text(
        f"# begun from Python\nrun: {{folder: {old}/a}}\nmodel: {{name: 'python:Mine'}}\nreward: {{name: emoji}}\n"
    )
    code, out, _ = palate("relocate", run, tmp_path / "runs/studio", "--from", old, "--to", tmp_path / "runs")
    assert code == 0 and out == f"{run}: run.folder\n"
    text = (run / "recipe.yaml").read_text()
    assert text.startswith("# begun from Python\n") and f"folder: {run}" in text


def test_a_search_and_a_run_keep_their_identity():
    made = recipe.read("optimize-emoji", ["model.folder=/old/base", "optimize.features_source=/old/f"])
    now = dataclasses.replace(
        made, model=dataclasses.replace(made.model, folder="/new/base"),
        optimize=dataclasses.replace(made.optimize, features_source="/new/f"),
    )  # fmt: skip
    moves = {"model.folder": ["/old/base", "/new/base"], "optimize.features_source": ["/old/f", "/new/f"]}
    assert identity_of(now) != identity_of(made) == identity_of(now, moves)
    assert recipe.run_identity(now) != recipe.run_identity(made) == recipe.run_identity(now, moves)
    assert recipe.fingerprint(now, {"model.folder": ["/other", "/new/base"]}) != recipe.fingerprint(made)


def test_a_run_that_trains_is_left_alone(moved, monkeypatch):
    def busy(folder, what):
        raise InputError(f"{folder} is being trained; {what}")

    monkeypatch.setattr("palate.runs.relocate.require_free", busy)
    with pytest.raises(InputError, match="is being trained; its recipe stays as it is"):
        relocation(moved.run, str(moved.old), str(moved.new))


def test_a_studios_folder_of_runs_that_was_moved_is_followed(tmp_path):
    runs = tmp_path / "first/runs"
    for name, more in (("align-1", []), ("align-2", [f"model.start={runs / 'align-1/adapter'}"])):
        (runs / name / "adapter").mkdir(parents=True)
        made = recipe.read("taste-emoji", [f"run.folder={runs / name}", *more])
        (runs / name / "recipe.yaml").write_text(recipe.dump(made))
    copied = shutil.copytree(runs, tmp_path / "copied")

    def view(run):
        return RunView(run.name, run, "finished", "", recipe.read(str(run / "recipe.yaml")), [], [])

    follow_move(Workspace(copied))
    assert not view(copied / "align-2").needs(copied / "align-1")  # the first folder is there: which one is meant?
    now = (tmp_path / "first").rename(tmp_path / "second") / "runs"
    assert not view(now / "align-2").needs(now / "align-1")
    (now / "align-3").mkdir()
    (now / "align-3/recipe.yaml").write_text(
        recipe.dump(recipe.read("taste-emoji", [f"run.folder={runs / 'align-3'}"]))
    )
    (now / "align-3/.owner").symlink_to(tmp_path / "elsewhere")  # one that cannot be written keeps no studio from it
    follow_move(Workspace(now))
    assert view(now / "align-2").needs(now / "align-1") and view(now / "align-2").began_with == "align-1"
    assert str(now / "align-1") in (now / "align-1/recipe.yaml").read_text()

"""Parts that are not Palate's: by path in a recipe, and of an installed package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from palate import recipe, runs
from palate.evaluate import EvaluationPanel
from palate.rewards.table import HELD_OUT_CANDIDATES
from palate.runtime.code import code_digest
from palate.runtime.errors import InputError

PACKAGE = Path(__file__).parent.parent / "support" / "their_package"
FILES = PACKAGE / "src" / "their_package"
RECIPE = """
run: {{folder: runs/own}}
model: {{name: {model}}}
algorithm: {{name: {algorithm}, temperature: 0.2}}
reward: {{name: {reward}}}
prompts: {{file: list.txt}}
trainer: {{steps: 2, batch_size: 2, checkpoint_every: 1, guard: {{every: 0}}}}
"""
BY_PATH = {"model": "model.py:TheirModel", "algorithm": "algorithm.py:TheirAlgorithm", "reward": "reward.py:score"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with the three files, a list of prompts and a recipe that names them by relative paths."""
    for name in ("model", "algorithm", "reward"):
        (tmp_path / f"{name}.py").write_text((FILES / f"{name}.py").read_text())
    (tmp_path / "list.txt").write_text("a red fox\na blue whale\n")
    (tmp_path / "own.yaml").write_text(RECIPE.format(**BY_PATH))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_parts_by_path_train_go_on_and_are_judged_from_another_folder(own, palate, tmp_path, monkeypatch):
    code, _, err = palate("train", "own.yaml")
    assert code == 0, err
    stored = yaml.safe_load((own / "runs/own/recipe.yaml").read_text())
    assert stored["reward"]["name"] == str(own / "reward.py:score")
    assert stored["prompts"]["file"] == str(own / "list.txt")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    code, _, err = palate("resume", own / "runs/own", "trainer.steps=3")
    assert code == 0, err
    rows = [json.loads(line) for line in (own / "runs/own/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("event") == "step"] == [1, 2, 3] and "weight" in rows[-1]
    for command in (
        ("report", own / "runs/own"),
        ("sample", own / "runs/own", "--prompt", "a red fox", "--seeds", "0"),
    ):
        code, _, err = palate(*command)
        assert code == 0, err
    panel = EvaluationPanel({"held": lambda images, prompts: images.mean((1, 2, 3))}, "held", Blind())
    found = runs.evaluate_run(own / "runs/own", prompts=["a red fox"], seeds=[0, 1], panel=panel)
    assert found["optimised"] == ["reward.py:score"] and "reward/reward.py:score" in found["metrics"]


class Blind:
    styles, concepts = (), ()
    features = staticmethod(lambda images: images.flatten(1))


def test_a_reward_by_path_can_be_weighed_and_has_its_sources(own):
    made = recipe.read("own.yaml", ["reward.name=null", "reward.weights={reward.py:score: 2.0, warmth: 1.0}"])
    name = str(own / "reward.py:score")
    assert made.reward.weights == {name: 2.0, "warmth": 1.0}
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = 2 * images[:, 0].mean((1, 2)) + images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
    torch.testing.assert_close(recipe.build_reward(made.reward)(images, ["a"] * 3), expected)
    assert recipe.objective_of(made).description()["weights"] == {"reward.py:score": 2.0, "warmth": 1.0}


def test_a_changed_file_is_another_run(own):
    before = recipe.fingerprint(recipe.read("own.yaml"))
    assert (
        before == recipe.fingerprint(recipe.read("own.yaml")) and len(code_digest(str(own / "reward.py:score"))) == 64
    )
    for name in ("reward", "algorithm", "model"):
        file = own / f"{name}.py"
        text = file.read_text()
        file.write_text(text + "\n# changed\n")
        assert recipe.fingerprint(recipe.read("own.yaml")) != before, name
        file.write_text(text)
    (own / "list.txt").write_text("a red fox\na green frog\n")
    assert recipe.fingerprint(recipe.read("own.yaml")) != before


SHORT = """
def score(images): ...
class Score:
    def __call__(self, images, prompts, scale): ...
class Model:
    @classmethod
    def load(cls, folder, training): ...
"""
WRONG = [
    ("reward.name=nowhere.py:score", "reward.name: nowhere.py does not exist"),
    ("reward.name=reward.py:rate", "has no rate; it has score"),
    ("algorithm.name=algorithm.py:Mine", "has no Mine"),
    ("algorithm.temperature=-1", "temperature must be positive"),
    ("algorithm.temprature=1", "did you mean algorithm.temperature?"),
    ("model.name=model.py:Mine", "has no Mine"),
    ("algorithm.name=broken.py:Mine", "cannot be imported (SyntaxError"),
    ("reward.name=short.py:score", "reward.name: short.py:score is called as (images, prompts): too many positional"),
    ("reward.name=short.py:Score", "reward.name: short.py:Score is called as (images, prompts): missing a required"),
    ("model.name=short.py:Model", "Model.load is called as (folder, training, lora_rank, "),
    ("model.name=short.py:score", "score.load is called as (folder, training, lora_rank, "),
]


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[each for each, _ in WRONG])
def test_what_is_wrong_with_a_part_is_a_sentence(own, palate, override, message):
    (own / "broken.py").write_text("class Mine(:\n")
    (own / "short.py").write_text(SHORT)
    code, _, err = palate("train", "own.yaml", override)
    assert code == 2 and message in err and "Traceback" not in err, err


@pytest.mark.slow
def test_an_installed_package_adds_all_three_kinds(tmp_path):
    """pip installs it into a folder; no file of Palate knows it; `palate train` trains with its parts."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", str(PACKAGE), str(source)], check=True)
    subprocess.run([*command, "--target", str(tmp_path / "site"), str(source)], check=True, timeout=120)
    (tmp_path / "list.txt").write_text("a red fox\na blue whale\n")
    parts = {"model": "their-model", "algorithm": "their-algorithm", "reward": "their-reward"}
    (tmp_path / "own.yaml").write_text(RECIPE.format(**parts))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "palate", "train", "own.yaml"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/own/metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("event") == "step" for row in rows) == 2


def test_what_a_run_was_started_with_is_kept_and_compared(own, palate):
    """resume refuses, sample says so; a line that the run never saw counts as well."""
    code, _, err = palate("train", "own.yaml")
    assert code == 0, err
    kept = json.loads((own / "runs/own/identity.json").read_text())
    assert set(kept) == {"prompts.file", "model.name", "algorithm.name", "reward reward.py:score"}
    (own / "list.txt").write_text("a red fox\na blue whale\na green frog\n")
    code, _, err = palate("resume", "runs/own", "trainer.steps=3")
    assert code == 2 and "prompts.file: what it names has changed" in err and "start a new run" in err
    code, _, err = palate("sample", "runs/own", "--prompt", "a red fox", "--seeds", "0")
    assert code == 0 and "prompts.file: what it names has changed" in err


CONSISTENT = ("algorithm.estimator=consistency", "algorithm.estimator_guidance=1")
FROZEN = {
    "model.training_adapter": ("srpo-emoji", "model.training_adapter={}"),
    "model.start": ("srpo-emoji", "model={{start: {}, reference: start, lora_rank: 2}}"),
    "model.consistency": ("sqdf-emoji", "model.consistency={}", *CONSISTENT),
    "algorithm.teachers.one.adapter": ("opd-emoji", "algorithm.teachers={{one: {{adapter: {}}}}}"),
    "algorithm.teachers.one.file": ("opd-emoji", "algorithm.teachers={{one: {{adapter: none, file: {}}}}}"),
}


@pytest.mark.parametrize("key", FROZEN)
def test_another_frozen_lora_is_refused(key, tmp_path):
    """Reference, teachers and the like, which a run reads anew; a run from before has kept none of them."""
    name, *overrides = FROZEN[key]
    place = tmp_path / ("list.txt" if key.endswith("file") else "lora.safetensors")
    place.write_bytes(b"one\n")
    made = recipe.read(name, [override.format(place) for override in overrides])
    (tmp_path / "identity.json").write_text(text := recipe.identity_text(made))
    assert key in json.loads(text)
    recipe.check_identity(tmp_path, made)
    before = recipe.run_identity(made)
    place.write_bytes(b"another\n")
    with pytest.raises(InputError, match=f"^{key}: what it names has changed.*\nrestore it, or start a new run"):
        recipe.check_identity(tmp_path, made)
    assert recipe.run_identity(made) == before
    (tmp_path / "identity.json").write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != key}))
    recipe.check_identity(tmp_path, made)


def test_a_start_that_is_no_reference_may_go_on(tmp_path):
    """The checkpoints have what became of it: a run goes on after the one that it began with has."""
    (tmp_path / "lora.safetensors").write_bytes(b"one")
    made = recipe.read("srpo-emoji", [f"model.start={tmp_path / 'lora.safetensors'}"])
    assert "model.start" not in json.loads(recipe.identity_text(made))


URL = "http://127.0.0.1:9/v1/chat/completions"
OTHER_SOURCES = {
    "reward.source.taste": ("reward={{name: taste, source: {{taste: '{place}:0.5, {place}:1'}}}}", "taste.safetensors"),
    "reward.source.pickscore": (
        "reward={{name: taste, source: {{taste: '{place}', pickscore: '{place}/model'}}}}", "model/model.safetensors",
    ),
    "reward.source.mine.py:Mine": (
        "reward={{name: '{place}/mine.py:Mine', source: {{'{place}/mine.py:Mine': '{place}/list.txt'}}}}", "list.txt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER_SOURCES)
def test_what_a_reward_is_made_of_is_the_same_when_a_run_goes_on(key, tmp_path):
    """A taste that was learnt anew in its folder, and what a reward of one's own reads. Older runs have kept none."""
    override, file = OTHER_SOURCES[key]
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, source): pass\n")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"one")
    made = recipe.read("srpo-emoji", [override.format(place=tmp_path)])
    (tmp_path / "identity.json").write_text(recipe.identity_text(made))
    before = recipe.run_identity(made)
    recipe.check_identity(tmp_path, made)
    (tmp_path / file).write_bytes(b"another")
    with pytest.raises(InputError, match=f"^{key}: what it names has changed"):
        recipe.check_identity(tmp_path, made)
    assert recipe.run_identity(made) == before  # of checkpoints from before this was kept


@pytest.mark.parametrize("name", HELD_OUT_CANDIDATES)
def test_a_head_stands_on_any_tower_that_is_named_and_on_the_same_when_a_run_goes_on(name, tmp_path):
    """As the message says that asks for one: also on a tower that is neither optimised nor judges the result."""
    weights = tmp_path / "tower.safetensors"
    weights.write_bytes(b"one")
    text = "model: {name: sdxl, folder: a/b}\nalgorithm: {name: distar, head_queries: 16}\nprompts: {list: [a fox]}\n"
    made = recipe.parse(f"{text}reward: {{name: jpeg_size, source: {{{name}: {weights}}}}}\n")
    (tmp_path / "identity.json").write_text(recipe.identity_text(made))
    recipe.check_identity(tmp_path, made)
    weights.write_bytes(b"another")
    with pytest.raises(InputError, match=f"^reward.source.{name}: what it names has changed"):
        recipe.check_identity(tmp_path, made)
    with pytest.raises(InputError, match=f"reward.source.{name}: {name} is in neither"):
        recipe.parse(f"reward: {{name: emoji, source: {{{name}: {weights}}}}}\n{text.replace('sdxl', 'emoji')}")


@pytest.mark.parametrize("name", ["vlm-judge", "checklist"])
def test_another_judge_is_refused_and_another_address_is_not(name, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "a dog", "questions": ["Is there a dog?"]}\n')

    def judged_by(url):
        source = f"{tmp_path / 'q.jsonl'} {url}" if name == "checklist" else url
        return recipe.read("grpo-emoji", [f"reward={{name: {name}}}", f"reward.source.{name}={source}"])

    (tmp_path / "identity.json").write_text(recipe.identity_text(judged_by(f"{URL}#first-judge-of-all")))
    recipe.check_identity(tmp_path, judged_by("http://127.0.0.1:10/v1#first-judge-of-all"))
    other = judged_by(f"{URL}#first-judge-of-some")
    with pytest.raises(InputError, match=r"changed.*\(first-judge-of-all, now first-judge-of-some\)"):
        recipe.check_identity(tmp_path, other)
    assert recipe.run_identity(other) == recipe.run_identity(judged_by(f"{URL}#x"))


def test_the_folders_of_a_sum_of_tastes_are_found_from_any_folder(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    made = recipe.read("srpo-emoji", ["reward={name: taste, source: {taste: 'a:0.5, b'}}"])
    assert made.reward.source["taste"] == f"{tmp_path / 'a'}:0.5, {tmp_path / 'b'}"

"""`palate train` with a guard and `palate evaluate` on models other than the embedded one: tiny random weights of the
real classes, judged by a two-tower reward that the run did not optimise."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from support.tiny_families import save_clip, saved

from palate import cli, recipe, runs
from palate.evaluate import published_panel
from palate.recipe import RecipeError, evaluators
from palate.recipe.evaluators import allowed_fall
from palate.rewards.located import standings
from palate.rewards.table import HELD_OUT_CANDIDATES
from palate.runs import evaluation, protocol


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


PROMPTS = ["a grandmother in a garden", "a red boat", "two cats", "rain over a city"]


def text(towers, run, **sections):
    """A recipe that trains the tiny Stable Diffusion for two updates."""
    tree = {
        "run": {"folder": str(run)},
        "model": {"name": "stable-diffusion", "folder": str(saved("stable-diffusion")[0]), "image_size": 32,
                  "dtype": "float32", "device": "cpu", "lora_rank": 2, "text_cache": str(towers.parent / "text")},
        "reward": {"name": "pickscore", "source": {"pickscore": str(towers), "clip-score": str(towers)}},
        "algorithm": {"name": "draft", "K": 1, "n": 0, "steps": 2, "guidance": 1.0},
        "prompts": {"list": PROMPTS},
        "trainer": {"steps": 2, "batch_size": 2, "lr": 0.01, "preview_every": 0,
                    "guard": {"every": 1, "prompts": 4, "action": "warn"}},
        "sample": {"steps": 2, "guidance": 2.0},
        "evaluate": {"prompts": 4, "seeds": 2},
    }  # fmt: skip
    return json.dumps({key: tree.get(key, {}) | sections.get(key, {}) for key in tree})


def test_a_run_of_a_real_family_is_guarded_and_evaluated(towers, tmp_path, capsys):
    run = tmp_path / "run"
    (tmp_path / "mine.yaml").write_text(text(towers, run))
    cli.app(["train", str(tmp_path / "mine.yaml")], standalone_mode=False)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    checks = [row for row in log if row["event"] == "guard"]
    assert [row["step"] for row in checks][-1] == 2 and all("heldout" in row and "variety" in row for row in checks)
    assert checks[0]["heldout_fall"] == checks[0]["drift"] == 0 and checks[-1]["drift"] > 0
    cli.app(["evaluate", str(run)], standalone_mode=False)
    found = json.loads((run / "evaluation.json").read_text())
    assert found["optimised"] == ["pickscore"] and found["heldout"] == "clip-score"
    names = {"reward/pickscore", "reward/clip-score", "reward/jpeg_size", "diversity", "vendi", "copy", "saturation"}
    assert names <= set(found["metrics"]) and not {"concept", "diversity_same_style"} & set(found["metrics"])
    assert found["verdict"]["text"].startswith("Optimised reward") and found["images"] == 8
    assert all(0 <= row["feature_distance"] < 1 and "style" not in row for row in found["rows"])
    page = (run / "evaluation.html").read_text("utf-8")
    assert "a grandmother in a garden" in page and "clip-score" in page
    images, rows = runs.read_samples(run / "evaluation" / "result")
    reward = recipe.load_reward("clip-score", str(towers))
    again = float(reward(images, [row["prompt"] for row in rows]).mean())
    assert found["metrics"]["reward/clip-score"]["value"] == pytest.approx(again, rel=1e-4)
    before = (run / "evaluation.json").read_bytes()
    cli.app(["evaluate", str(run), "--stored"], standalone_mode=False)
    assert (run / "evaluation.json").read_bytes() == before


def test_who_judges(towers, tmp_path, monkeypatch):
    def plan(**sections):
        return recipe.parse(text(towers, tmp_path, **sections))

    assert recipe.heldout_of(plan()) == "clip-score"
    assert recipe.heldout_of(plan(reward={"name": "clip-score"})) == "pickscore"
    assert recipe.heldout_of(plan(evaluate={"heldout": "hpsv2"}, reward={"source": {"hpsv2": "x"}})) == "hpsv2"
    taste = plan(reward={"name": "taste", "source": {"taste": "tastes/mine"}})
    assert recipe.heldout_of(taste) == "clip-score"  # while there is no taste to be read
    with monkeypatch.context() as patch:
        patch.setattr("palate.recipe.cross_checks.source_of", lambda folder: "clip-score")
        assert recipe.heldout_of(taste) == "pickscore"  # a taste is a function of its reward's features
    every = {"name": None, "weights": {name: 1.0 for name in HELD_OUT_CANDIDATES}}
    with pytest.raises(ValueError, match=r"reward.weights: clip-score, pickscore, hpsv2 are all optimised"):
        recipe.panel_of(plan(reward=every))
    assert recipe.heldout_of(recipe.read("srpo-emoji")) == "emoji-heldout"
    assert recipe.guard_measure(recipe.read("srpo-emoji")) is None
    assert recipe.guard_measure(plan(trainer={"guard": {"every": 0}})) is None
    with pytest.raises(RecipeError, match=r"evaluate.heldout: pickscore is what is optimised; give another of clip"):
        plan(evaluate={"heldout": "pickscore"})
    with pytest.raises(RecipeError, match=r"evaluate.heldout: the embedded model has a judge"):
        recipe.read("srpo-emoji", ["evaluate.heldout=hpsv2"])
    with pytest.raises(RecipeError, match=r"reward.source.hpsv2: hpsv2 is in neither"):
        plan(reward={"source": {"hpsv2": "x"}})


def test_the_guard_asks_a_reward_that_nothing_optimises(towers, tmp_path, monkeypatch):
    """The one that judges the result, else another whose weights are here; of a taste, or a head, none that it may
    stand on."""
    here = set(HELD_OUT_CANDIDATES)
    monkeypatch.setattr(evaluators, "located", lambda name, source: source or ("" if name in here else None))
    monkeypatch.setattr(evaluators, "load_reward", lambda name, *where: name)

    def asked(*, name=None, weights=None, source=None, heldout=None):
        reward = {"name": name, "weights": weights, "source": source or {}}
        made = recipe.parse(text(towers, tmp_path, reward=reward, evaluate={"heldout": heldout}))
        return recipe.guard_measure(made).heldout

    assert asked(name="pickscore") == "clip-score" and asked(name="pickscore", heldout="hpsv2") == "hpsv2"
    assert asked(name="clip-score") == "pickscore"
    assert asked(weights=dict.fromkeys(HELD_OUT_CANDIDATES, 1.0)) is None
    taste = {"name": "taste", "source": {"taste": "x", "clip-score": "y"}}
    assert asked(**taste) == "pickscore"
    head = "model: {name: sdxl, folder: a/b}\nalgorithm: {name: distar, head_queries: 16}\nprompts: {list: [a fox]}\n"
    made = recipe.parse(f"{head}reward: {{name: jpeg_size, source: {{clip-score: y}}}}\n")
    assert evaluators._heldout_at_hand(made) == "pickscore"
    here -= {"clip-score", "hpsv2"}
    assert asked(name="brightness") == "pickscore" and asked(name="pickscore", heldout="hpsv2") is None


def test_judges_compute_where_the_model_does(towers, tmp_path, monkeypatch):
    """As far as the machine has it: what was drawn on a GPU can be judged where there is none."""

    def devices(**model):
        tree = json.loads(text(towers, tmp_path))
        tree["model"] = {key: value for key, value in tree["model"].items() if key != "device"} | model
        plan = recipe.parse(json.dumps(tree))
        judges = protocol.protocol_panel([SimpleNamespace(recipe=plan)], standings({"clip-score": str(towers)}))
        return {recipe.panel_of(plan).device.type, judges.device.type}

    assert devices() == devices(device="cuda") == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices() == devices(device="cuda") == {"cuda"} and devices(device="cpu") == {"cpu"}


def test_runs_that_others_judge_are_not_paired(towers, tmp_path):
    for name, optimised in (("a", "pickscore"), ("b", "clip-score")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(text(towers, tmp_path / name, reward={"name": optimised}))
    with pytest.raises(ValueError, match=r"a is judged by clip-score, b by pickscore; give evaluate.heldout"):
        runs.evaluate_runs([tmp_path / "a", tmp_path / "b"])


def test_its_features_are_the_image_tower(towers):
    reward = recipe.load_reward("clip-score", str(towers))
    panel = published_panel("clip-score", reward)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(panel.classifier.features(images), reward.image_features(images)) and not panel.classifier.styles


def test_the_held_out_reward_of_a_taste_may_fall_as_far_as_its_guard_lets_it():
    def allowed(name, *overrides):
        return allowed_fall(recipe.read(name, list(overrides)))

    assert allowed("taste-emoji") == 0.08 and allowed("taste-emoji", "trainer.guard.heldout_drop=0.02") == 0.02
    assert allowed("taste-emoji", "trainer.guard.every=0") == 0.0  # nobody watched it
    assert allowed("direct-emoji") == 0.0  # its words are what it is judged by


@pytest.mark.parametrize("fall", [0.08, 0.0])
def test_an_evaluation_keeps_how_far_its_run_lets_the_held_out_reward_fall(tmp_path, monkeypatch, fall):
    (tmp_path / "recipe.yaml").write_text(recipe.dump(recipe.read("taste-emoji")))
    run = runs.RunFolder(tmp_path)
    assert run.may_fall == 0.08
    monkeypatch.setattr(type(run), "may_fall", fall)
    told = {"metrics": {"reward/held": {"base": 1.0, "value": 0.95, "change": -0.05, "change_low": -0.06,
                                        "change_high": -0.04}}, "failed": [], "prompts": 99}  # fmt: skip
    monkeypatch.setattr(evaluation, "evaluate_samples", lambda *given, **how: dict(told))
    judges = published_panel("held", SimpleNamespace(image_features=None, score=None))
    found = evaluation._judged(run, judges, [], {}, ([], []))
    assert found.get("heldout_may_fall", 0.0) == fall
    assert bool(found["verdict"]["warnings"]) == (fall == 0.0)  # a fall of .05

"""palate sample and palate evaluate at a strength: 0 is the base model, 1 the result, on the same noise."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from PIL import Image

from palate import recipe
from palate.cli.options import Strengths
from palate.models.emoji import EmojiModel
from palate.report.sheet import write_page_of
from palate.runs import RunFolder
from palate.runs.strength import evaluate_strengths
from palate.runtime.errors import InputError
from palate.testing import TinyFlow

SMALL = [
    "trainer={steps: 1, batch_size: 2, lr: 0.02, guard: {every: 0}}", "algorithm.rollout_steps=2", "run.folder=run",
    "prompts={list: [a 3d dog, a flat apple]}", "model.lora_rank=2",
]  # fmt: skip


@pytest.fixture
def run(palate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert palate("train", "srpo-emoji", *SMALL)[0] == 0
    return tmp_path


def rows(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_strengths_are_drawn_and_judged_side_by_side(run, palate):
    asked = ("--prompt", "a 3d dog", "--prompt", "a cat", "--seeds", "0,3")
    code, out, err = palate("sample", "run", *asked, "--strength", "0,0.5,1", "--out", "all")
    assert code == 0 and "12 images" in out, err
    palate("sample", "run", *asked, "--out", "whole")
    palate("sample", "--model", "emoji", *asked, "--out", "base")
    found = rows(run / "all")
    assert [(r["prompt"], r["seed"], r["strength"]) for r in found] == [
        (p, s, x) for p in ("a 3d dog", "a cat") for s in (0, 3) for x in (0.0, 0.5, 1.0)
    ]
    for i in range(4):
        zero, half, one = ((run / "all" / found[3 * i + k]["file"]).read_bytes() for k in range(3))
        assert zero == (run / "base" / f"{i:04d}.png").read_bytes() != half
        assert one == (run / "whole" / f"{i:04d}.png").read_bytes() != half
    assert Image.open(run / "all" / "grid.png").size == (3 * 64, 4 * 64)
    page = (run / "all" / "index.html").read_text("utf-8")
    assert all(f"strength {x}" in page for x in ("0", "0.5", "1"))

    code, out, err = palate("evaluate", "run", "--strength", "0,0.5,1", "--count", "2", "--seeds", "1", "--json")
    assert code == 0, err
    measured = json.loads(out)["run"]["strengths"]
    assert list(measured) == ["0", "0.5", "1"] and (run / "run" / "strengths.json").is_file()
    changes = [
        max(abs(m["value"] - m["base"]) for m in measured[x]["metrics"].values() if m.get("base") is not None)
        for x in measured
    ]
    assert changes[0] == 0 < min(changes[1:])
    assert (run / "run" / "strengths" / "grid.png").is_file() and len(rows(run / "run" / "strengths")) == 6
    code, out, _ = palate("evaluate", "run", "--strength", "1", "--count", "2", "--seeds", "1")
    assert code == 0 and "base" in out and "grid.png" in out
    code, _, err = palate("evaluate", "run", "--strength", "1", "--stored")
    assert code == 2 and "--strength draws and judges by itself" in err


def test_each_strength_has_a_place_of_its_own_and_minus_nothing_is_the_base_model(tmp_path, monkeypatch):
    """On the command line and from Python: its numbers stand under "0". Two that are alike in six digits are two."""
    assert str([*Strengths("-0,0,-0.5")]) == "[0.0, -0.5]"
    near = [0.12345678, 0.12345679]
    (tmp_path / "recipe.yaml").write_text("algorithm: {name: ddpo}\nreward: {name: emoji}\nprompts: {list: [a dog]}\n")
    run, model = RunFolder(tmp_path), recipe.build_model(recipe.read("srpo-emoji", ["model.lora_rank=2"]))
    monkeypatch.setattr(RunFolder, "model", lambda run: (model, None))
    monkeypatch.setattr("palate.runs.strength.generate", lambda *_, **__: torch.zeros(1, 3, 64, 64))
    monkeypatch.setattr("palate.runs.strength.evaluate_samples", lambda *_, **__: {})
    found = evaluate_strengths(run, [-0.0, 1.0, *near], prompts=["a dog"], seeds=[0])
    assert list(found["strengths"]) == ["0", "1", "0.12345678", "0.12345679"]
    assert all((tmp_path / "strengths" / each / "0000.png").is_file() for each in found["strengths"])
    page = write_page_of(tmp_path / "strengths").read_text("utf-8")
    assert all(f"strength {each}<" in page for each in found["strengths"])


def test_all_strengths_are_drawn_before_the_first_is_judged(tmp_path, monkeypatch):
    """The judges stay on a GPU once they are there, which may have no room for the network beside them."""
    (tmp_path / "recipe.yaml").write_text("algorithm: {name: ddpo}\nreward: {name: emoji}\nprompts: {list: [a dog]}\n")
    drawn, made = [], []

    def model(run):
        made.append(weakref.ref(built := recipe.build_model(recipe.read("srpo-emoji", ["model.lora_rank=2"]))))
        return built, None

    def draws(*_, **__):
        drawn.append("drawn")
        return torch.zeros(1, 3, 64, 64)

    def judges(*_, **__):
        gc.collect()
        assert made[0]() is None and len(drawn) == 3
        return {}

    monkeypatch.setattr(RunFolder, "model", model)
    monkeypatch.setattr("palate.runs.strength.generate", draws)
    monkeypatch.setattr("palate.runs.strength.evaluate_samples", judges)
    found = evaluate_strengths(RunFolder(tmp_path), [0.5, 1.0], prompts=["a dog"], seeds=[0])
    assert list(found["strengths"]) == ["0.5", "1"]


def test_what_has_no_strength_is_a_sentence(palate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ("--model", "emoji", "--prompt", "a", "--seeds", "0", "--out", "x")
    code, _, err = palate("sample", *asked, "--strength", "0.5")
    assert code == 2 and "--strength: there is no LoRA here" in err.splitlines()[-1]
    monkeypatch.setattr("palate.cli.model_source.base_model", TinyFlow)
    code, _, err = palate("sample", *asked, "--strength", "0.5")
    assert code == 2 and "emoji has no LoRA whose strength could be changed" in err
    for wrong in ("a", "0,,1", "nan", "100"):
        code, _, err = palate("sample", *asked, "--strength", wrong)
        assert code == 2 and "expected numbers between -10 and 10" in err


def test_a_strength_ends_with_its_block():
    model = recipe.build_model(recipe.read("srpo-emoji", ["model.lora_rank=2", "model.lora_alpha=3.0"]))
    layer = next(m for m in model.weights.network.modules() if getattr(m, "scaling", None))
    with pytest.raises(KeyError), model.at_strength(0.5):
        assert layer.scaling["policy"] == 0.75
        raise KeyError
    assert layer.scaling["policy"] == 1.5
    with pytest.raises(InputError, match="there is no LoRA here"), EmojiModel.load(training="none").at_strength(1.0):
        pass

"""Policies whose samples a reward must not like: every method, every style, nothing that holds them back."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT

from palate import recipe
from palate.models.vocabulary import vocabulary

sys.path.insert(0, str(ROOT / "tools"))
negatives = pytest.importorskip("build_negatives")


def test_control_words_go_from_every_style_to_every_other_and_each_other_method_to_every_style():
    styles = vocabulary().styles
    assert sorted(negatives.tastes("srpo-emoji")) == sorted(itertools.permutations(styles, 2))
    for method in negatives.METHODS[1:]:
        assert Counter(wanted for wanted, _ in negatives.tastes(method)) == Counter(styles)
        assert all(wanted != unwanted for wanted, unwanted in negatives.tastes(method))


@pytest.mark.parametrize("method", negatives.METHODS)
def test_a_policy_is_trained_as_hard_as_it_is_asked_to(method):
    plan, published = negatives.hard(method, "flat", "3d", 7, 3.0, 5), recipe.read(method)
    assert plan.trainer.lr == pytest.approx(3 * published.trainer.lr) and plan.trainer.steps == 7
    assert plan.trainer.guard.every == plan.trainer.ema_decay == plan.trainer.preview_every == 0
    if method == "srpo-emoji":
        assert list(plan.algorithm.positive) == ["flat"] and list(plan.algorithm.negative) == ["3d"]
        assert list(plan.algorithm.k_denoise) == [0, 0]


class Stopped(Exception):
    pass


def test_what_was_drawn_before_a_stop_is_not_drawn_again(tmp_path, monkeypatch):
    """Stopped while the third policy trains; the same command ends as one that was never stopped. With other settings,
    and where a file was cut, the samples are drawn anew."""
    trained = []

    def train(model, algorithm, reward, prompts, *, seed, **settings):
        trained.append(seed)
        if len(trained) == stop:
            raise Stopped

    def generate(model, words, seeds, weights="policy"):
        value = len(weights) + 10 * seeds[0] + trained[-1] if weights == "policy" else 99
        return torch.full((len(words), 3, 4, 4), value % 256 / 255)

    monkeypatch.setattr(negatives, "train", train)
    monkeypatch.setattr(negatives, "generate", generate)
    monkeypatch.setattr(negatives.recipe, "build", lambda plan: SimpleNamespace(
        model=None, algorithm=None, reward=lambda images, texts: None, prompts=[]))  # fmt: skip

    def run(out, *more):
        trained.clear()
        monkeypatch.setattr(sys, "argv", ["", "--samples", "4", "--methods", "draft-emoji", "--out", str(out), *more])
        negatives.main()
        return load_file(out)["images"], json.loads(out.with_suffix(".json").read_text())

    stop = 0
    images, captions = run(tmp_path / "whole.safetensors")
    policies = len(negatives.tastes("draft-emoji"))
    assert len(trained) == 2 * policies and len(images) == len(captions) == 4 * policies + 16
    stop, out = 6, tmp_path / "stopped.safetensors"
    with pytest.raises(Stopped):
        run(out)
    assert not out.exists()
    stop = 0
    again = run(out)
    assert len(trained) == 2 * (policies - 2)
    assert torch.equal(again[0], images) and again[1] == captions
    run(out)
    assert not trained
    run(out, "--rate", "3")
    assert len(trained) == 2 * policies


def test_every_tool_that_trains_keeps_its_state():
    """What lives in memory until the end is lost with the process: a tool goes on from a `Progress`, or from its parts
    on disk."""
    tools = {path.stem: path.read_text("utf-8") for path in (ROOT / "tools").glob("*.py")}
    training = [name for name, text in tools.items() if "optimizer.step()" in text or '--minutes"' in text]
    assert len(training) >= 5
    for name in training:
        assert "Progress(" in tools[name] or "torch.load(" in tools[name], name

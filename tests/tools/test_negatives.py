"""Policies whose samples a reward must not like: every method, every style, nothing that holds them back."""

from __future__ import annotations

import itertools
import sys
from collections import Counter

import pytest
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

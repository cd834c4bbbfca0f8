"""Simulated blind studies, from the page to the result: the interval holds the truth as often as it says."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import blind_study

from palate.report import study


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return blind_study.plain_results(tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
@pytest.mark.parametrize("setting", blind_study.SETTINGS, ids=lambda setting: setting.name)
def test_the_interval_holds_the_truth(runs, setting):
    """Of 200 studies 190 are expected; 182 to 197 is where that count falls in 99 of 100 series."""
    found = blind_study.simulate(*runs, setting, studies=200, count=30)
    assert 182 <= found["held"] <= 197, found
    assert found["rate"] == pytest.approx(found["truth"], abs=0.02)


def test_sides_read_the_wrong_way_round_are_noticed(runs, monkeypatch):
    right = study.score
    turned = {"left": "right", "right": "left", "tie": "tie"}
    monkeypatch.setattr(
        study, "score", lambda rows, key: right([row | {"choice": turned[row["choice"]]} for row in rows], key)
    )
    found = blind_study.simulate(*runs, blind_study.SETTINGS[0], studies=10, count=30)
    assert found["held"] <= 4 and found["truth"] > 0.6


def test_the_voter_prefers_what_it_likes_and_knows_ties():
    voter = blind_study.Voter(lambda pixels: float(pixels.mean()), 2.0, 1.0)
    win, tie = voter.chances(np.ones((1, 1, 3)), np.zeros((1, 1, 3)))
    assert win / (1 - win - tie) == pytest.approx(np.exp(2.0)) and tie == pytest.approx(1 / (np.e + 1 / np.e + 1))

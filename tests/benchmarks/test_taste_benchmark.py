"""benchmarks/taste.py: simulated people are as right as they should be, and the quick form gives every row."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import ROOT

from palate import recipe
from palate.evaluate import embedded_panel

sys.path.insert(0, str(ROOT / "benchmarks"))

import taste as bench


def test_a_simulated_person_is_right_on_seven_of_eight_random_pairs():
    rng = np.random.default_rng(0)
    u = rng.gamma(2.0, 3.0, 500)
    scale = bench.temperature(u, rng)
    i, j = rng.integers(0, 500, (2, 50_000))
    right = (1 / (1 + np.exp(-np.abs(u[i] - u[j]) / scale))).mean()
    assert right == pytest.approx(bench.RIGHT, abs=0.01)


def test_the_tastes_that_no_feature_says_are_what_their_names_say():
    liked = bench.people(embedded_panel())
    image = torch.ones(1, 3, 64, 64)
    low, left, disc = image.clone(), image.clone(), image.clone()
    low[:, :, 48:, 16:48] = 0
    left[:, :, 16:48, :16] = 0
    line = torch.linspace(-1, 1, 64)
    disc[:, :, (line[:, None].square() + line.square()) < 0.3] = 0
    bar = image.clone()
    bar[:, :, 30:34, 4:60] = 0
    prompts = ["a dog"]

    def prefers(name, better, worse):
        return float(liked[name](better, prompts)) > float(liked[name](worse, prompts)) + 1e-3

    assert prefers("low", low, left) and prefers("leftish", left, low)
    assert prefers("symmetric", disc, left) and prefers("round", disc, bar)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert prefers("few-colours", disc, noise) and prefers("soft-edges", image * 0.5, noise)
    assert prefers("large", disc, bar) and prefers("contrast", disc, image)


@pytest.mark.slow
def test_the_quick_form_gives_every_row_and_the_tables_name_them():
    votes = bench.accuracy_row("warm3d", 0, 12, True)
    assert {(row["bald"], row["votes"]) for row in votes} == {(b, n) for b in (False, True) for n in bench.VOTES[:2]}
    assert all(0 <= row["unseen"] <= 1 and row["low"] < row["high"] for row in votes)
    rows = bench.align_row("warm3d", 0, 1, 20, 12, True)
    assert [row["way"] for row in rows] == ["direct", "best-of-8", "words", "dpo"]
    assert all(0 <= row["win"] <= 1 and row["offered"] == rows[0]["offered"] for row in rows)
    assert "| 20 |" in bench.accuracy_table(votes) and "| warm3d | 1 | best-of-8 |" in bench.rounds_table(rows, 0.5)
    assert all("ties" in row for row in rows)


def test_the_five_are_taken_together_once_all_of_them_are_there():
    row = {"round": 3, "way": "direct", "seed": 0, "before": 0.0, "win": 0.9, "concept": 0.96, "concept_before": 0.98,
           "diversity": 1.0, "held_out": 0.8, "offered": True}  # fmt: skip
    rows = [row | {"person": name, "taste": k / 10} for k, name in enumerate(bench.UNCONDITIONAL)]
    table = bench.rounds_table([*rows, row | {"person": "toonzoo", "taste": 9.0, "offered": False}], 0.5)
    assert "| the five | 3 | direct | +0.00 -> +0.20 ± 0.16 | 0.90 ± 0.00 | -0.020 ± 0.000 |" in table
    assert "5 of 5" in table and "| toonzoo | 3 | direct |" in table and "| 0 of 1 |" in table
    assert "the five" not in bench.rounds_table(rows[1:], 0.5)


def test_a_picture_that_stays_as_it_is_is_half_a_win():
    here = SimpleNamespace(
        panel=embedded_panel(), first=SimpleNamespace(utilities=lambda utility: np.array([0.0, 1.0]))
    )
    base = torch.full((8, 3, 64, 64), 0.5)
    images = base.clone()
    images[:3] += 0.25  # liked more
    images[3] -= 0.25

    def brightness(images, prompts):
        return images.mean((1, 2, 3))

    found = bench.Bench.measured(here, brightness, images, base, ["a dog"] * 8)
    assert (found["win"], found["ties"]) == (3 / 8 + 4 / 8 / 2, 4 / 8)


def test_rows_that_counted_ties_as_lost_get_them_back():
    """Words leave prompts with a background alone, and everything where the taste picked none; the others never tie."""
    row = {"person": "large", "round": 1, "way": "words", "seed": 0, "before": 0.0, "taste": 1.0, "win": 0.5,
           "concept": 0.9, "concept_before": 0.9, "diversity": 1.0, "held_out": 0.8, "offered": True}  # fmt: skip
    assert bench.won(row, 0.4) == pytest.approx(0.7) and bench.won(row | {"taste": 0.0, "win": 0.0}, 0.4) == 0.5
    assert bench.won(row | {"way": "direct"}, 0.4) == bench.won(row | {"ties": 0.4}, 0.4) == 0.5
    assert "| large | 1 | words | +0.00 -> +1.00 | 0.70 |" in bench.rounds_table([row], 0.4)
    assert bench.left_alone(104) == 48 / 104


def test_a_row_trains_as_its_recipe_says():
    plan = recipe.read("taste-emoji", ["trainer.steps=7", "trainer.lr=0.5", "trainer.clip_norm=3.0"])
    told = bench.of_recipe(plan, 4)
    assert (told["steps"], told["lr"], told["clip_norm"], told["seed"]) == (7, 0.5, 3.0, 4)
    assert told["guard"].every == 10 and len(bench.fingerprints(*bench.ROUNDS).split()) == 3

"""Intervals of shares and win rates: the equations that their bounds solve, and exact coverage by enumeration."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from palate.evaluate.intervals import design_effect, student, wilson, win_rate_interval

Z = 1.959964


def test_wilson_is_the_score_interval():
    for k, n in ((0, 10), (3, 10), (10, 10), (81, 263), (4.5, 9)):
        low, high = wilson(k, n)
        for bound in (low, high):  # the bounds solve |k/n - p| = z sqrt(p (1 - p) / n)
            if 1e-9 < bound < 1 - 1e-9:  # at 0 and 1 rounding hides the equation
                assert abs(k / n - bound) == pytest.approx(Z * (bound * (1 - bound) / n) ** 0.5, rel=1e-5)
        assert 0 <= low <= k / n <= high <= 1
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def scores(wins, ties, losses):
    return [1.0] * wins + [0.5] * ties + [0.0] * losses


@pytest.mark.parametrize(("wins", "n"), [(7, 10), (0, 20), (20, 20), (33, 40)])
def test_without_ties_it_is_wilsons(wins, n):
    assert win_rate_interval(scores(wins, 0, n - wins)) == pytest.approx(wilson(wins, n), abs=1e-9)


@pytest.mark.parametrize("counts", [(12, 9, 5), (3, 30, 7), (20, 4, 1), (1, 0, 9)])
def test_its_bounds_solve_the_score_equation(counts):
    """At a bound the likelihood's own variance, its share of losses found by search here, puts the rate z away."""
    wins, ties, losses = counts
    n = sum(counts)
    for bound in win_rate_interval(scores(*counts)):
        difference = 2 * bound - 1
        lost = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200001)[1:-1]
        tied = 1 - difference - 2 * lost
        likelihood = losses * np.log(lost) + wins * np.log(lost + difference) + ties * np.log(tied)
        best = lost[likelihood.argmax()]
        spread = math.sqrt((2 * best + difference - difference**2) / n)
        assert abs((wins - losses) / n - difference) == pytest.approx(Z * spread, rel=2e-3)


def exact_coverage(n, won, tied, interval):
    """The probability that the interval holds the truth, over all outcomes of n choices."""
    total, truth = 0.0, won + tied / 2
    for wins, ties in product(range(n + 1), repeat=2):
        losses = n - wins - ties
        if losses >= 0:
            low, high = interval(wins, ties, losses)
            chance = math.factorial(n) / math.factorial(wins) / math.factorial(ties) / math.factorial(losses)
            total += (low <= truth <= high) * chance * won**wins * tied**ties * (1 - won - tied) ** losses
    return total


def test_it_covers_with_ties_where_wilsons_is_too_wide():
    cases = [(0.4, 0.2), (0.5, 0.3), (0.2, 0.6), (0.6, 0.35), (0.3, 0.3)]
    ours = [exact_coverage(24, *case, lambda *counts: win_rate_interval(scores(*counts))) for case in cases]
    assert all(0.93 <= value <= 0.97 for value in ours), ours
    wide = [exact_coverage(24, *case, lambda w, t, lost: wilson(w + t / 2, w + t + lost)) for case in cases]
    assert sum(wide) / len(wide) > 0.98


def test_choices_of_one_pair_count_as_far_as_they_differ():
    """Everybody alike on every pair: as many choices as pairs. Independent of the pair: as many as choices."""
    pairs = [pair for pair in range(10) for _ in range(6)]
    alike = [float(pair < 6) for pair in pairs]
    assert design_effect(alike, pairs) == pytest.approx(6 * (10 / 9) / (60 / 59))  # both variances without their bias
    low, high = win_rate_interval(alike, pairs)
    assert high - low > 0.9 * (wilson(6, 10)[1] - wilson(6, 10)[0])
    mixed = [float(k % 2) for k in range(60)]
    assert design_effect(mixed, pairs) == 1.0
    (low, _), (alone, _) = win_rate_interval(mixed, pairs), win_rate_interval(mixed)
    assert 0.5 - low == pytest.approx((0.5 - alone) * stats.t.ppf(0.975, 9) / 1.96, rel=0.03)  # ten pairs say so much
    assert design_effect(alike, range(60)) == 1.0  # each pair once
    assert design_effect([1.0] * 60, pairs) == 6.0  # no spread to learn it from


def test_students_quantile():
    for degrees in (1, 2, 3, 9, 1000):
        assert student(0.95, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=0.004)


@pytest.mark.parametrize(
    ("prompts", "seeds", "people", "clear", "own"),
    [(40, 1, 10, 0.7, 1.0), (10, 4, 1, 1.5, 0.0), (40, 1, 8, 0.7, 0.0), (5, 1, 20, 0.7, 0.0)],
)
def test_people_and_prompts_that_differ_are_covered(prompts, seeds, people, clear, own):
    """Prompts that differ in how clear they are, with several pictures of each, and people who differ in their taste.
    Of pairs alone, ten people with a taste of their own were covered in 68 of 100, four pictures a prompt in 88."""
    rng = np.random.default_rng(4)
    chance = lambda logit: 1 / (1 + np.exp(-logit))  # noqa: E731
    truth = chance(rng.normal(0.4, np.hypot(clear, own), 100_000)).mean()
    asked = list(product(range(prompts), range(seeds), range(people)))
    of_prompts, of_people = [row[0] for row in asked], [row[2] for row in asked]
    held = 0
    for _ in range(200):
        by_prompt, by_person = rng.normal(0, clear, prompts), rng.normal(0, own, people)
        made = (rng.random(len(asked)) < chance(0.4 + by_prompt[of_prompts] + by_person[of_people])).astype(float)
        low, high = win_rate_interval(made.tolist(), of_prompts, of_people)
        held += low <= truth <= high
    assert 0.91 <= held / 200 <= 0.995


def test_several_people_on_the_same_pairs_are_covered():
    """Pairs that differ in how clear they are: choices taken as independent would cover far too seldom."""
    rng = np.random.default_rng(3)
    truth = (1 / (1 + np.exp(-rng.normal(0.4, 2.0, 100_000)))).mean()
    pairs = np.repeat(np.arange(30), 8).tolist()
    held, held_plain = 0, 0
    for _ in range(300):
        chance = 1 / (1 + np.exp(-rng.normal(0.4, 2.0, 30)))
        made = (rng.random((30, 8)) < chance[:, None]).astype(float).ravel().tolist()
        for grouped in (True, False):
            low, high = win_rate_interval(made, pairs if grouped else None)
            held += grouped and low <= truth <= high
            held_plain += not grouped and low <= truth <= high
    assert 0.92 <= held / 300 <= 0.98 and held_plain / 300 < 0.85

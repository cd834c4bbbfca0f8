"""Intervals of fractions and of win rates. Those of means, by the bootstrap, are in `palate.evaluate.metrics`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

HALVINGS = 60  # of the search for a bound: past the precision of a double


def wilson(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share successes / n, inside [0, 1] for any n > 0."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, shrink = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5 / shrink
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # whatever rounding does


def win_rate_interval(
    scores: Sequence[float], groups: Sequence[Hashable] | None = None, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean of scores that are 1 (win), 0.5 (tie) or 0 (loss), a choice each; inside [0, 1].

    Tango's score interval (1998, Statistics in Medicine 17, 891) of the difference of wins and losses, mapped to the
    win rate: ties vary less than wins, which Wilson's interval of the same rate does not know. Without a tie it is
    Wilson's. `groups` (the pair that a choice is about) with several choices each: the counts are divided by the
    design effect, so that ten people on one pair do not count as ten pairs. There must be at least one score."""
    n, rate = len(scores), sum(scores) / len(scores)
    effective = n / design_effect(scores, groups) if groups is not None else float(n)
    wins = sum(score == 1 for score in scores) * effective / n
    losses = sum(score == 0 for score in scores) * effective / n
    z = NormalDist().inv_cdf((1 + level) / 2)
    low = _tango_bound(wins, losses, effective, z, -1.0)
    high = _tango_bound(wins, losses, effective, z, 1.0)
    return max(0.0, min(rate, (1 + low) / 2)), min(1.0, max(rate, (1 + high) / 2))


def design_effect(scores: Sequence[float], groups: Sequence[Hashable]) -> float:
    """By how much choices of the same groups make the mean's variance larger than that of independent ones; at least 1.

    The ratio of the cluster-robust variance to the plain one. Scores that are all alike say nothing about it: then
    each group counts once."""
    n, mean = len(scores), sum(scores) / len(scores)
    sums: dict[Hashable, float] = {}
    for score, group in zip(scores, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + score - mean
    count = len(sums)
    if count == n:
        return 1.0
    plain = sum((score - mean) ** 2 for score in scores)
    if plain == 0 or count == 1:
        return n / count
    clustered = count / (count - 1) * sum(value * value for value in sums.values())
    return max(1.0, clustered / (plain * n / (n - 1)))


def _tango_bound(wins: float, losses: float, n: float, z: float, end: float) -> float:
    """Between the observed difference and `end` (-1 or 1), where the score statistic is z."""
    observed = (wins - losses) / n
    inside, outside = observed, end
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        spread = n * _variance(wins, losses, n, middle)
        if (n * (observed - middle)) ** 2 <= z * z * spread:
            inside = middle
        else:
            outside = middle
    return (inside + outside) / 2


def _variance(wins: float, losses: float, n: float, difference: float) -> float:
    """Of one choice's win minus loss under that difference, with the most likely share of ties."""
    a, b = 2 * n, (2 * n - wins + losses) * difference - wins - losses
    c = -losses * difference * (1 - difference)
    lost = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    return max(0.0, 2 * lost + difference * (1 - difference))

"""Intervals of fractions and of win rates. Those of means, by the bootstrap, are in `palate.evaluate.metrics`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

HALVINGS = 60  # of the search for a bound: past the precision of a double
MANY_PEOPLE = 5  # from here on their differences are measured; fewer say nothing of people who were not asked


def wilson(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share successes / n, inside [0, 1] for any n > 0."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, shrink = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5 / shrink
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # whatever rounding does


def student(level: float, degrees: float) -> float:
    """Half the width of a two-sided interval in standard errors, by Student's t with these degrees of freedom (at least
    1): exact for 1 and 2, else Hill's expansion (Abramowitz and Stegun 26.7.5), right to .004 from 3 on."""
    if degrees <= 1:
        return math.tan(math.pi * level / 2)
    if degrees <= 2:
        return level * math.sqrt(2 / (1 - level * level))
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def win_rate_interval(
    scores: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    people: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of the mean of scores that are 1 (win), 0.5 (tie) or 0 (loss), a choice each; inside [0, 1].

    Tango's score interval (1998, Statistics in Medicine 17, 891) of the difference of wins and losses, mapped to the
    win rate: ties vary less than wins, which Wilson's interval of the same rate does not know. Without a tie it is
    Wilson's. `groups` (the prompt that a choice is about) with several choices each: the counts are divided by the
    design effect, so that ten people on one prompt do not count as ten prompts. `people`, who chose: of MANY_PEOPLE and
    more their differences count in the same way, and the interval is of people like them; of fewer it is of those
    alone. There must be at least one score."""
    n, rate = len(scores), sum(scores) / len(scores)
    effect, degrees = _clustered(scores, groups, people)
    effective = n / effect
    wins = sum(score == 1 for score in scores) * effective / n
    losses = sum(score == 0 for score in scores) * effective / n
    z = student(level, degrees) if math.isfinite(degrees) else NormalDist().inv_cdf((1 + level) / 2)
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


def _clustered(
    scores: Sequence[float], groups: Sequence[Hashable] | None, people: Sequence[Hashable] | None
) -> tuple[float, float]:
    """Design effect of both groupings at once (Cameron, Gelbach and Miller 2011: the variances of either less that of
    their cells), and its degrees of freedom by Satterthwaite; infinite where each choice stands alone."""
    n = len(scores)
    if groups is None or len(set(groups)) == n:
        groups = range(n)
    effect = design_effect(scores, groups)
    count = len(set(groups))
    asked = len(set(people)) if people is not None else 0
    if people is None or asked < MANY_PEOPLE or asked == n:
        return effect, float("inf") if count == n else max(count - 1, 1)
    cells = design_effect(scores, list(zip(groups, people, strict=True)))
    beyond = max(0.0, design_effect(scores, people) - cells)
    free = max(count - 1, 1)
    return effect + beyond, (effect + beyond) ** 2 / (effect**2 / free + beyond**2 / (asked - 1))


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

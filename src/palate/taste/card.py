"""What is known of a taste, in words and numbers that hold on votes it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from palate.evaluate.intervals import design_effect, wilson
from palate.taste.learner import Array, Numbers, Posterior

START, GOOD = 20, 40  # votes after which a first taste is shown, and after which one is worth aligning to
LEARNT = 0.60  # held-out accuracy above which alignment is offered, if the evidence and EXPECTED agree
EXPECTED, SLACK = 0.70, 1.6  # of unseen pairs, a taste must expect to order EXPECTED - SLACK / votes rightly
SURE = 8.0  # nats over chance from which that is not asked
HOLDS = 0.62  # nor is it where the held-out accuracy's interval lies above this
UNSEEN, FEW = 2000, 30  # pairs that the expectation is taken over, and below which the held-out votes stand in
MORE = 20  # votes that are asked for while a taste is not learnt
AGREEMENT, REPEATS = 0.60, 5  # below this share, of at least so many pairs asked twice, the votes disagree
BINS = 10  # of the calibration error


def accuracy(probabilities: Array, outcomes: Array, pairs: Numbers | None = None) -> dict[str, Any]:
    """How often held-out choices were predicted: {"accuracy", "low", "high", "of"}. Ties predict nothing and are left
    out; a prediction of exactly one half counts as half right. None where there is no choice. `pairs` (n,): which pair
    each vote is about; several votes on one make the interval no narrower than they tell more."""
    decided = outcomes != 0.5
    p, y = probabilities[decided], outcomes[decided]
    if not len(y):
        return {"accuracy": None, "low": None, "high": None, "of": 0}
    right = np.where(p == 0.5, 0.5, (p > 0.5) == (y > 0.5))
    count = len(y) / (1.0 if pairs is None else design_effect(right.tolist(), pairs[decided].tolist()))
    low, high = wilson(float(right.mean()) * count, count)
    return {"accuracy": float(right.mean()), "low": low, "high": high, "of": len(y)}


def learnt(card: Mapping[str, Any]) -> bool:
    """Whether a taste may be aligned to: enough votes, held-out ones predicted in more than LEARNT of cases,
    all of them likelier under the taste than under answers without one, and enough expected of unseen pairs. A sum of
    tastes is learnt if all of its parts are.

    The accuracy alone does not tell: pairs that are chosen by what the taste is unsure of flatter it, and coin tosses
    are predicted in .6 of cases by chance often enough. The evidence does not depend on how pairs were chosen, but what
    is common to two tastes in one (one for animals, another for food) has evidence too: that leaves the taste unsure
    of most pairs, however many votes there are, so `expected` stays low.
    """
    if "mixed" in card:
        return all(part.get("learnt", True) for part in card["mixed"])
    accuracy, votes = card.get("accuracy"), card.get("votes", 0)
    if accuracy is None or votes < START:
        return False
    return accuracy > LEARNT and over_chance(card) > 0 and expects_enough(card)


def expects_enough(card: Mapping[str, Any]) -> bool:
    """Whether the taste is sure enough of pairs that nobody voted on, or beyond doubt of those that were voted on; a
    card of before this was asked passes."""
    expected = card.get("expected")
    sure = expected is None or expected > EXPECTED - SLACK / card["votes"]
    return sure or over_chance(card) >= SURE or (card.get("low") or 0.0) > HOLDS


def expected_accuracy(posterior: Posterior, unseen: Array, predicted: Array) -> float:
    """The share of pairs that the taste itself expects to order as the person would, over feature differences `unseen`
    (m, D) of pairs of one prompt that were not chosen by the taste; with FEW of them over the held-out votes."""
    unseen = unseen[np.abs(unseen).sum(1) > 0] if len(unseen) else unseen
    p = posterior.probability(unseen) if len(unseen) >= FEW else predicted
    return float(np.maximum(p, 1 - p).mean())


def unseen_pairs(z: Array, groups: Sequence[str], voted: int = 0) -> Array:
    """Differences (m, D) of at most UNSEEN random pairs of one group, always the same. The first 2 x `voted` rows of z
    are the left and the right pictures of votes, whose own pairs are left out."""
    rng = np.random.default_rng(0)
    order: dict[str, int] = {}
    label = np.array([order.setdefault(group, len(order)) for group in groups])
    i, j = rng.integers(0, len(z), (2, 40 * UNSEEN)) if len(z) else np.zeros((2, 0), int)
    together = (np.abs(i - j) == voted) & (np.maximum(i, j) < 2 * voted) if voted else np.zeros(len(i), bool)
    keep = np.flatnonzero((label[i] == label[j]) & (i != j) & ~together)[:UNSEEN]
    return z[i[keep]] - z[j[keep]]


def over_chance(card: Mapping[str, Any]) -> float:
    """Log evidence of the taste over that of answers without one, in nats: the logarithm of their Bayes factor.

    Answers without a taste are tosses of a fair coin, or of one that favours a side if that explains them better. A
    pair counts once, however many votes it has: those agree about one pair, and not about what pairs have in common.
    """
    coin = -int(card.get("pairs", card["votes"])) * math.log(2)
    return float(card["log_evidence"]) - max(coin, float(card.get("log_evidence_of_sides", coin)))


def calibration_error(probabilities: Array, outcomes: Array) -> float | None:
    """Expected calibration error over BINS bins of the confidence max(p, 1 - p); None without a choice."""
    decided = outcomes != 0.5
    p, y = probabilities[decided], outcomes[decided]
    if not len(y):
        return None
    confidence, right = np.maximum(p, 1 - p), ((p > 0.5) == (y > 0.5)).astype(float)
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return float(sum(abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
                     for b in np.unique(bins)))  # fmt: skip


def agreement(outcomes: Sequence[float], repeats: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Of pairs asked twice with the sides exchanged, (first, second) in `outcomes`: how many were answered alike. A tie
    both times is alike, a tie once is half."""
    alike = sum(1.0 - abs(outcomes[i] - (1 - outcomes[j])) for i, j in repeats)
    share = alike / len(repeats) if repeats else None
    return {"agreement": share, "of": len(repeats),
            "disagree": bool(share is not None and len(repeats) >= REPEATS and share < AGREEMENT)}  # fmt: skip


def telling_columns(posterior: Posterior, z: Array, columns: Sequence[str], count: int = 4) -> dict[str, list[str]]:
    """The columns that go up with the utility over pictures z (N, D), and those that go down, strongest first; only
    columns correlated by at least .3, one of a kind ("surely 3d" is "3d")."""
    utility = z @ posterior.mean
    liked: list[tuple[float, str]] = []
    if utility.std() > 0:
        for k, name in enumerate(columns):
            if z[:, k].std() > 0:
                liked.append((float(np.corrcoef(utility, z[:, k])[0, 1]), name.partition(": ")[2]))
    liked.sort(key=lambda pair: -abs(pair[0]))
    found: dict[str, list[str]] = {"wanted": [], "unwanted": []}
    seen: set[str] = set()
    for value, name in liked:
        plain = name.removeprefix("surely ")
        if abs(value) < 0.3 or plain in seen:
            continue
        seen.add(plain)
        side = found["wanted" if value > 0 else "unwanted"]
        if len(side) < count:
            side.append(plain)
    return found


def extremes(utilities: Array, names: Sequence[str], count: int = 6) -> dict[str, list[str]]:
    """The most and the least liked pictures by name, the strongest first; a picture without a name is passed over."""
    if not np.ptp(utilities) > 0:  # nothing is liked better than anything else
        return {"liked": [], "disliked": []}
    best: dict[str, float] = {}
    for value, name in zip(utilities, names, strict=True):
        if name:
            best.setdefault(name, float(value))
    order = sorted(best, key=lambda name: -best[name])
    count = min(count, len(order) // 2)
    return {"liked": order[:count], "disliked": order[::-1][:count]}


def verdict(card: Mapping[str, Any]) -> str:
    """The state of a taste in one sentence, and what to do next; no percentage before START votes."""
    votes = int(card["votes"])
    if votes < START:
        return f"{_more_votes(START - votes)} until a first taste."
    if card["accuracy"] is None:
        return (
            "All votes are ties, so there is nothing to learn from them yet. Choose more pictures, and say so where "
            "one of two is a little better."
        )
    percent, low, high = (math.floor(100 * card[key] + 0.5) for key in ("accuracy", "low", "high"))
    text = f"Your choices are predicted in {percent} % ({low} to {high}) of cases"
    if not learnt(card):
        return (
            f"{text}, {_why_not(card)}: no taste is learnt yet, so there is nothing to align to. Choose "
            f'{MORE} more pictures, with "no difference" where you see none, or say it in words. A taste that asks '
            "for one thing here and for another there is not learnt by more votes."
        )
    if votes >= GOOD:
        return f"{text}."
    return f"{text}. {_more_votes(GOOD - votes)} {'makes' if GOOD - votes == 1 else 'make'} it a good taste."


def _why_not(card: Mapping[str, Any]) -> str:
    """Why a taste is not learnt, by the first of the conditions that it fails."""
    if card["accuracy"] <= LEARNT:
        return "which chance may do as well"
    if over_chance(card) <= 0:
        return "but pairs are chosen where that is easy to reach, and all your votes fit tosses of a coin as well"
    return f"but of new pairs it expects to order only {math.floor(100 * card['expected'] + 0.5)} % as you would"


def _more_votes(count: int) -> str:
    return f"{count} more vote{'' if count == 1 else 's'}"

"""Which two pictures to show next: the pair whose answer tells most about the taste."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from palate.taste.learner import Array, Posterior

RANDOM = 4  # the first pairs, before there is anything to be unsure about
CANDIDATES = 200  # random admissible pairs, of which the most telling is asked
REPEAT_EVERY = 12  # votes after which an earlier pair is asked again with its sides exchanged: 3 of 40


def next_pair(
    posterior: Posterior | None,
    z: Array,
    groups: Sequence[str],
    shown: Collection[frozenset[int]],
    rng: np.random.Generator,
    *,
    champion: int | None = None,
    tries: int = 20,
) -> tuple[int, int] | None:
    """Two rows of z (N, D) of one group that were not shown together, in random order; None where there are none left.

    posterior None: a random pair. champion: one of the two is this picture, the other a newcomer of its group.
    """
    labels: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        labels.setdefault(group, []).append(row)
    rooms = [rows for rows in labels.values() if len(rows) > 1]
    if champion is not None:
        rooms = [[champion, *(row for row in labels[groups[champion]] if row != champion)]]
    if not rooms or len(rooms[0]) < 2:
        return None
    sizes = np.array([len(rows) * (len(rows) - 1) for rows in rooms], float)
    pairs: list[tuple[int, int]] = []
    for _ in range(tries):
        for room in rng.choice(len(rooms), CANDIDATES, p=sizes / sizes.sum()):
            rows = rooms[room]
            first = 0 if champion is not None else int(rng.integers(len(rows)))
            second = int(rng.integers(len(rows) - 1))
            second += second >= first
            pair = (rows[first], rows[second])
            if frozenset(pair) not in shown:
                pairs.append(pair)
        if pairs:
            break
    if not pairs:
        return None
    best = pairs[0]
    if posterior is not None:
        d = np.stack([z[i] - z[j] for i, j in pairs])
        best = pairs[int(posterior.information(d).argmax())]
    return best if rng.random() < 0.5 else (best[1], best[0])


def telling_pairs(
    posterior: Posterior | None, z: Array, groups: Sequence[str], count: int, rng: np.random.Generator
) -> list[tuple[int, int, float]]:
    """`count` pairs to ask at once, no picture twice where that is possible: (row, row, nats)."""
    shown: set[frozenset[int]] = set()
    used: set[int] = set()
    found: list[tuple[int, int, float]] = []
    while len(found) < count:
        free = [row for row in range(len(groups)) if row not in used]
        pick = None
        if len(free) > 1:
            pick = next_pair(posterior, z[free], [groups[row] for row in free], (), rng)
            pick = pick and (free[pick[0]], free[pick[1]])
        pick = pick or next_pair(posterior, z, groups, shown, rng)
        if pick is None:
            break
        shown.add(frozenset(pick))
        used |= set(pick)
        nats = 0.0 if posterior is None else float(posterior.information(z[[pick[0]]] - z[[pick[1]]])[0])
        found.append((*pick, nats))
    return found

"""The embedded tasks with a gradient: how likely it is, by the detector's own numbers, that all of a prompt is met.

`tasks.TaskReward` counts detections, so nothing can be learned from it by differentiating. Here each of its
requirements is the probability that it is met, from the logits that the detections are read from:

    q_i        = sigmoid(middle_i - logit(THRESHOLD))     the cell counts as a thing: 1/2 where detections begin
    s_i(c)     = q_i p_i(c)                               ... and the thing is c
    there      = max over peaks of s_i(c), at cell i*
    colour     = there p_i*(colour)
    how many   = P(n of independent events s_i(c) happen) Poisson binomial over the peaks      `exactly`
    relation   = there_1 there_2 sigmoid((sign (x_1 - x_2) - MARGIN) / SLACK),  x the places at i*

    score      = mean over the requirements of log P      0 is the best; exp(n score) is their product

The logarithm keeps a gradient where a requirement is far from met. Where the detector is sure, every P is 0 or 1 and
the product is what `TaskReward(strict=True)` gives. It is the same detector: a model that trains on this can learn to
please it, so judge on the exact score of mirrored pictures too (`mirrored`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.models.vocabulary import Caption
from palate.rewards.detector import GRID, THRESHOLD, Cells, Detector
from palate.rewards.placement import follow
from palate.rewards.tasks import AXES, MARGIN, captions_of, load_detector

SLACK = 0.1  # of the relation, in image halves: beyond the margin by so much is right with .73
PEAKS = 16  # surest cells that can count
LEAST = 1e-30  # a probability below counts as this one


class SoftTaskReward:
    """Mean logarithm of the probability of each requirement, at most 0; differentiable in the images."""

    def __init__(self, detector: Detector | None = None):
        self.detector = detector or load_detector()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) for images (B, 3, 64, 64) in [0, 1]. InputError: a prompt names no thing, or one that is unknown."""
        captions = captions_of(prompts, "emoji-tasks-soft")
        follow(self.detector, images.device)
        cells: Cells = self.detector(images)
        found = [torch.stack(self._logs(cells, b, caption)).mean() for b, caption in enumerate(captions)]
        return torch.stack(found).to(images)

    def _logs(self, cells: Cells, b: int, caption: Caption) -> list[Tensor]:
        return [p.clamp_min(LEAST).log() for p in self.chances(cells, b, caption)]

    def chances(self, cells: Cells, b: int, caption: Caption) -> list[Tensor]:
        """The probability, float64, of each requirement of `tasks.requirements`, in its order, in image b."""
        peaks, counts = peaks_of(cells.middle[b])
        concepts = cells.concept[b].flatten(1)[:, peaks].double().softmax(0)
        paints = cells.paint[b].flatten(1)[:, peaks].double().softmax(0)
        named = [(caption.concept, caption.paint)] + ([caption.second] if caption.second else [])
        sure = [counts * concepts[self.detector.concepts.index(str(concept))] for concept, _ in named]
        best = [int(s.argmax()) for s in sure]
        there = [s[k] for s, k in zip(sure, best, strict=True)]
        found = list(there)
        for k, (_, paint) in enumerate(named):
            if paint:
                found.append(there[k] * paints[self.detector.paints.index(paint), best[k]])
        if caption.number:
            found.append(exactly(sure[0], caption.number))
        if caption.relation:
            found.append(_related(cells, b, caption.relation, there, [int(peaks[k]) for k in best]))
        return found


def _related(cells: Cells, b: int, relation: str, there: Sequence[Tensor], at: Sequence[int]) -> Tensor:
    """The probability that the first thing stands so to the second; 0 where only one is named."""
    if len(there) < 2:
        return torch.zeros_like(there[0])
    axis, sign = AXES[relation]
    x = [middle(cells.place[b, axis], cell, axis) for cell in at]
    return there[0] * there[1] * torch.sigmoid((sign * (x[0] - x[1]) - MARGIN) / SLACK)


def load_soft_tasks(name: str = "emoji-tasks-soft") -> SoftTaskReward:
    """The reward of that name. InputError where these assets hold no detector."""
    return SoftTaskReward()


# --- pure functions -------------------------------------------------------------------------------------------------


def peaks_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Cells (K,) that are the highest of their neighbourhood, the PEAKS surest, and the probability that each counts,
    of the logits of middles (16, 16). Where these are no numbers the first cell stands, with a probability of nan."""
    with torch.no_grad():
        top = logits == F.max_pool2d(logits[None, None], 3, 1, 1)[0, 0]
        places = top.flatten().nonzero()[:, 0]
        places = places if len(places) else places.new_zeros(1)
        places = places[logits.flatten()[places].argsort(descending=True, stable=True)][:PEAKS]
    offset = math.log(THRESHOLD / (1 - THRESHOLD))
    return places, torch.sigmoid(logits.flatten()[places].double() - offset)


def exactly(chances: Tensor, count: int) -> Tensor:
    """The probability that `count` of independent events of these chances (K,) happen; differentiable."""
    held = [torch.ones_like(chances[0]), *[torch.zeros_like(chances[0]) for _ in range(count)]]
    for p in chances:
        held = [held[0] * (1 - p), *(held[k] * (1 - p) + held[k - 1] * p for k in range(1, count + 1))]
    return held[count]


def middle(offset: Tensor, cell: int, axis: int) -> Tensor:
    """Where a cell's thing has its middle along an axis (0 across, 1 down), -1 to 1; offset (16, 16) in cells."""
    row, column = divmod(cell, GRID)
    return ((column, row)[axis] + 0.5 + offset[row, column].double()) * 2 / GRID - 1


def mirrored(prompt: str) -> str:
    """The prompt of the mirrored picture: left and right change places."""
    swapped = {"left": "right", "right": "left"}
    return re.sub(r"\b(left|right)\b", lambda found: swapped[found[0]], prompt)

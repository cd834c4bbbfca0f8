"""Rewards of a group of images of one prompt, compared with each other: what every group-relative method begins with.

All take rewards (B * group,), a group's images in a row, and return as many numbers. A reward that is not finite makes
its group's scores nan, so that the loop sees it and skips the update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from palate.runtime.errors import InputError

FLOOR = 1e-8  # added to a standard deviation, or 1e-4 of it where that is less: tiny units change nothing
ROUNDING = 4  # units in the last place up to which rewards count as equal


def differences(rewards: Tensor, group: int) -> Tensor:
    """(B, group): each reward minus its group's first; exactly 0 in a group that is equal up to rounding.

    Without this a group that differs in the last bit only has advantages of size 1, made of nothing else.
    """
    grouped = rewards.view(-1, group)
    apart = grouped - grouped[:, :1]  # equal rewards become exact zeros; their mean would be rounded
    tolerance = ROUNDING * torch.finfo(rewards.dtype).eps * grouped.abs().amax(1, keepdim=True)
    equal = (apart.abs().amax(1, keepdim=True) <= tolerance) & tolerance.isfinite()
    return torch.where(equal, torch.zeros_like(apart), apart)


def divided(centred: Tensor, scale: Tensor) -> Tensor:
    """centred / scale with a floor in proportion to the scale; 0 where the scale is 0."""
    floored = scale + (1e-4 * scale).clamp_max(FLOOR)
    still = floored == 0
    return torch.where(still, 0.0, centred / torch.where(still, torch.ones_like(floored), floored))


def standard_scores(rewards: Tensor, group: int, *, baseline: str = "group", unbiased: bool = False) -> Tensor:
    """(R - mean R) / std R, (B * group,). The mean is the group's; the standard deviation is the group's or, with
    baseline "batch", that of all rewards. unbiased: divide by n - 1."""
    apart = differences(rewards, group)
    centred = apart - apart.mean(1, keepdim=True)
    scale = apart.std(1, correction=int(unbiased), keepdim=True)
    if baseline == "batch":
        scale = rewards.std(correction=int(unbiased))
    return divided(centred, scale).flatten()


def win_rate(rewards: Tensor, group: int) -> Tensor:
    """The share of the group's other images that an image beats, a tie counting half: in [0, 1] (Pref-GRPO, arXiv
    2508.20751). It does not change under any increasing map of the reward."""
    apart = differences(rewards, group)
    wins = torch.sign(apart[:, :, None] - apart[:, None, :]).sum(2)  # wins minus losses against the others
    return ((wins / (group - 1) + 1) / 2).flatten()


def decoupled(parts: Mapping[str, tuple[float, Tensor]], group: int, *, unbiased: bool = False) -> Tensor:
    """GDPO (arXiv 2601.05242): the weighted sum of each reward's own standard scores in its group, then divided by the
    standard deviation of these sums over the batch. `parts` is {name: (weight, rewards)}.

    A reward with a small spread so counts as much as its weight says, where a sum of rewards would drown it.
    Scores that cancel up to rounding give 0.
    """
    if not parts:
        raise InputError("decoupled got no rewards; expected {'name': (weight, rewards)} with at least one entry")
    scores = [weight * standard_scores(rewards, group, unbiased=unbiased) for weight, rewards in parts.values()]
    total = torch.stack(scores).sum(0)
    noise = sum(abs(weight) * _rounding(rewards, group) for weight, rewards in parts.values())
    total = torch.where(total.abs() <= noise, torch.zeros_like(total), total)
    return divided(total, total.std(correction=int(unbiased)))


def _rounding(rewards: Tensor, group: int) -> Tensor:
    """How far the standard scores of a group may be off, by the rewards' own rounding and the floor, (B * group,)."""
    grouped = rewards.view(-1, group)
    scale = grouped.std(1, correction=0, keepdim=True)
    size = ROUNDING * torch.finfo(rewards.dtype).eps * grouped.abs().amax(1, keepdim=True)
    size = size + math.sqrt(group) * (1e-4 * scale).clamp_max(FLOOR)  # no score is above the root
    return divided(size, scale).expand_as(grouped).flatten()

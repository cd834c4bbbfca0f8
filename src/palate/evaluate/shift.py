"""How far a model's images have moved from those that it drew before training, from the same prompts and noise.

No judge is asked and no weights are needed but those at hand. Every number is a ratio to the spread that the images of
before have among themselves, so that one limit serves models whose images are much alike and models whose images differ
widely. With x the images now, x' those of before, s the standard deviation over x':

    shift          |mean f(x) - mean f(x')| / s(f)      of a statistic f: colour cast, saturation, fine detail
    displacement   E |e(x_i) - e(x'_i)|^2 / E |e(x'_i) - e(x'_j)|^2    i, j of two prompts; e = features or latents
    variety        E |e(x_i) - e(x_j)| / E |e(x'_i) - e(x'_j)|         i, j of one prompt
    fit            E m(x_i) / E m(x'_i)                 m = R(x_i, its own prompt) - mean R(x_i, other prompts)
    duplicates     share of x_i with an x_j of another prompt nearer than DUPLICATE times what is usual in x'

The limits on them are `recipe.GuardSettings`', which says where each comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.evaluate.metrics import labels_of
from palate.rewards.simple import high_frequency

SMALLEST_SPREAD = 0.02  # of a statistic on a scale of 1: five grey levels of 255; images that agree better than that
# would make the least change large
DUPLICATE = 0.25  # of the usual distance of two prompts' images: nearer are near-duplicates
FLOOR = 1e-4  # added to the amplitude of fine detail before its logarithm: a fortieth of a grey level
OTHERS = 8  # prompts that an image is compared with besides its own
THUMBNAIL = 32  # pixels a side at which images are compared as pictures
CELLS = 8  # a side, of `patch_statistics`


# ------------------------------------------------------------------------------------------------ of single images


def colour_cast(images: Tensor) -> Tensor:
    """(B, 2): mean R - G and mean (R + G) / 2 - B, the opponent colours; (0, 0) for whatever is grey."""
    red, green, blue = images.double().mean((2, 3)).unbind(1)
    return torch.stack([red - green, (red + green) / 2 - blue], 1)


def fine_detail(images: Tensor) -> Tensor:
    """(B,) natural logarithm of the amplitude (root mean square) of luma above a quarter of a cycle per pixel.

    A logarithm, so that a factor counts alike in smooth and in busy images: blur is below, noise above.
    """
    return (high_frequency(images).double().clamp_min(0).sqrt() + FLOOR).log()


def patch_statistics(images: Tensor, cells: int = CELLS) -> Tensor:
    """(B, 6 cells^2): mean and standard deviation of each colour in each cell of a cells x cells grid.

    What stands for features where no network is at hand: distances of it see layout, colour and texture.
    """
    small = images.double()
    mean = F.adaptive_avg_pool2d(small, cells)
    square = F.adaptive_avg_pool2d(small.square(), cells)
    return torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], 1).flatten(1)


def pooled(planes: Tensor, side: int) -> Tensor:
    """(B, D) of planes (B, C, H, W), averaged down to no more than `side` values a side."""
    height, width = planes.shape[-2:]
    return F.adaptive_avg_pool2d(planes, (min(side, height), min(side, width))).flatten(1)


def thumbnails(images: Tensor) -> Tensor:
    """(B, D): the colours of the image at no more than THUMBNAIL pixels a side, for distances of pictures."""
    return pooled(images.double(), THUMBNAIL)


# ---------------------------------------------------------------------------------------------------------- of sets


def spread(values: Tensor) -> float:
    """Root mean square distance of values (N,) or (N, K) from their mean: the standard deviation, of all K together."""
    rows = values.double().reshape(len(values), -1)
    return float((rows - rows.mean(0)).square().sum(1).mean().sqrt())


def shift(now: Tensor, base: Tensor) -> float:
    """Distance of the means of now and base, (N,) or (N, K), in units of base's `spread` (at least SMALLEST_SPREAD).

    1: the mean image lies as far out as one image in three of before (for a normal distribution).
    """
    means = now.double().reshape(len(now), -1).mean(0), base.double().reshape(len(base), -1).mean(0)
    return float((means[0] - means[1]).norm()) / max(spread(base), SMALLEST_SPREAD)


def variety(rows: Tensor, groups: Sequence) -> float:
    """Mean distance of rows (N, D) of one group; NaN without a pair. Not squared: of two seeds, a few pairs differ in
    everything, and would decide a mean of squares by themselves."""
    return float(_apart(rows)[_pairs(groups, same=True)].mean())


def distance_across(rows: Tensor, groups: Sequence) -> float:
    """Mean squared distance of rows (N, D) of different groups; NaN for a single group."""
    return float(_apart(rows)[_pairs(groups, same=False)].square().mean())


def displacement(now: Tensor, base: Tensor, across: float) -> float:
    """Mean squared distance of row i of now from row i of base, (N, D), in units of `across` (`distance_across` of
    base). 0: unchanged; 1: as unlike its own picture of before as another prompt's is."""
    return float((now.double() - base.double()).square().sum(1).mean()) / max(across, 1e-12)


def duplicates(pictures: Tensor, groups: Sequence, across: float) -> float:
    """Share of pictures (N, D) with a picture of another group nearer than DUPLICATE times the usual distance, the root
    of `across`. A model with one image for every prompt has 1. NaN for a single group."""
    labels = torch.from_numpy(labels_of(groups))
    elsewhere = labels[:, None] != labels
    near = torch.cdist(pictures.double(), pictures.double()) < DUPLICATE * math.sqrt(max(across, 0.0))
    return float((near & elsewhere).any(1).double().mean()) if bool(elsewhere.any()) else math.nan


def ratio(now: Tensor, base: Tensor) -> tuple[float, float]:
    """Mean of now over mean of base, (N,) in pairs, and the standard error that the pairs' differences leave it with.

    NaN where base's mean is within twice its own standard error of 0: nothing can be lost there.
    """
    now, base = now.double(), base.double()
    root, mean = math.sqrt(len(base)), float(base.mean())
    if len(base) < 2 or not mean > 2 * float(base.std()) / root:
        return math.nan, math.nan
    return float(now.mean()) / mean, float((now - base).std()) / root / mean


def others(prompts: Sequence[str], count: int = OTHERS) -> list[list[str]]:
    """For each prompt the `count` different ones that come next in the list, cyclically; fewer where there are no
    more."""
    different = list(dict.fromkeys(prompts))
    places = {prompt: i for i, prompt in enumerate(different)}
    steps = range(1, 1 + min(count, len(different) - 1))
    return [[different[(places[prompt] + step) % len(different)] for step in steps] for prompt in prompts]


def _apart(rows: Tensor) -> Tensor:
    return torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _pairs(groups: Sequence, *, same: bool) -> Tensor:
    """(N, N) True for two different rows of one group, or of two groups."""
    labels = torch.from_numpy(labels_of(groups))
    return ((labels[:, None] == labels) == same) & ~torch.eye(len(labels), dtype=torch.bool)

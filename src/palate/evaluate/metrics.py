"""The metrics as pure functions of tensors: diversity, Vendi score, Frechet distance, drift, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from palate.evaluate.intervals import student
from palate.rewards import simple
from palate.rewards.simple import SIDES

CLOSED_FORM: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f
    for f in (simple.saturation, simple.brightness, simple.warmth, simple.colourfulness, simple.high_frequency)
}
CHANNELS = ("red", "green", "blue")
FEW_GROUPS = 6  # below, all of them move one way by chance in more than 5 of 100 cases, and resampling sees no other
SAME_PICTURE = 0.05  # root mean square difference of the pixels below which two images are the same picture


class Images(Protocol):
    """Images (N, 3, H, W) in [0, 1] that are taken a slice at a time: a tensor, or pictures that lie in files."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


def diversity(features: Tensor, groups: Sequence, labels: Sequence | None = None) -> Tensor:
    """(P,) mean pairwise cosine distance 1 - cos between the features (N, D) inside each group (a group = a prompt).

    0 = all alike, 1 = orthogonal. One value a group in order of first appearance; NaN for a group without a pair. With
    `labels` (a style per image) only pairs of equal label count: a model that was told to keep to one style loses the
    distance between styles by design, and this leaves it out.
    """
    unit = F.normalize(features.double(), dim=1)
    kinds = None if labels is None else torch.from_numpy(labels_of(labels))
    values = []
    for rows in members(groups):
        apart = (1 - unit[rows] @ unit[rows].T).clamp_min(0)  # rounding may leave -1e-16
        counted = ~torch.eye(len(rows), dtype=torch.bool)
        if kinds is not None:
            counted &= kinds[rows][:, None] == kinds[rows]
        values.append(apart[counted].mean())  # NaN without a pair
    return torch.stack(values)


def vendi(features: Tensor) -> float:
    """Vendi score (Friedman and Dieng 2023) of N feature rows under the cosine kernel K: exp(-sum l log l) over the
    eigenvalues l of K / N. The effective number of different images: 1 = all alike, N = all orthogonal."""
    unit = F.normalize(features.double(), dim=1)
    gram = unit @ unit.T if unit.shape[0] <= unit.shape[1] else unit.T @ unit  # the same non-zero eigenvalues
    values = torch.linalg.eigvalsh(gram / unit.shape[0])
    values = values[values > 1e-12]
    return float(torch.exp(-(values * values.log()).sum()))


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """|m - n|^2 + tr(C + D - 2 (C D)^(1/2)) of the means m, n and covariances C, D of two sets of feature rows (N, F),
    (M, F): the squared 2-Wasserstein distance of the Gaussians that fit them (what FID is with Inception's features).

    Both sets' sampling noise adds to it, so compare numbers of equal N only, best beside that of two sets of one model.
    """
    (m, c), (n, d) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (features, others))
    values, vectors = torch.linalg.eigh(c)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ d @ root).clamp_min(0).sqrt().sum()  # tr (C D)^(1/2)
    return float(((m - n).square().sum() + c.trace() + d.trace() - 2 * cross).clamp_min(0))


def in_batches(images: Images, size: int = 64) -> Iterator[Tensor]:
    """The images, `size` at a time."""
    for start in range(0, len(images), size):
        yield images[start : start + size]


def drift(images: Images, base_images: Images, features: Tensor, base_features: Tensor) -> dict[str, float]:
    """How far the images went from the base model's for the same noise: mean paired cosine distance of features, the
    colour cast (length of the mean colour's change, less its grey part), and the ratios (1 = unchanged) of mean
    saturation, mean colour per channel and high-frequency energy."""
    distance = 1 - F.cosine_similarity(features.double(), base_features.double(), dim=1)
    result = {"feature_distance": float(distance.clamp_min(0).mean())}
    now, before = _statistics(images), _statistics(base_images)
    shift = torch.stack([(now[name] - before[name]).mean() for name in CHANNELS])
    result["colour_cast"] = float((shift - shift.mean()).norm())
    for name in now:
        result[f"{name}_ratio"] = (float(now[name].mean()) + 1e-9) / (float(before[name].mean()) + 1e-9)
    return result


def _statistics(images: Images) -> dict[str, Tensor]:
    """Of each image (N,), in double precision: saturation, mean of each channel, high-frequency energy."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("saturation", *CHANNELS, "high_frequency")}
    for batch in in_batches(images):
        parts["saturation"].append(simple.saturation(batch).double())
        for name, channel in zip(CHANNELS, batch.double().mean((2, 3)).unbind(1), strict=True):
            parts[name].append(channel)
        parts["high_frequency"].append(simple.high_frequency(batch).double())
    return {name: torch.cat(values) for name, values in parts.items()}


def cross_prompt_duplicates(images: Images, groups: Sequence) -> Tensor:
    """(N,) 1 where another group (prompt) holds the same picture: root mean square difference below SAME_PICTURE,
    at no more than 32 x 32 pixels. A model with one image for every prompt has 1 throughout. NaN for a single group."""
    side = min(32, *images.shape[-2:])
    small = torch.cat([F.adaptive_avg_pool2d(batch.double(), side).flatten(1) for batch in in_batches(images)])
    near = torch.cdist(small, small) / small.shape[1] ** 0.5 < SAME_PICTURE
    labels = torch.from_numpy(labels_of(groups))
    elsewhere = labels[:, None] != labels
    return torch.where(elsewhere.any(1), (near & elsewhere).any(1).double(), math.nan)


def position_correct(centres: Tensor, wanted: Sequence[str | None]) -> Tensor:
    """(B,) 1 where the centre (B, 2) lies on the side of the middle that was wanted, 0 where it does not or nothing was
    drawn (NaN), NaN where no side was asked for. Chance is one half."""
    found = []
    for centre, side in zip(centres.tolist(), wanted, strict=True):
        axis, sign = SIDES[side] if side else (0, 0)
        found.append(float(centre[axis] * sign > 0) if side else math.nan)
    return torch.tensor(found)


def label_correct(predicted: Tensor, names: Sequence[str], wanted: Sequence[str | None]) -> Tensor:
    """(B,) 1 where names[predicted] is what was wanted, 0 where it is not, NaN where nothing was asked for."""
    return torch.tensor(
        [math.nan if want is None else float(names[int(i)] == want) for i, want in zip(predicted, wanted, strict=True)]
    )


def bootstrap_interval(
    values: Tensor,
    base: Tensor | None = None,
    *,
    groups: Sequence | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values (N,), or of values - base in pairs. NaNs are left out.

    Whole `groups` are resampled (images of one prompt are not independent) where two or more have a value. The tails
    are those that make it as wide as Student's interval where values are normal (the expanded percentile of Hesterberg
    2015, The American Statistician 69, 371): the plain one of 8 groups misses the mean in 12 of 100 cases. Of fewer
    than FEW_GROUPS, which have no such tails, it is Student's own; of one value alone it is that value."""
    data = np.asarray(values, dtype=np.float64) - (0.0 if base is None else np.asarray(base, dtype=np.float64))
    labels = np.arange(len(data)) if groups is None else labels_of(groups)
    labels, data = labels[~np.isnan(data)], data[~np.isnan(data)]
    if not len(data):
        return math.nan, math.nan
    found, labels = np.unique(labels, return_inverse=True)
    if len(found) < 2:
        labels = np.arange(len(data))
    sums, counts = np.bincount(labels, data), np.bincount(labels)
    count = len(sums)
    if count == 1:
        return float(data[0]), float(data[0])
    wide = student(level, count - 1) * math.sqrt(count / (count - 1))
    if count < FEW_GROUPS:
        center = sums.sum() / counts.sum()
        error = float(np.std(sums - center * counts)) / math.sqrt(count) / counts.mean()
        return float(center - wide * error), float(center + wide * error)
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = NormalDist().cdf(-wide)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def labels_of(groups: Sequence) -> np.ndarray:
    """Integer labels in order of first appearance."""
    order: dict[Any, int] = {}
    return np.array([order.setdefault(group, len(order)) for group in groups])


def members(groups: Sequence) -> list[list[int]]:
    """The places of each group's members, groups in the order of their first member."""
    labels = labels_of(groups)
    return [np.flatnonzero(labels == label).tolist() for label in range(labels.max(initial=-1) + 1)]

"""A differentiable stand-in for a black-box objective: affine heads on frozen features, fitted to its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from palate.core import TwoTower
from palate.recipe.settings import OptimizeSettings
from palate.rewards import simple
from palate.rewards.learned import RIDGES, Features, leave_one_out, ridge_head


class Images(Protocol):
    """Images (B, 3, H, W) that are read when a slice of them is asked for; a tensor is one."""

    def __getitem__(self, part: slice, /) -> Tensor: ...


class Surrogate:
    """A differentiable reward: the optimistic value of affine heads on frozen features.

    bootstrap: the largest of the heads. ucb: one head plus its uncertainty.
    """

    def __init__(
        self, features: Features, mean: Tensor, std: Tensor, heads: Tensor, bonus: tuple[Tensor, float, float] | None
    ):
        self.features, self.mean, self.std, self.heads, self.bonus = features, mean, std, heads, bonus

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        found = self.features(images, prompts)
        phi = with_one((found - self.mean.to(found)) / self.std.to(found))
        values = phi @ self.heads.to(phi).T
        if self.bonus is None:
            return values.amax(1)
        covariance, scale, ridge = self.bonus
        return values[:, 0] + ucb_bonus(phi, covariance, scale, ridge).to(values)


@torch.no_grad()
def fit_surrogate(
    features: Features,
    images: Images,
    prompts: Sequence[str],
    targets: Tensor,
    settings: OptimizeSettings,
    *,
    seed: int,
) -> tuple[Surrogate, dict[str, float]]:
    """The surrogate of `targets` (N,), and what it explains of answers it has not seen (leave-one-out)."""
    parts = [features(images[k : k + 64], prompts[k : k + 64]).double() for k in range(0, len(targets), 64)]
    phi = torch.cat(parts)
    mean, std = phi.mean(0), phi.std(0, correction=0).clamp_min(1e-6)
    phi = with_one((phi - mean) / std)
    errors = {ridge: leave_one_out(phi, targets, ridge).square().mean() for ridge in RIDGES}
    ridge = min(errors, key=lambda each: float(errors[each]))
    fit = {"ridge": ridge, "explained": float(1 - errors[ridge] / targets.var(correction=0).clamp_min(1e-12))}
    if settings.surrogate == "ucb":
        heads = ridge_head(phi, targets, ridge)[None]
        scale = settings.exploration * float(errors[ridge].sqrt())
        return Surrogate(features, mean, std, heads, (phi.T @ phi, scale, ridge)), fit
    rng = np.random.default_rng((seed, len(targets)))
    drawn = [torch.from_numpy(rng.integers(0, len(targets), len(targets))) for _ in range(settings.heads)]
    heads = torch.stack([ridge_head(phi[rows], targets[rows], ridge) for rows in drawn])
    return Surrogate(features, mean, std, heads, None), fit


def with_one(phi: Tensor) -> Tensor:
    """(N, F) -> (N, F + 1): the last feature is 1."""
    return torch.cat([phi, torch.ones_like(phi[:, :1])], 1)


def ucb_bonus(phi: Tensor, covariance: Tensor, scale: float, ridge: float, limit: float = 10.0) -> Tensor:
    """min(c sqrt(phi^T (C + ridge I)^-1 phi), limit), (B,).

    C is the sum of phi phi^T over the data here, so that the bonus shrinks as answers come in. The released program has
    their centred covariance in its place, with c = .01, ridge = .001: that one does not shrink.
    """
    whole = covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)
    solved = torch.linalg.solve(whole, phi.to(covariance).T)
    return (scale * (phi.to(covariance) * solved.T).sum(1).clamp_min(1e-24).sqrt()).clamp_max(limit)


def mean_std(scores: Tensor) -> tuple[float, float]:
    """Mean and standard deviation; 1 if the scores do not vary."""
    spread = float(scores.std(correction=0)) if len(scores) > 1 else 0.0
    return float(scores.mean()), spread if spread > 0 else 1.0


def reward_features(reward: TwoTower, prompts: Sequence[str]) -> Features:
    """A two-tower reward's image features, its score of the prompt, five closed-form statistics of the pixels, and the
    layout: over a 4 x 4 grid, the mean distance from the colour of the border. The layout stands there once more for
    each word that some but not all of `prompts` hold (4 to 96 %), zero where the word is missing, so that an affine
    head can want the drawing elsewhere on "left" than on "right"."""
    statistics = (simple.brightness, simple.warmth, simple.saturation, simple.colourfulness, simple.high_frequency)
    bags = [words_of(prompt) for prompt in prompts]
    shares = {word: sum(word in bag for bag in bags) / len(bags) for word in sorted(set().union(*bags))}
    dividing = [word for word, share in shares.items() if 0.04 <= share <= 0.96]

    def features(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = reward.image_features(images)
        rows = [reward.score(seen, prompts), *(f(images) for f in statistics)]
        apart = images - simple.border(images.detach())[..., None, None]
        layout = F.adaptive_avg_pool2d(torch.linalg.vector_norm(apart, dim=1, keepdim=True), 4).flatten(1)
        named = layout.new_tensor([[float(word in words_of(prompt)) for word in dividing] for prompt in prompts])
        by_word = torch.einsum("bw,bl->bwl", named, with_one(layout)).flatten(1)
        return torch.cat([seen, *(part.to(seen) for part in (torch.stack(rows, 1), layout, by_word))], 1)

    return features


def words_of(prompt: str) -> set[str]:
    """The words of a prompt, in lower case."""
    return set(re.findall(r"\w+", prompt.lower()))

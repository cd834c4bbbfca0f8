"""A taste as a reward that any algorithm can optimise.

    r(x, p) = [w'z(x) - kappa sqrt(z'S z)] / q + lambda R(x, p)
q is the standard deviation of w'z over the pictures that the features were standardised on. Without the division one
lambda would be too strong for one taste and nothing for the next, because the posterior mean's size depends on how many
votes there are. R is the reward whose tower the features stand on; lambda R keeps what the prompt asks for. kappa > 0
is a lower confidence bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palate.core import Reward, TwoTower
from palate.runtime.errors import InputError
from palate.taste.features import Features, Scaling

ABSOLUTE = 4.0  # lambda: with 1 a third of the pictures lose what the prompt names within 40 updates


class Seen(NamedTuple):
    """What a picture's tower run leaves behind; prompts are compared on it without another run."""

    images: Tensor
    tower: Tensor


class TasteReward:
    """(images (B, 3, H, W) in [0, 1], B prompts) -> (B,), differentiable. Stateless; the tower runs once per call, and
    once for several prompts of the same images through `image_features` and `score`."""

    def __init__(
        self,
        features: Features,
        scaling: Scaling,
        mean: Tensor,
        covariance: Tensor,
        reward: Reward | None,
        *,
        absolute: float = ABSOLUTE,
        confidence: float = 0.0,
    ):
        if absolute and reward is None:
            raise InputError("reward.taste.absolute: this taste stands on no reward; set it to 0")
        if confidence < 0:
            raise InputError(f"reward.taste.confidence: expected at least 0, got {confidence}")
        self.features, self.scaling, self.reward = features, scaling, reward
        self.absolute, self.confidence = absolute, confidence
        self._tower: TwoTower | None = features.tower if features.tower is reward else None
        self.q = scaling.std(mean)
        self._mean, self._covariance = mean.double(), covariance.double()

    def image_features(self, images: Tensor) -> Seen:
        return Seen(images, self.features.seen(images))

    def score(self, seen: Seen, prompts: Sequence[str]) -> Tensor:
        value = self.taste(seen, prompts)
        if self.absolute and self.reward is not None:
            plain = self.reward(seen.images, prompts) if self._tower is None else self._tower.score(seen.tower, prompts)
            value = value + self.absolute * plain
        return value

    def taste(self, seen: Seen, prompts: Sequence[str]) -> Tensor:
        """The taste's part alone, in standard deviations of the pool."""
        z = self.scaling(self.features.of_seen(seen.images, seen.tower, prompts))
        value = z @ self._mean.to(z)
        if self.confidence:
            variance = torch.einsum("bi,ij,bj->b", z, self._covariance.to(z), z)
            value = value - self.confidence * variance.clamp_min(1e-12).sqrt()
        return value / self.q

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score(self.image_features(images), prompts)

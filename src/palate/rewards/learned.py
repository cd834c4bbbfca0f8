"""A black-box reward made differentiable: a head on differentiable features learns to predict its answers.

    y_hat(x) = w'z(x) + b,   z the standardised features,  (w, b) = argmin sum (y - y_hat)^2 + ridge |w|^2
in units of the answers' standard deviation. The ridge is the candidate of the smallest leave-one-out error,
e_i / (1 - h_ii). The head is fitted anew to all that it remembers, in closed form and float64; so what it says is a
function of its memory, and a resumed run repeats it to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.core import Reward, TwoTower
from palate.rewards.combine import as_scores
from palate.rewards.simple import brightness, colourfulness, high_frequency, saturation, warmth
from palate.runtime.errors import InputError

Features = Callable[[Tensor, Sequence[str]], Tensor]  # images (B, 3, H, W), prompts -> (B, F), differentiable in images

RIDGES = tuple(10.0**k for k in range(-3, 6))  # candidates
SMALLEST_STD = 1e-6  # of a feature; one that does not vary says nothing


class BlackBox:
    """A reward that can only be asked, and features of its images that a head can learn it on. It is a reward itself,
    without gradient, whatever kind of numbers the other one answers."""

    def __init__(self, reward: Reward, features: Features):
        self.reward, self.features = reward, features

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        answers: Tensor = as_scores(self.reward(images, prompts), images.device)
        return answers


def tower_features(tower: TwoTower) -> Features:
    """A two-tower reward's image features, its score of the prompt, and five statistics of the pixels."""
    statistics = (brightness, warmth, saturation, colourfulness, high_frequency)

    def features(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = tower.image_features(images)
        rows = [tower.score(seen, prompts), *(statistic(images) for statistic in statistics)]
        return torch.cat([seen, torch.stack([row.to(seen) for row in rows], 1)], 1)

    return features


class Fit(NamedTuple):
    """A ridge regression of scores on standardised features."""

    mean: Tensor  # (F,) of the features
    std: Tensor  # (F,)
    head: Tensor  # (F + 1,), the last is b
    ridge: float
    explained: float  # of the answers' variance, leave-one-out: at most 1, below 0 where the mean predicts better


class RewardHead:
    """The newest `memory` answers with their features, and the head fitted to them."""

    def __init__(self, memory: int):
        if memory < 2:
            raise InputError(f"a head needs a memory of 2 or more answers, got {memory}")
        self.memory = memory
        self.features: Tensor | None = None  # (n, F), float64, oldest first
        self.answers = torch.zeros(0, dtype=torch.float64)
        self.fit: Fit | None = None

    def __len__(self) -> int:
        return len(self.answers)

    def tell(self, features: Tensor, answers: Tensor) -> None:
        """Remember B answers, forget the oldest ones beyond the memory, and fit. An image whose features are not finite
        is left out: remembered, it would spoil every later fit, and no checkpoint could be written. InputError: the
        answer about any other is not finite."""
        seen, said = features.detach().double().cpu(), answers.detach().double().cpu()
        sound = torch.isfinite(seen).all(1)
        seen, said = seen[sound], said[sound]
        if not bool(torch.isfinite(said).all()):
            raise InputError("the reward answered with numbers that are not finite")
        kept = seen if self.features is None else torch.cat([self.features, seen])
        self.features, self.answers = kept[-self.memory :], torch.cat([self.answers, said])[-self.memory :]
        self._fit()

    def __call__(self, features: Tensor) -> Tensor:
        """Predicted answers (B,), in standard deviations from their mean; differentiable in the features (B, F)."""
        if self.fit is None:
            raise InputError("the head has no answers yet")
        mean, std, head = (part.to(features.device) for part in self.fit[:3])
        return ((features.double() - mean) / std @ head[:-1] + head[-1]).to(features.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"features": self.features, "answers": self.answers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.features = None if state["features"] is None else state["features"].clone()
        self.answers = state["answers"].clone()
        self._fit()

    def _fit(self) -> None:
        if self.features is None or len(self.answers) < 2:
            self.fit = None
            return
        self.fit = fitted(self.features, self.answers)


def fitted(features: Tensor, answers: Tensor) -> Fit:
    """The head of the ridge with the smallest leave-one-out error, for features (n, F) and answers (n,), float64."""
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(SMALLEST_STD)
    phi = torch.cat([(features - mean) / std, torch.ones_like(features[:, :1])], 1)
    spread = answers.std(correction=0)
    targets = (answers - answers.mean()) / spread if float(spread) > 0 else torch.zeros_like(answers)
    errors = {ridge: float(leave_one_out(phi, targets, ridge).square().mean()) for ridge in RIDGES}
    ridge = min(errors, key=lambda key: errors[key])
    explained = 1 - errors[ridge] if float(spread) > 0 else 0.0
    return Fit(mean, std, ridge_head(phi, targets, ridge), ridge, explained)


def ridge_head(phi: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """argmin_w |phi w - y|^2 + ridge |w without its last entry|^2, for phi (n, F) whose last column is the constant."""
    return torch.linalg.solve(phi.T @ phi + _penalty(phi, ridge), phi.T @ targets)


def leave_one_out(phi: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """y_i minus the prediction of the head fitted to all others, (n,): e_i / (1 - h_ii), without fitting n times."""
    solved = torch.linalg.solve(phi.T @ phi + _penalty(phi, ridge), phi.T)
    hat = (phi * solved.T).sum(1)
    return (targets - phi @ (solved @ targets)) / (1 - hat).clamp_min(1e-9)


def _penalty(phi: Tensor, ridge: float) -> Tensor:
    penalty = torch.full((phi.shape[1],), ridge, dtype=phi.dtype)
    penalty[-1] = 0
    return penalty.diag()

"""Rewards made of rewards.

A reward is a function (images (B, 3, H, W) in [0, 1], B prompts) -> (B,). A two-tower reward also has
`image_features(images)` and `score(features, prompts)`; what is built from it here runs its image tower once per call,
however many prompts are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from palate.core import Reward, TwoTower
from palate.runtime.errors import InputError

TEMPLATE = "{control}. {prompt}"  # SRPO, arXiv 2509.06942: the control word stands before the prompt


def with_control(control: str, prompts: Sequence[str], template: str = TEMPLATE) -> list[str]:
    """The prompts as the reward's text tower sees them; an empty control word leaves them unchanged."""
    if not control:
        return list(prompts)
    return [template.replace("{control}", control).replace("{prompt}", prompt) for prompt in prompts]


def control_texts(words: Mapping[str, Sequence[str]], prompt: str, template: str = TEMPLATE) -> dict[str, list[str]]:
    """What the reward is asked about a prompt, by side, one text for each control word: the loop tries new words on
    it."""
    return {side: [with_control(word, [prompt], template)[0] for word in given] for side, given in words.items()}


def score_pair(reward: Reward, images: Tensor, first: Sequence[str], second: Sequence[str]) -> tuple[Tensor, Tensor]:
    """R(images, first) and R(images, second), (B,) each; the image tower of a two-tower reward runs once."""
    features, score = _towers(reward)
    seen = features(images)
    return score(seen, first), score(seen, second)


def relative(favoured: Tensor, other: Tensor, k: float | Tensor = 0.0) -> Tensor:
    """SRPO's relative preference (1 + k) R1 - R2 = (R1 - R2) + k R1: k is the weight of the absolute reward."""
    return (1 + k) * favoured - other


def interpolated(favoured: Tensor, other: Tensor, k: float | Tensor) -> Tensor:
    """The paper's CFG-like form (1 - k) R2 + k R1 = R2 + k (R1 - R2): a unit of absolute reward always remains."""
    return (1 - k) * other + k * favoured


def below_hinge(r: Tensor, hinge: float | None) -> Tensor:
    """max(0, hinge - r), or -r where hinge is None, (B,): the loss of rewards r. One that is not finite makes it so,
    also +inf, which is above every hinge: the loop then skips the update."""
    return -r if hinge is None else (hinge - r).relu() + 0 * r


def semantic_relative(
    reward: Reward, positive: str, negative: str, k: float = 0.0, *, template: str = TEMPLATE
) -> Reward:
    """(1 + k) R(x, "positive. p") - R(x, "negative. p"): what two prompts share of the reward's bias cancels."""

    def semantic_relative_reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = with_control(positive, prompts, template), with_control(negative, prompts, template)
        return relative(*score_pair(reward, images, *texts), k)

    return semantic_relative_reward


def semantic_interpolated(
    reward: Reward, positive: str, negative: str, k: float, *, template: str = TEMPLATE
) -> Reward:
    """(1 - k) R(x, "negative. p") + k R(x, "positive. p"): the CFG-like reward as the paper prints it."""

    def semantic_interpolated_reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = with_control(positive, prompts, template), with_control(negative, prompts, template)
        return interpolated(*score_pair(reward, images, *texts), k)

    return semantic_interpolated_reward


def noised_relative(reward: Reward, std: float, *, weight: float = 1.0, seed: int = 0) -> Reward:
    """R(x) - weight R(x + std z), for a reward that reads no text: the noised image is the negative (paper, not code).

    z is standard normal and a function of (seed, images), so that this is a function as well and a resumed run repeats
    it, while no fixed pattern is there to be learnt. x + std z is not clipped.
    """

    def noised_relative_reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        digest = hashlib.blake2b(images.detach().float().cpu().numpy().tobytes(), digest_size=7, key=str(seed).encode())
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))
        z = torch.randn(images.shape, generator=generator).to(images)
        return reward(images, prompts) - weight * reward(images + std * z, prompts)

    return noised_relative_reward


def weighted(parts: Mapping[str, tuple[float, Reward]]) -> Reward:
    """sum of weight R over {"name": (weight, R)}. It is two-tower itself, so relative rewards of it stay cheap."""
    if not parts:
        raise InputError("weighted got no rewards; expected {'name': (weight, reward)} with at least one entry")
    return WeightedTowers({name: (weight, *_towers(reward)) for name, (weight, reward) in parts.items()})


@dataclass(frozen=True)
class WeightedTowers:
    """The weighted sum of rewards, each as (weight, image_features, score); what `weighted` returns."""

    towers: Mapping[str, tuple[float, Callable[[Tensor], Any], Callable[[Any, Sequence[str]], Tensor]]]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score(self.image_features(images), prompts)

    def image_features(self, images: Tensor) -> dict[str, Any]:
        return {name: features(images) for name, (_, features, _) in self.towers.items()}

    def score(self, seen: dict[str, Any], prompts: Sequence[str]) -> Tensor:
        values = [weight * rate(seen[name], prompts) for name, (weight, _, rate) in self.towers.items()]
        return sum(values[1:], start=0 + values[0])

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, tuple[float, Tensor]]:
        """{name: (weight, values (B,))} over one look at the images."""
        seen = self.image_features(images)
        return {name: (weight, rate(seen[name], prompts)) for name, (weight, _, rate) in self.towers.items()}


@runtime_checkable
class HasParts(Protocol):
    """A reward that is a weighted sum and can return its parts."""

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, tuple[float, Tensor]]:
        """{name: (weight, values (B,))}; the reward is the weighted sum of the values."""


def parts_of(reward: Reward, images: Tensor, prompts: Sequence[str]) -> dict[str, tuple[float, Tensor]]:
    """{name: (weight, values (B,))} of a reward made by `weighted`. InputError for any other: it has no parts."""
    if not isinstance(reward, HasParts):
        raise InputError(
            "algorithm.per_reward compares the parts of a reward, and this one has none; give two or more in "
            "reward.weights, without reward.relative, or set algorithm.per_reward=false"
        )
    return reward.parts(images, prompts)


def normalised(reward: Reward, mean: float, std: float) -> Reward:
    """(R - mean) / std, with the constants of `reward_scale` or of any reference set."""
    if not std > 0:
        raise InputError(f"normalised got std {std}; expected > 0: the reward does not vary on the reference images")
    features, rate = _towers(reward)
    return Towers(features, lambda seen, prompts: (rate(seen, prompts) - mean) / std)


def reward_scale(reward: Reward, images: Tensor, prompts: Sequence[str]) -> tuple[float, float]:
    """Mean and standard deviation of R over reference images; feed them to `normalised`."""
    with torch.no_grad():
        values = reward(images, prompts).double()
    return float(values.mean()), float(values.std(correction=0))


def as_scores(values: Any, device: torch.device) -> Any:
    """Lists, arrays and tensors of whole numbers as a float32 tensor (B,); anything else as it is."""
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else values.to(device, torch.float32)
    try:
        numbers = np.array(values, dtype=np.float32)
    except (TypeError, ValueError):
        return values  # the loop says what it expected
    return torch.as_tensor(numbers, device=device) if numbers.ndim else values


def as_tensor_reward(reward: Reward) -> Reward:
    """The reward, whose answers go through `as_scores`. What was no tensor has no gradient."""
    if isinstance(reward, TwoTower):
        score, own = reward.score, torch.device("cpu")
        return Towers(reward.image_features, lambda seen, prompts: as_scores(score(seen, prompts), own))
    return lambda images, prompts: as_scores(reward(images, prompts), images.device)


def checked(reward: Reward, name: str) -> Reward:
    """The same reward, except that a result that is not a finite (B,) tensor raises an InputError that names it."""

    def check(values: Any, count: int) -> Tensor:
        if not isinstance(values, Tensor) or values.shape != (count,) or not values.is_floating_point():
            got = f"{tuple(values.shape)} {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"reward {name!r} returned {got} for {count} images; expected a float tensor of shape "
                f"({count},), one number per image"
            )
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise InputError(
                f"reward {name!r} returned {bad} values that are not finite out of {count}; "
                "look at its inputs, or compute it in float32"
            )
        return values

    if isinstance(reward, TwoTower):
        return Towers(reward.image_features, lambda seen, prompts: check(reward.score(seen, prompts), len(prompts)))
    return lambda images, prompts: check(reward(images, prompts), len(prompts))


def _towers(reward: Reward) -> tuple[Callable[[Tensor], Any], Callable[[Any, Sequence[str]], Tensor]]:
    """image_features and score; a plain reward's features are the images themselves."""
    if isinstance(reward, TwoTower):
        return reward.image_features, reward.score
    return (lambda images: images), reward


@dataclass(frozen=True)
class Towers:
    """A reward of two functions, `palate.core.TwoTower`."""

    image_features: Callable[[Tensor], Any]
    score: Callable[[Any, Sequence[str]], Tensor]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score(self.image_features(images), prompts)

"""The protocols that models, rewards and algorithms meet at, and the one source of randomness.

A model hides its parametrisation behind `predict`, a reward is a function, an algorithm is a generator of losses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from palate.path import Prediction, Schedule

Cond = Any  # what a model's text encoder returns: opaque to algorithms, indexable by sample through the model only
Reward = Callable[[Tensor, Sequence[str]], Tensor]  # images (B, 3, H, W) in [0, 1], B prompts -> (B,), larger is better


class Model(Protocol):
    """A text-to-image model in the units of `palate.path`: latents in, `Prediction` out."""

    schedule: Schedule
    latent_shape: tuple[int, int, int]  # (C, h, w)

    def encode_prompts(self, prompts: Sequence[str]) -> Cond: ...

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]; differentiable. Values are clipped, so a saturated pixel has no gradient."""

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        """Clean latent and noise in xt (B, C, h, w) at times t (B,). `weights` names the network that speaks."""

    def parameters(self, weights: str = "policy") -> list[nn.Parameter]:
        """The trainable parameters of the named weights, in a fixed order."""


class Batch(NamedTuple):
    """One step's work. `ids` (B,) are global sample ids: they, not the rank, decide each sample's random numbers."""

    prompts: list[str]
    cond: Cond
    ids: Tensor
    latents: Tensor | None = None  # (B, C, h, w) clean latents of real images (offline training)


class Loss(NamedTuple):
    value: Tensor  # scalar; train.py calls backward on it
    metrics: dict[str, Tensor]
    update: str | None = None  # the named weights to step after this backward; None accumulates


class Algorithm(Protocol):
    trains: tuple[str, ...]

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]: ...


class Random:
    """Counter-based random numbers: row i is a function of (seed, ids[i], step, purpose) and of nothing else.

    So resuming needs no saved generator state, previews never disturb training, and the numbers do not depend on how
    many ranks share the batch. Philox (Salmon et al. 2011) through numpy.
    """

    def __init__(self, seed: int, step: int, ids: Tensor | Sequence[int]):
        self.seed, self.step = int(seed), int(step)
        self.ids = [int(i) for i in ids]

    def _generator(self, purpose: str, sample: int | None) -> np.random.Generator:
        name = f"{self.seed}|{sample}|{self.step}|{purpose}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        return np.random.Generator(np.random.Philox(key=key))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal (B, *shape), float32."""
        rows = [self._generator(purpose, i).standard_normal(tuple(shape), dtype=np.float32) for i in self.ids]
        return torch.from_numpy(np.stack(rows))

    def uniform(self, purpose: str) -> Tensor:
        """Uniform on [0, 1), (B,), float64."""
        return torch.tensor([self._generator(purpose, i).random() for i in self.ids], dtype=torch.float64)

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        """Uniform integers low..high, both inclusive, (B,)."""
        return torch.tensor([int(self._generator(purpose, i).integers(low, high + 1)) for i in self.ids])

    def shared_integer(self, purpose: str, low: int, high: int) -> int:
        """One integer low..high for the whole step, the same on every rank."""
        return int(self._generator(purpose, None).integers(low, high + 1))

    def shared_normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """One standard normal of `shape` for the whole step, the same on every rank."""
        return torch.from_numpy(self._generator(purpose, None).standard_normal(tuple(shape), dtype=np.float32))

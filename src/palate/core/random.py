"""The one source of randomness, and the order of the prompts: functions of a seed and of a sample's number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def prompt_order(count: int, seed: int, first: int, size: int) -> list[int]:
    """Which of `count` prompts the samples first .. first + size - 1 use: each once an epoch, shuffled anew."""
    order: dict[int, np.ndarray] = {}
    chosen = []
    for i in range(first, first + size):
        epoch, place = divmod(i, count)
        if epoch not in order:
            order[epoch] = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
        chosen.append(int(order[epoch][place]))
    return chosen


def used_prompts(prompts: Sequence[str], seed: int, samples: int) -> list[str]:
    """Those of `prompts` that the first `samples` samples of a run use, in the order in which they were given."""
    order = prompt_order(len(prompts), seed, 0, min(samples, len(prompts)))
    return [prompts[i] for i in sorted(set(order))]


class Random:
    """Counter-based random numbers: row i is a function of (seed, ids[i], step, purpose) and of nothing else.

    So resuming needs no saved generator state, previews never disturb training, and the numbers do not depend on how
    many ranks share the batch. Philox (Salmon et al. 2011) through numpy.
    """

    def __init__(self, seed: int, step: int, ids: Tensor | Sequence[int]):
        self.seed, self.step = int(seed), int(step)
        self.ids = [int(i) for i in ids]

    def grouped(self, size: int) -> Random:
        """Of `size` samples in the place of each: sample k of group i has the id i * size + k."""
        return Random(self.seed, self.step, [i * size + k for i in self.ids for k in range(size)])

    def _generator(self, purpose: str, sample: int | None) -> np.random.Generator:
        name = f"{self.seed}|{sample}|{self.step}|{purpose}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        return np.random.Generator(np.random.Philox(key=key))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal (B, *shape), float32."""
        rows = [self._generator(purpose, i).standard_normal(tuple(shape), dtype=np.float32) for i in self.ids]
        return torch.from_numpy(np.stack(rows))

    def uniform(self, purpose: str) -> Tensor:
        """Uniform on [0, 1), (B,), float64. For a network's times take `times`."""
        return torch.tensor([self._generator(purpose, i).random() for i in self.ids], dtype=torch.float64)

    def times(self, purpose: str) -> Tensor:
        """Uniform on (0, 1], (B,), float32: times at which a network can be evaluated, never the clean 0."""
        return (1 - self.uniform(purpose)).float().clamp_min(torch.finfo(torch.float32).tiny)

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        """Uniform integers low..high, both inclusive, (B,)."""
        return torch.tensor([int(self._generator(purpose, i).integers(low, high + 1)) for i in self.ids])

    def shared_integer(self, purpose: str, low: int, high: int) -> int:
        """One integer low..high for the whole step, the same on every rank."""
        return int(self._generator(purpose, None).integers(low, high + 1))

    def shared_normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """One standard normal of `shape` for the whole step, the same on every rank."""
        return torch.from_numpy(self._generator(purpose, None).standard_normal(tuple(shape), dtype=np.float32))

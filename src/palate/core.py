"""The protocols that models, rewards and algorithms meet at, and the one source of randomness.

A model hides its parametrisation behind `predict`, a reward is a function, an algorithm is a generator of losses.

`Model`, `Reward` and `Algorithm` are what every one of them must do. What some can do besides has a protocol of its
own, with its name: it is enough to have the members, nothing needs to be inherited. Nothing outside this file asks an
object for a member that no protocol lists.

    a model may be      Sampleable, PublishedGrid, Fingerprinted, TextCached, SavesAdapter, LoadsAdapter,
                        TakesConsistency, HasNetworks
    a reward may be     TwoTower
    an algorithm may be Stateful, Steerable, ComparesWords, DrawsOwnSamples, Warns, ChecksBatch
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from palate.path import Prediction, Schedule

Cond = Any  # what a model's text encoder returns: opaque to algorithms, indexable by sample through the model only
Reward = Callable[[Tensor, Sequence[str]], Tensor]  # images (B, 3, H, W) in [0, 1], B prompts -> (B,), larger is better


# ------------------------------------------------------------------------------------------------------------- models


class Model(Protocol):
    """A text-to-image model in the units of `palate.path`: latents in, `Prediction` out."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)"""

    def encode_prompts(self, prompts: Sequence[str]) -> Cond: ...

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]; differentiable. Values are clipped, so a saturated pixel has no gradient."""

    def predict(
        self, xt: Tensor, t: Tensor, cond: Cond, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        """Clean latent and noise in xt (B, C, h, w) at times t (B,). `weights` names the network that predicts."""

    def parameters(self, weights: str = "policy") -> list[nn.Parameter]:
        """The trainable parameters of the named weights, in a fixed order."""


@runtime_checkable
class EncodesPictures(Protocol):
    """A model that real pictures can be fitted to: training on them needs its image size."""

    @property
    def image_size(self) -> int | tuple[int, int]: ...

    def encode(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class Sampleable(Model, Protocol):
    """A model that says how it is sampled when nobody else does: previews, the guard and evaluations need it."""

    @property
    def default_steps(self) -> int: ...

    @property
    def default_guidance(self) -> float: ...

    @property
    def image_size(self) -> int | tuple[int, int]:
        """In pixels: the side of a square, or (height, width)."""

    @property
    def device(self) -> torch.device:
        """Where the model computes; noise is moved there."""


@runtime_checkable
class HasPosterior(Protocol):
    """A model whose encoder says how sure it is of a latent."""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, which is what `encode` returns, and standard deviation, (B, C, h, w) each, of the latents of images."""


@runtime_checkable
class PublishedGrid(Protocol):
    """A model that was published with times of its own."""

    def time_grid(self, steps: int) -> Tensor:
        """Times (steps + 1,) from the first down to 0, float64."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A model that can tell which base weights it holds."""

    def fingerprint(self) -> str:
        """SHA-256 of the base weights, in hexadecimal; adapters are not included."""


@runtime_checkable
class TextCached(Protocol):
    """A model that can encode prompts ahead of time and then free its text encoders."""

    def cache_prompts(self, prompts: Sequence[str]) -> None: ...


@runtime_checkable
class SavesAdapter(Protocol):
    """A model that writes what was trained in the form in which others read it."""

    def save_adapter(self, folder: Path) -> None: ...


@runtime_checkable
class LoadsAdapter(Protocol):
    """A model that reads back what it once wrote."""

    def load_adapter(self, folder: Path) -> None:
        """Read back what `save_adapter` wrote, into a model of the same training mode, rank and names."""


@runtime_checkable
class TakesConsistency(Protocol):
    """A model that can be given the frozen weights "consistency"."""

    def load_consistency(self, folder: Path | str | None = None) -> None: ...


class Networks(Protocol):
    """Networks by name."""

    @property
    def networks(self) -> Mapping[str, nn.Module]: ...

    @property
    def training(self) -> str:
        """One of lora, full, none."""


@runtime_checkable
class HasNetworks(Protocol):
    """A model whose networks can be cut over ranks, and named in messages."""

    @property
    def weights(self) -> Networks: ...


# ------------------------------------------------------------------------------------------------------------ rewards


@runtime_checkable
class TwoTower(Protocol):
    """A reward that looks at images and at prompts separately, so that several texts share one look at the images."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...

    @property
    def image_features(self) -> Callable[[Tensor], Any]:
        """Images (B, 3, H, W) -> what `score` takes."""

    @property
    def score(self) -> Callable[[Any, Sequence[str]], Tensor]:
        """Features of B images and B prompts -> (B,)."""


@runtime_checkable
class HasFeatures(Protocol):
    """A reward without gradient, with differentiable features of its images that a head can learn it on."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...

    @property
    def features(self) -> Callable[[Tensor, Sequence[str]], Tensor]:
        """Images (B, 3, H, W) and B prompts -> (B, F)."""


# --------------------------------------------------------------------------------------------------------- algorithms


class Batch(NamedTuple):
    """One step's work. `ids` (B,) are global sample ids: they, not the rank, decide each sample's random numbers."""

    prompts: list[str]
    cond: Cond
    ids: Tensor
    latents: Tensor | None = None  # (B, C, h, w) clean latents of real images (offline training)


class Loss(NamedTuple):
    """What an algorithm yields: a scalar to differentiate, values to log, and which weights it updates."""

    value: Tensor  # scalar; the loop calls backward on it
    metrics: dict[str, Tensor]
    update: str | None = None  # the named weights to step after this backward; None accumulates


class Algorithm(Protocol):
    """A generator of losses; the loop does the rest. Code after a `yield` runs after the update."""

    @property
    def trains(self) -> tuple[str, ...]:
        """The names of the weights that it updates: ("policy",) or ("policy", "assistant")."""

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]: ...


@runtime_checkable
class Stateful(Protocol):
    """What a checkpoint must hold besides weights: a tree of tensors, numbers and texts with string keys."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Steerable(Stateful, Protocol):
    """An algorithm whose control words may change between two steps."""

    def steer(self, positive: Sequence[str] | None = None, negative: Sequence[str] | None = None) -> None:
        """Replace the control words from the next step on; None keeps a list. ValueError: they cannot be used."""

    def control_texts(self, prompt: str) -> dict[str, list[str]]:
        """What the reward is asked about a prompt, by side ("positive", "negative"), one text for each word."""


@runtime_checkable
class ComparesWords(Steerable, Protocol):
    """A steerable algorithm that may train the difference between positive and negative words."""

    @property
    def relative(self) -> bool:
        """Whether it does: then a reward must know words."""


class Sampler(Protocol):
    """How an algorithm draws from its policy: `steps` evaluations without guidance, each with a noise of its own."""

    @property
    def steps(self) -> int: ...

    def __call__(self, model: Model, cond: Cond, noises: Sequence[Tensor], *, weights: str = "policy") -> Tensor: ...


@runtime_checkable
class DrawsOwnSamples(Protocol):
    """An algorithm whose policy is not sampled along a time grid, such as a few-step generator."""

    @property
    def sampler(self) -> Sampler: ...


@runtime_checkable
class DrawsReference(Protocol):
    """An algorithm whose reference is drawn by its sampler too: it is the generator that training began with."""

    @property
    def draws_reference(self) -> bool: ...


@runtime_checkable
class Warns(Protocol):
    """An algorithm that knows when its settings are at odds; the loop says each sentence once."""

    def warnings(self, learning_rates: Mapping[str, float]) -> list[str]: ...


@runtime_checkable
class ChecksBatch(Protocol):
    """An algorithm that cannot work with every batch size."""

    def check_batch(self, size: int) -> None:
        """ValueError: a step of `size` samples cannot work; the message says why."""


GuardMeasure = Callable[[Model, list[str], list[int]], dict[str, float]]  # model, prompts, sample ids -> named values


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
        """Uniform on (0, 1], (B,), float32: times at which a network may be asked, none of them clean."""
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

"""What a model is, and what some models can do besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from palate.path import Prediction, Schedule

Cond = Any  # what a model's text encoder returns: opaque to algorithms, indexable by sample through the model only


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
class DrawsOtherSizes(Protocol):
    """A model that can be told to draw images of another size for a while."""

    def at_size(self, image_size: int | Sequence[int]) -> AbstractContextManager[None]:
        """Inside, `latent_shape`, `image_size` and all that depends on them are those of that size, in pixels."""


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
class PutsWords(Protocol):
    """A model that knows where words stand in its prompts, and which of them a prompt rules out."""

    def with_words(self, prompt: str, words: Sequence[str]) -> str:
        """The prompt with those words that say what it leaves open. InputError for a word that is not known."""


@runtime_checkable
class SavesAdapter(Protocol):
    """A model that writes what was trained in the form in which others read it."""

    def save_adapter(self, folder: Path) -> None: ...


@runtime_checkable
class TrainsOtherwise(Protocol):
    """A model that is not trained as it is sampled: a distilled one may have an adapter for training alone."""

    def while_training(self) -> AbstractContextManager[None]:
        """Inside, `predict` is what training uses; backward passes belong inside as well."""


@runtime_checkable
class HasStrength(Protocol):
    """A model whose LoRA can be scaled: the policy with a part of what it has learnt, or with more than it."""

    def at_strength(self, strength: float) -> AbstractContextManager[None]:
        """Inside, the policy's LoRA is multiplied by it: 0 = the base model, 1 = as trained. InputError: no LoRA."""


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


GuardMeasure = Callable[[Model, list[str], list[int]], dict[str, float]]  # model, prompts, sample ids -> named values

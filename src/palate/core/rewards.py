"""What a reward is, and what some rewards can do besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Reward = Callable[[Tensor, Sequence[str]], Tensor]  # images (B, 3, H, W) in [0, 1], B prompts -> (B,), larger is better


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
class EmbedsImages(Protocol):
    """A reward with an image tower of its own: it can say how alike two images are to it."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> unit vectors (B, D)."""


@runtime_checkable
class HasFeatures(Protocol):
    """A reward without gradient, with differentiable features of its images that a head can learn it on."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...

    @property
    def features(self) -> Callable[[Tensor, Sequence[str]], Tensor]:
        """Images (B, 3, H, W) and B prompts -> (B, F)."""

"""The panel that judges a run: rewards, a classifier of images, and exact measures of the embedded model's drawings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from palate.core import Reward, TwoTower
from palate.evaluate.metrics import label_correct
from palate.rewards import simple


class ImageClassifier(Protocol):
    """A network that was never optimised against. Features for distances, and names for what it sees; it may know no
    names, and is then asked for none."""

    styles: list[str]
    concepts: list[str]

    def features(self, images: Tensor) -> Tensor:
        """(B, D), for distances and diversity."""

    def concept(self, images: Tensor) -> Tensor:
        """(B,) index into `concepts`."""

    def style(self, images: Tensor) -> Tensor:
        """(B,) index into `styles`."""


class Caption(Protocol):
    """What a prompt asks for; None = not said."""

    @property
    def concept(self) -> str | None: ...
    @property
    def style(self) -> str | None: ...
    @property
    def background(self) -> str | None: ...
    @property
    def position(self) -> str | None:
        """One of `metrics.SIDES`; read only where there is an exact measure of it."""


class EvaluationPanel(NamedTuple):
    """Every evaluator of a run. `heldout` names the reward that no recipe may optimise."""

    rewards: dict[str, Reward]
    heldout: str
    classifier: ImageClassifier
    parse: Callable[[str], Caption] | None = None  # None: prompts ask for nothing that could be checked
    background: Callable[[Tensor], Tensor] | None = None  # images -> (B,) index into colours
    colours: Sequence[str] = ()
    position: Callable[[Tensor], Tensor] | None = None  # images -> (B, 2) centre (x, y) in [-1, 1], NaN if empty
    digests: Mapping[str, str] = {}  # of rewards whose names do not tell them from others, as tastes
    device: torch.device = torch.device("cpu")  # on which the rewards, and the classifier's features, are computed


def embedded_panel() -> EvaluationPanel:
    """The rewards, the classifier and the exact measures that come with the package."""
    emoji = import_module("palate.rewards.emoji")  # with transformers, which whoever judges nothing must not wait for
    rewards: dict[str, Reward] = {name: emoji.load_reward(name) for name in ("emoji", "emoji-heldout")}
    rewards["jpeg_size"] = simple.jpeg_size
    classifier, colours = emoji.EmojiClassifier(), list(emoji.COLOURS)
    return EvaluationPanel(
        rewards, "emoji-heldout", classifier, emoji.parse_prompt, emoji.background, colours, emoji.position
    )


class _Tower:
    """The image tower of a reward as a classifier that knows no names."""

    def __init__(self, reward: TwoTower):
        self.tower = reward.image_features
        self.styles: list[str] = []
        self.concepts: list[str] = []

    def features(self, images: Tensor) -> Tensor:
        return self.tower(images)

    def concept(self, images: Tensor) -> Tensor:
        raise AssertionError("this classifier knows no concepts")

    def style(self, images: Tensor) -> Tensor:
        raise AssertionError("this classifier knows no styles")


def published_panel(heldout: str, reward: TwoTower, device: str | torch.device = "cpu") -> EvaluationPanel:
    """For any model: a two-tower reward that was not optimised. Its image features give distances and diversity; what a
    prompt asks for is not checked. All rewards of the panel are computed on the device."""
    rewards: dict[str, Reward] = {heldout: reward, "jpeg_size": simple.jpeg_size}
    return EvaluationPanel(rewards, heldout, _Tower(reward), device=torch.device(device))


def concept_accuracy(classifier: ImageClassifier, images: Tensor, captions: Sequence[Caption]) -> float:
    """Fraction of the images whose concept the classifier reads as the prompt says; NaN when no prompt names one."""
    wanted = [caption.concept for caption in captions]
    return float(label_correct(classifier.concept(images), classifier.concepts, wanted).nanmean())

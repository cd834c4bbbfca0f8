"""The built-in black-box objectives of `palate optimize`: (images, prompts) -> numbers, never differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from palate.core import Reward
from palate.models.vocabulary import vocabulary
from palate.rewards.emoji import EmojiClassifier, parse_prompt, position
from palate.rewards.simple import SIDES, border, jpeg_size
from palate.runtime.errors import InputError

Oracle = Callable[[Tensor, Sequence[str]], Any]  # images (B, 3, H, W) in [0, 1], prompts -> B numbers, more is better


def compressibility() -> Oracle:
    """Minus the size of the image as a JPEG, in kilobytes."""
    return lambda images, prompts: -jpeg_size(images) / 1000


def hidden_classifier() -> Oracle:
    """How sure a classifier that no surrogate sees is of the prompt's concept: its probability, in [0, 1]."""
    classifier = EmojiClassifier()

    @torch.no_grad()
    def classifier_oracle(images: Tensor, prompts: Sequence[str]) -> Tensor:
        concepts = [parse_prompt(prompt).concept for prompt in prompts]
        if None in concepts:
            raise InputError(f"the hidden judge needs a concept; there is none in {prompts[concepts.index(None)]!r}")
        found = classifier.logits(images)[0].softmax(-1)
        return found[torch.arange(len(images)), [classifier.concepts.index(str(concept)) for concept in concepts]]

    return classifier_oracle


def colour_and_position() -> Oracle:
    """Exact, in [0, 1]: how near the border is to the background that the prompt names, and how far the drawing is on
    the side that it names; the mean of what is named."""
    colours = {name: torch.tensor(rgb, dtype=torch.float32) / 255 for name, rgb in vocabulary().colours.items()}

    def exact(images: Tensor, prompts: Sequence[str]) -> list[float]:
        edge, centre, scores = border(images), position(images).nan_to_num(0.0), []
        for k, caption in enumerate(map(parse_prompt, prompts)):
            parts = []
            if caption.background is not None:
                parts.append(1 - float((edge[k] - colours[caption.background]).norm()) / math.sqrt(3))
            if caption.position is not None:
                axis, sign = SIDES[caption.position]
                parts.append((1 + sign * float(centre[k, axis])) / 2)
            if not parts:
                raise InputError(
                    f"the colour and position oracle needs a background or a side; {prompts[k]!r} names neither"
                )
            scores.append(sum(parts) / len(parts))
        return scores

    return exact


BUILT_IN: dict[str, Callable[[], Oracle]] = {
    "jpeg-size": compressibility,
    "hidden-judge": hidden_classifier,
    "colour-position": colour_and_position,
}


def exact_reward(name: str) -> Reward:
    """A built-in oracle without noise, as a reward: for judging, after everything was asked."""
    oracle = BUILT_IN[name]()
    return lambda images, prompts: torch.as_tensor(oracle(images, prompts), dtype=torch.float32)

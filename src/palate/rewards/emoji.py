"""The embedded rewards, the judge and the exact oracles of the background colour and of the position.

"emoji" is what runs optimise. "emoji-heldout" and the judge are other networks, trained apart, and not optimised, but
for the judge as the oracle hidden-judge of `palate optimize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast, ResNetForImageClassification, VisionTextDualEncoderModel

from palate.core import Reward
from palate.models.quiet import quietly
from palate.models.vocabulary import known_words, parse_prompt, vocabulary
from palate.rewards.clip import ClipReward, preprocess
from palate.rewards.placement import follow
from palate.rewards.simple import border
from palate.runtime.deprecated import old_names
from palate.runtime.errors import InputError

__all__ = ["COLOURS", "EmojiClassifier", "background", "load_reward", "parse_prompt", "position"]

REWARDS: dict[str, tuple[str, type[CLIPModel] | type[VisionTextDualEncoderModel]]] = {
    "emoji": ("reward-emoji", CLIPModel),
    "emoji-heldout": ("reward-heldout", VisionTextDualEncoderModel),
}
COLOURS = list(vocabulary().colours)


def _folder(name: str) -> Path:
    return Path(str(files("palate") / "assets" / name))


def load_reward(name: str) -> Reward:
    """An embedded reward by name: differentiable cosine(image, prompt), (B,)."""
    if name not in REWARDS:
        raise InputError(f"reward.name got {name!r}; expected one of {', '.join(REWARDS)}")
    asset, kind = REWARDS[name]
    folder = _folder(asset)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    length = vocabulary().max_words + 2

    def tokenize(prompts: Sequence[str]) -> dict[str, Tensor]:
        lines = [" ".join(known_words(prompt)) for prompt in prompts]
        return dict(
            tokenizer(lines, padding="max_length", max_length=length, return_tensors="pt", return_token_type_ids=False)
        )

    with quietly(folder):
        network = kind.from_pretrained(folder, dtype=torch.float32)
    return ClipReward(network, tokenize, image_size=64)


class EmojiClassifier:
    """Names the concept and the style of images. A classifier, trained apart from the rewards."""

    def __init__(self) -> None:
        self.model: Any
        with quietly(_folder("judge")):
            self.model = ResNetForImageClassification.from_pretrained(_folder("judge"), dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.concepts, self.styles = vocabulary().concepts, vocabulary().styles

    def _pooled(self, images: Tensor) -> Tensor:
        follow(self.model, images.device)
        return self.model.resnet(preprocess(images, 64)).pooler_output

    def features(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) before the classifier: for diversity and distances."""
        return F.normalize(self._pooled(images).flatten(1), dim=-1)

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of the concepts (B, number of concepts) and of the styles (B, 4)."""
        return self.model.classifier(self._pooled(images)).split([len(self.concepts), len(self.styles)], dim=-1)

    def concept(self, images: Tensor) -> Tensor:
        return self.logits(images)[0].argmax(-1)

    def style(self, images: Tensor) -> Tensor:
        return self.logits(images)[1].argmax(-1)


def background(images: Tensor) -> Tensor:
    """The exact oracle: index into COLOURS of the colour nearest to the border's median, (B,)."""
    known = torch.tensor(list(vocabulary().colours.values()), dtype=images.dtype, device=images.device) / 255
    return torch.cdist(border(images), known).argmin(-1)


def position(images: Tensor) -> Tensor:
    """The exact oracle of where the drawing is: the centre of what differs from the background, (B, 2) as (x, y) in
    [-1, 1] with (1, 1) the bottom right; NaN for an empty image."""
    apart = (images - border(images)[..., None, None]).abs().amax(1) > 0.15
    height, width = images.shape[-2:]
    x = torch.linspace(-1 + 1 / width, 1 - 1 / width, width, device=images.device)
    y = torch.linspace(-1 + 1 / height, 1 - 1 / height, height, device=images.device)
    mass = apart.float().sum((1, 2))
    return torch.stack([(apart * x).sum((1, 2)) / mass, (apart * y[:, None]).sum((1, 2)) / mass], dim=1)


__getattr__ = old_names(__name__, {"Judge": EmojiClassifier})

"""CLIP-like rewards: cosine similarity of an image and a text embedding, differentiable in the image.

Any transformers CLIPModel serves, or a VisionTextDualEncoderModel: both have get_image_features and get_text_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images (Radford et al. 2021)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as CLIP's towers want them: short side `size`, centre crop, normalised.

    Bicubic with antialiasing, as PIL does it; without antialiasing pixels differ by up to 170/255.
    """
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        shape = [max(size, round(height * scale)), max(size, round(width * scale))]
        images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        images = images[..., top: top + size, left: left + size]
    mean, std = (torch.tensor(c, dtype=images.dtype, device=images.device).view(1, 3, 1, 1) for c in (MEAN, STD))
    return (images - mean) / std


class ClipReward:
    """cosine(image, text), in [-1, 1], of a frozen two-tower model. Text features are cached per prompt.

    `tokenize` turns prompts into the text tower's arguments (input_ids and, where needed, attention_mask).
    """

    def __init__(self, model: nn.Module, tokenize: Any, *, image_size: int):
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size
        self._tokenize = tokenize
        self._text = lru_cache(maxsize=100_000)(self._text_features)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D); differentiable."""
        pixels = preprocess(images, self.image_size)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return (features * torch.stack([self._text(prompt) for prompt in prompts]).to(features)).sum(-1)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score(self.image_features(images), prompts)

    @torch.no_grad()
    def _text_features(self, prompt: str) -> Tensor:
        output = self.model.get_text_features(**self._tokenize([prompt])).pooler_output
        return F.normalize(output, dim=-1)[0]

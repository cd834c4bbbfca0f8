"""CLIP-like rewards: CLIP score, PickScore, HPSv2 and HPSv2.1. Cosine similarity of an image and a text embedding.

    CLIP score   max(0, 100 cos)           Hessel et al. 2021, arXiv 2104.08718; ViT-L/14 or H/14
    PickScore    exp(logit_scale) cos      Kirstain et al. 2023, arXiv 2305.01569; ViT-H/14
    HPSv2, v2.1  cos                       Wu et al. 2023, arXiv 2306.09341; ViT-H/14 in OpenCLIP's names

All are differentiable in the image. Any transformers CLIPModel serves, or a VisionTextDualEncoderModel: both have
get_image_features and get_text_features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    VisionTextDualEncoderModel,
)

from palate.rewards.files import load_state, pretrained, read_tensors, weights_file
from palate.rewards.open_clip import from_open_clip, vit_h_14
from palate.rewards.placement import follow
from palate.runtime.errors import InputError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images (Radford et al. 2021)
STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # the vocabulary of every CLIP here


def normalised_pixels(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with CLIP's mean and standard deviation taken out."""
    mean, std = (torch.tensor(c, dtype=images.dtype, device=images.device).view(1, 3, 1, 1) for c in (MEAN, STD))
    return (images - mean) / std


def preprocess(images: Tensor, size: int, *, fit: Literal["crop", "pad"] = "crop") -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as CLIP's towers want them: (B, 3, size, size), normalised; float32 or wider.

    "crop": the short side becomes `size`, the middle is kept. "pad": the long side does, the rest is black. Equal for
    squares. Bicubic with antialiasing, as PIL does it; without antialiasing pixels differ by up to 170/255.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        if fit == "crop":
            short = min(height, width)
            shape = [size * height // short, size * width // short]
        else:
            shape = [max(1, round(side * size / max(height, width))) for side in (height, width)]
        images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
        rows, columns = size - shape[0], size - shape[1]  # below 0 for a crop
        top, left = int(rows / 2), int(columns / 2)
        images = F.pad(images, (left, columns - left, top, rows - top))
    return normalised_pixels(images)


class ClipReward:
    """scale cosine(image, text), at least `floor`, of a frozen two-tower model. Text features are cached per prompt.

    `tokenize` turns prompts into the text tower's arguments (input_ids and, where needed, attention_mask). The model
    follows the images to their device; its dtype is the caller's choice, the result is float32 or wider.
    """

    def __init__(
        self,
        model: CLIPModel | VisionTextDualEncoderModel,
        tokenize: Callable[[Sequence[str]], Mapping[str, Tensor]],
        *,
        image_size: int,
        fit: Literal["crop", "pad"] = "crop",
        scale: float = 1.0,
        floor: float = -math.inf,
    ):
        self.model = model.eval().requires_grad_(False)
        self.image_size, self.fit, self.scale, self.floor = image_size, fit, scale, floor
        self._tokenize = tokenize
        self._text = lru_cache(maxsize=100_000)(self._text_features)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D); differentiable."""
        weight = next(self.model.parameters())
        follow(self.model, images.device)
        pixels = preprocess(images, self.image_size, fit=self.fit)
        output = self.model.get_image_features(pixel_values=pixels.to(weight.dtype)).pooler_output
        return F.normalize(output.to(pixels.dtype), dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D), as the score has them."""
        return self.image_features(images)

    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = (features * torch.stack([self._text(prompt).to(features) for prompt in prompts])).sum(-1)
        return (self.scale * cosine).clamp_min(self.floor)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score(self.image_features(images), prompts)

    @torch.no_grad()
    def _text_features(self, prompt: str) -> Tensor:
        weight = next(self.model.parameters())
        tokens = {name: ids.to(weight.device) for name, ids in self._tokenize([prompt]).items()}
        output = self.model.get_text_features(**tokens).pooler_output
        return F.normalize(output.to(torch.promote_types(output.dtype, torch.float32)), dim=-1)[0]


# ------------------------------------------------------------------------------------------------------ loading


def load_clip_score(source: str | None = None, *, dtype: torch.dtype = torch.float32) -> ClipReward:
    """max(0, 100 cos). `source` is a transformers folder or hub id; openai/clip-vit-large-patch14 if left out."""
    source = source or "openai/clip-vit-large-patch14"
    how = "Give the folder of a transformers CLIPModel, or download one: hf download openai/clip-vit-large-patch14"
    model = pretrained(CLIPModel, "clip-score", source, how=how, dtype=dtype)
    return _reward(model, "clip-score", source, scale=100.0, floor=0.0)


def load_pickscore(source: str | None = None, *, dtype: torch.dtype = torch.float32) -> ClipReward:
    """exp(logit_scale) cos, about 100 cos. `source` is a transformers folder or hub id."""
    source = source or "yuvalkirstain/PickScore_v1"
    how = "Download it: hf download yuvalkirstain/PickScore_v1"
    model = pretrained(CLIPModel, "pickscore", source, how=how, dtype=torch.float32)
    scale = float(model.logit_scale.detach().double().exp())  # read before it is rounded: bfloat16 makes 98.9 of 100
    return _reward(model.to(dtype), "pickscore", source, scale=scale)


def load_hpsv2(
    source: str | None = None, *, dtype: torch.dtype = torch.float32, fit: Literal["crop", "pad"] = "pad"
) -> ClipReward:
    """cos of HPSv2 or HPSv2.1, whichever the file holds: OpenCLIP's or transformers' tensors of a ViT-H/14.

    `source` is the .safetensors file, a folder with it (and perhaps a tokenizer), or a hub id. The official transform
    pads; SRPO's program crops; squares do not care.
    """
    how = (
        "`palate fetch hpsv2` downloads it (as hf download xswu/HPSv2 HPS_v2.1_compressed.pt does) and converts it; "
        "give the file that it names"
    )
    if source is None:
        raise InputError(f"reward.source.hpsv2: the weights are published as a pickle only. {how}")
    path = weights_file("hpsv2", source, default="HPS_v2.1_compressed.safetensors", how=how)
    state = read_tensors(path)
    if "visual.conv1.weight" in state:
        state = from_open_clip(state)
    model = load_state(lambda: CLIPModel(vit_h_14()), state, reward="hpsv2", path=path, dtype=dtype)
    folder = Path(source) if Path(source).is_dir() else path.parent
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else CLIP_TOKENIZER
    return _reward(model, "hpsv2", tokenizer, fit=fit)


def tokenizer_of(reward: str, source: str, *, length: int) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """Prompts -> input_ids and attention_mask (B, length); warns once, with the count, of a prompt that is cut."""
    how = "A tokenizer is needed beside the weights: hf download " + CLIP_TOKENIZER
    tokenizer = pretrained(AutoTokenizer, reward, source, how=how)
    warned = False

    def tokenize(prompts: Sequence[str]) -> dict[str, Tensor]:
        nonlocal warned
        longest = max(len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids)
        if longest > length and not warned:
            warned = True
            warnings.warn(
                f"reward {reward}: a prompt of {longest} tokens is cut at {length}; its end is not seen", stacklevel=2
            )
        return dict(
            tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
                return_token_type_ids=False,
            )
        )

    return tokenize


def _reward(model: CLIPModel, name: str, tokenizer: str, **options: Any) -> ClipReward:
    text, vision = model.config.text_config, model.config.vision_config
    assert isinstance(text, CLIPTextConfig) and isinstance(vision, CLIPVisionConfig), "a CLIPModel has both parts"
    assert isinstance(vision.image_size, int), "CLIP's pictures are square"
    tokenize = tokenizer_of(name, tokenizer, length=text.max_position_embeddings)
    return ClipReward(model, tokenize, image_size=vision.image_size, **options)

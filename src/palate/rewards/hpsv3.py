"""HPSv3: Ma et al. 2025, arXiv 2508.03789. Qwen2-VL-7B reads image and prompt; a head on one special token scores.

Head 3584-1024-16-2 with ReLU on the hidden state of <|Reward|>; the first of its two outputs is the score. The
image goes in as a differentiable tensor: resized so that both sides are multiples of 28 and the area that of 448 x 448,
cut into 14 x 14 patches, each frame doubled in time, patches in the order that the 2 x 2 merge expects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from palate.rewards.clip import normalised_pixels
from palate.rewards.files import load_state, pretrained, read_tensors, weights_file
from palate.rewards.placement import follow
from palate.runtime.errors import InputError

REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28  # of the resized image, as in training
HOW = (
    "Give a folder with HPSv3.safetensors (hf download MizzenAI/HPSv3), config.json and the tokenizer of "
    "Qwen/Qwen2-VL-7B-Instruct, and prompt.txt: the chat text of HPSv3's own repository with {prompt}, {image} and "
    "<|Reward|> in their places"
)


def resized_shape(height: int, width: int, *, unit: int = 28, pixels: int = PIXELS) -> tuple[int, int]:
    """Multiples of `unit` near the image's own ratio, with at most `pixels` and about as many."""
    if max(height, width) > 200 * min(height, width):
        raise InputError(f"hpsv3 got an image of {height} x {width}; expected sides at most 200 times apart")
    rows, columns = round(height / unit) * unit, round(width / unit) * unit
    if rows * columns > pixels:
        shrink = math.sqrt(height * width / pixels)
        return max(unit, math.floor(height / shrink / unit) * unit), max(unit, math.floor(width / shrink / unit) * unit)
    if rows * columns < pixels:
        grow = math.sqrt(pixels / (height * width))
        return math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return rows, columns


def patches(images: Tensor, *, size: int = 14, merge: int = 2, frames: int = 2) -> tuple[Tensor, tuple[int, int]]:
    """Rows (B h w, 3 frames size^2) of images whose sides divide by size merge, and their grid (h, w).

    Patches run through each merge x merge group before the next one, as the vision tower's merger reads them.
    """
    batch, channels, height, width = images.shape
    h, w = height // size, width // size
    x = images[:, :, None].expand(-1, -1, frames, -1, -1)
    x = x.reshape(batch, channels, frames, h // merge, merge, size, w // merge, merge, size)
    x = x.permute(0, 3, 6, 4, 7, 1, 2, 5, 8)  # group row, group column, row and column inside it, then the patch itself
    return x.reshape(batch * h * w, channels * frames * size * size), (h, w)


class HPSv3Reward:
    """The score (B,), about -10 to 15. The vision tower runs once however many prompts are compared.

    `tokenize(prompt, image_tokens)` gives the ids of the whole chat text, with `image_tokens` image placeholders and
    one reward token in it.
    """

    def __init__(
        self,
        model: Qwen2VLModel,
        head: nn.Module,
        tokenize: Callable[[str, int], Sequence[int]],
        reward_id: int,
        *,
        pixels: int = PIXELS,
    ):
        self.parts = nn.ModuleDict({"model": model, "head": head}).eval().requires_grad_(False)
        self.reward_id, self.pixels = reward_id, pixels
        self._ids = lru_cache(maxsize=100_000)(lambda prompt, count: tuple(tokenize(prompt, count)))

    def image_features(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Merged patch features (B, N, D) and the grid (h, w); differentiable."""
        model: Any = self.parts["model"]
        follow(self.parts, images.device)
        vision: Any = model.config.vision_config
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        shape = resized_shape(
            *images.shape[-2:], unit=vision.patch_size * vision.spatial_merge_size, pixels=self.pixels
        )
        if shape != tuple(images.shape[-2:]):
            images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
        rows, (h, w) = patches(
            normalised_pixels(images),
            size=vision.patch_size,
            merge=vision.spatial_merge_size,
            frames=vision.temporal_patch_size,
        )
        grid = torch.tensor([[1, h, w]] * len(images), device=images.device)
        return torch.stack(list(model.get_image_features(rows, grid).pooler_output)), (h, w)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D): the mean of the merged patch features."""
        return F.normalize(self.image_features(images)[0].float().mean(1), dim=-1)

    def score(self, features: tuple[Tensor, tuple[int, int]], prompts: Sequence[str]) -> Tensor:
        seen, _ = features
        model: Any = self.parts["model"]
        texts = [torch.tensor(self._ids(prompt, seen.shape[1])) for prompt in prompts]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(seen.device)  # right padding: causal, so harmless
        lengths = torch.tensor([len(text) for text in texts], device=seen.device)
        mask = (torch.arange(ids.shape[1], device=seen.device) < lengths[:, None]).long()
        placed = (ids == model.config.image_token_id) & mask.bool()
        embedded = model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter(placed[..., None], seen.to(embedded.dtype))
        # 0, 1, 2, ... on all three axes, image tokens too: the authors pass no positions, in training and inference,
        # and so never number an image's tokens by row and column, as Qwen2-VL does
        positions = torch.arange(ids.shape[1], device=seen.device).expand(3, len(texts), -1)
        hidden = model.language_model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        at = ((ids == self.reward_id) & mask.bool()).int().argmax(1)
        last = hidden[torch.arange(len(hidden), device=hidden.device), at]
        return self.parts["head"](last.to(next(self.parts["head"].parameters()).dtype))[:, 0]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score(self.image_features(images), prompts)


def head_of(width: int) -> nn.Sequential:
    """width-1024-16-2; the empty place is a dropout in training."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def split_checkpoint(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published tensors as those of Qwen2VLModel and of the head; older and newer layouts; lm_head is left out."""
    model, head = {}, {}
    for name, tensor in state.items():
        if name.startswith("rm_head."):
            head[name.removeprefix("rm_head.")] = tensor
        elif not name.startswith("lm_head."):
            name = name.removeprefix("model.")
            known = name.startswith(("visual.", "language_model."))
            model[name if known else f"language_model.{name}"] = tensor
    return model, head


def load_hpsv3(source: str | None = None, *, dtype: torch.dtype = torch.bfloat16) -> HPSv3Reward:
    """`source` is a folder as HOW says. The head stays in float32, as it was trained."""
    if source is None or not Path(source).is_dir():
        raise InputError(f"reward.source.hpsv3: got {source}, not a folder. {HOW}")
    folder = Path(source)
    for name in ("config.json", "prompt.txt"):
        if not (folder / name).is_file():
            raise InputError(f"reward.source.hpsv3: {folder} holds no {name}. {HOW}")
    template = (folder / "prompt.txt").read_text("utf-8")
    absent = [part for part in ("{prompt}", "{image}", REWARD_TOKEN) if template.count(part) != 1]
    if absent:
        raise InputError(f"reward.source.hpsv3: prompt.txt must hold {absent[0]} exactly once")
    path = weights_file("hpsv3", source, default="HPSv3.safetensors", how=HOW)
    model_state, head_state = split_checkpoint(read_tensors(path))
    config = Qwen2VLConfig(**json.loads((folder / "config.json").read_text("utf-8")))
    words = model_state.get("language_model.embed_tokens.weight")
    text = config.text_config
    assert isinstance(text, PreTrainedConfig), "transformers builds it from config.json"
    if words is not None:
        text.vocab_size = words.shape[0]  # the reward token was added to Qwen's vocabulary
    model = load_state(
        lambda: Qwen2VLModel._from_config(config, dtype=dtype), model_state, reward="hpsv3", path=path, dtype=dtype
    )
    head = load_state(lambda: head_of(text.hidden_size), head_state, reward="hpsv3", path=path, dtype=torch.float32)
    tokenizer = pretrained(AutoTokenizer, "hpsv3", source, how=HOW)
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    image = tokenizer.convert_ids_to_tokens(config.image_token_id)

    def tokenize(prompt: str, image_tokens: int) -> list[int]:
        before, after = template.replace("{image}", image * image_tokens).split("{prompt}")
        prompt = prompt.replace("<|", "< |")  # a prompt cannot place special tokens
        return tokenizer(before + prompt + after, add_special_tokens=False).input_ids

    return HPSv3Reward(model, head, tokenize, tokenizer.convert_tokens_to_ids(REWARD_TOKEN))

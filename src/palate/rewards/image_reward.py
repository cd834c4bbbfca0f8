"""ImageReward: Xu et al. 2023, arXiv 2304.05977. A BLIP that reads the prompt with the image before its eyes.

BLIP ViT-L/16 at 224, BERT-base with cross-attention to it, then on [CLS] an MLP 768-1024-128-64-16-1 without
activations (one affine map), and (x - 0.16717) / 1.03334: about normal on the authors' data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from palate.rewards.aesthetic import affine_head
from palate.rewards.clip import preprocess, tokenizer_of
from palate.rewards.files import load_state, read_tensors, weights_file
from palate.rewards.placement import follow
from palate.runtime.errors import InputError

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score on the authors' images
LENGTH = 35  # tokens of a prompt
TOKENIZER = "google-bert/bert-base-uncased"
HOW = (
    "`palate fetch image-reward` downloads it (as hf download zai-org/ImageReward ImageReward.pt does) and converts "
    "it; give the file that it names"
)


class ImageReward:
    """(weight . CLS + bias - MEAN) / STD, (B,). The image tower runs once however many prompts are compared."""

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        weight: Tensor,
        bias: Tensor,
        tokenize: Callable[[Sequence[str]], Mapping[str, Tensor]],
    ):
        size = vision.config.image_size
        assert isinstance(size, int), "BLIP's pictures are square"
        self.vision, self.text, self.image_size = vision, text, size
        self.towers = nn.ModuleDict({"vision": vision, "text": text}).eval().requires_grad_(False)
        self.weight, self.bias = weight, bias
        self._tokens = lru_cache(maxsize=100_000)(lambda prompt: tokenize([prompt]))

    def image_features(self, images: Tensor) -> Tensor:
        """Patch features (B, 1 + patches, D); differentiable."""
        own = next(self.towers.parameters())
        follow(self.towers, images.device)
        pixels = preprocess(images, self.image_size)
        return self.vision(pixel_values=pixels.to(own.dtype)).last_hidden_state

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D): what BLIP's first token, which stands for the whole image, holds."""
        return F.normalize(self.image_features(images)[:, 0].float(), dim=-1)

    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        tokens = [self._tokens(prompt) for prompt in prompts]
        ids, mask = (
            torch.cat([t[name] for t in tokens]).to(features.device) for name in ("input_ids", "attention_mask")
        )
        seen = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        output = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=features,
            encoder_attention_mask=seen,
            is_decoder=False,
        ).last_hidden_state[:, 0]
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return (output @ self.weight.to(output) + self.bias.to(output) - MEAN) / STD

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score(self.image_features(images), prompts)


def blip_large() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """ViT-L/16 at 224 and BERT-base with cross-attention, as BLIP builds them."""
    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=30524,
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
        is_decoder=True,
    )
    return vision, text


_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
    "blocks.": "encoder.layers.",
}
_IN_BLOCK = {
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}


def split_checkpoint(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The published tensors as those of BlipVisionModel, of BlipTextModel, and of the head.

    BLIP's contrastive projections, momentum copies and constant position_ids are left out.
    """
    vision, text, head = {}, {}, {}
    for name, tensor in state.items():
        name = name.removeprefix("blip.")
        if name.startswith("visual_encoder."):
            old = name.removeprefix("visual_encoder.")
            prefix = next((p for p in _VISION if old.startswith(p)), "")
            new = _VISION.get(prefix, "") + old[len(prefix) :]
            for part, now in _IN_BLOCK.items():
                new = new.replace(part, now)
            vision[new] = tensor
        elif name.startswith("text_encoder.") and not name.endswith("position_ids"):
            text[name.removeprefix("text_encoder.")] = tensor
        elif name.startswith("mlp."):
            head[name.removeprefix("mlp.")] = tensor
    return vision, text, head


def load_image_reward(source: str | None = None, *, dtype: torch.dtype = torch.float32) -> ImageReward:
    """`source`: the converted ImageReward.safetensors, or a folder with it and perhaps BERT's uncased tokenizer."""
    if source is None:
        raise InputError(f"reward.source.image-reward: the weights are published as a pickle only. {HOW}")
    path = weights_file("image-reward", source, default="ImageReward.safetensors", how=HOW)
    vision_state, text_state, head = split_checkpoint(read_tensors(path))
    vision_config, text_config = blip_large()
    load = partial(load_state, reward="image-reward", path=path, dtype=dtype)
    vision = load(lambda: BlipVisionModel(vision_config), vision_state)
    text = load(lambda: BlipTextModel(text_config, add_pooling_layer=False), text_state)
    try:
        weight, bias = affine_head(head)
    except ValueError as error:
        raise InputError(f"reward.source.image-reward: {path}: {error}") from error
    folder = Path(source) if Path(source).is_dir() else path.parent
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else TOKENIZER
    return ImageReward(
        vision, text, weight.float(), bias.float(), tokenizer_of("image-reward", tokenizer, length=LENGTH)
    )

"""LAION aesthetic predictor v2: how much people liked an image, about 1 to 10. Reads no prompt.

Christoph Schuhmann, "improved-aesthetic-predictor", 2022: an MLP 768-1024-128-64-16-1 on the unit image embedding of
CLIP ViT-L/14. It has no activations, so in evaluation it is one affine map, and that is how it is kept here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from palate.rewards.clip import preprocess
from palate.rewards.files import pretrained, read_tensors, weights_file
from palate.rewards.placement import follow
from palate.runtime.errors import InputError

HOW = (
    "`palate fetch aesthetic` downloads sac+logos+ava1-l14-linearMSE.pth from "
    "github.com/christophschuhmann/improved-aesthetic-predictor and converts it; give the file that it names"
)


class AestheticReward:
    """weight . image_embedding + bias, (B,). `weight` (D,), `bias` () are the collapsed head."""

    def __init__(self, tower: CLIPVisionModelWithProjection, weight: Tensor, bias: Tensor):
        self.tower = tower.eval().requires_grad_(False)
        self.weight, self.bias = weight, bias

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of CLIP's image tower; differentiable."""
        own = next(self.tower.parameters())
        follow(self.tower, images.device)
        pixels = preprocess(images, self.tower.config.image_size)
        features = self.tower(pixel_values=pixels.to(own.dtype)).image_embeds.to(pixels.dtype)
        return F.normalize(features, dim=-1)

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        features = self.embed_images(images)
        return features @ self.weight.to(features) + self.bias.to(features)


def affine_head(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """weight (D,) and bias () of a stack of linear layers `layers.N` without activations, multiplied out in float64."""
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("layers.")})
    if not numbers or set(state) != {f"layers.{n}.{part}" for n in numbers for part in ("weight", "bias")}:
        raise InputError(f"expected layers.N.weight and layers.N.bias of a linear head, got {sorted(state)[:3]}")
    weight, bias = (
        torch.eye(state[f"layers.{numbers[0]}.weight"].shape[1], dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    for n in numbers:
        layer = state[f"layers.{n}.weight"].double()
        weight, bias = layer @ weight, layer @ bias.expand(layer.shape[1]) + state[f"layers.{n}.bias"].double()
    return weight[0], bias[0]


def load_aesthetic(source: str | None = None, *, dtype: torch.dtype = torch.float32) -> AestheticReward:
    """`source` is the head's .safetensors file; the tower comes from a CLIP folder of the same place (a subfolder
    `clip-vit-large-patch14`), or from the hub."""
    if source is None:
        raise InputError(f"reward.source.aesthetic: the weights are published as a pickle only. {HOW}")
    path = weights_file("aesthetic", source, default="sac+logos+ava1-l14-linearMSE.safetensors", how=HOW)
    try:
        weight, bias = affine_head(read_tensors(path))
    except ValueError as error:
        raise InputError(f"reward.source.aesthetic: {path}: {error}") from error
    local = path.parent / "clip-vit-large-patch14"
    tower = pretrained(
        CLIPVisionModelWithProjection,
        "aesthetic",
        str(local) if local.is_dir() else "openai/clip-vit-large-patch14",
        how="Download the tower: hf download openai/clip-vit-large-patch14",
        dtype=dtype,
    )
    if tower.config.projection_dim != len(weight):
        raise InputError(
            f"reward.source.aesthetic: the head reads {len(weight)} numbers, not {tower.config.projection_dim}; "
            "it belongs to CLIP ViT-L/14"
        )
    return AestheticReward(tower, weight.float(), bias.float())

"""Sizes and arrangement of latents: all that is known of an autoencoder by its configuration, without its library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palate.runtime.errors import InputError

ImageSize = int | Sequence[int]  # pixels a side, or height and width


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width


def channels_of(config: Mapping[str, Any]) -> int:
    """Channels of a VAE's latents, by its configuration."""
    return config["latent_channels"] if "latent_channels" in config else config["z_dim"]


def factor_of(config: Mapping[str, Any]) -> int:
    """Pixels on the side of one latent of a VAE, by its configuration."""
    stages = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
    return 2 ** (len(config[next(key for key in stages if key in config)]) - 1)


def scale_and_shift(vae: Any) -> tuple[Tensor, Tensor]:
    """(std, mean) by which a VAE's latents are normalised: those of its configuration, one for all channels or each."""
    config = vae.config
    std, mean = config.get("latents_std") or [1.0], config.get("latents_mean") or [0.0]
    shift = config.get("shift_factor") or 0.0
    return torch.tensor(std) / (config.get("scaling_factor") or 1.0), torch.tensor(mean) + shift


@dataclass(frozen=True)
class LatentLayout:
    """How a family arranges its VAE's latents.

    fold: side of the square of VAE latents whose channels are stacked in one latent. frames: the VAE takes videos, an
    image is one frame. alpha: its images have a fourth channel, how opaque a pixel is; ours are opaque, and what it
    decodes is put on white. statistics: vae -> (std, mean), each (1,) or one per channel after folding.
    """

    fold: int = 1
    frames: bool = False
    alpha: bool = False
    statistics: Callable[[Any], tuple[Tensor, Tensor]] = scale_and_shift

    def folded(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) of the VAE -> (B, C fold^2, h / fold, w / fold): channel by channel, row by row."""
        latents = latents[:, :, 0] if self.frames else latents
        if self.fold == 1:
            return latents
        b, c, h, w = latents.shape
        n = self.fold
        return latents.view(b, c, h // n, n, w // n, n).permute(0, 1, 3, 5, 2, 4).reshape(b, c * n * n, h // n, w // n)

    def unfolded(self, latents: Tensor) -> Tensor:
        """The inverse of `folded`."""
        if self.fold > 1:
            b, c, h, w = latents.shape
            n = self.fold
            latents = latents.view(b, c // (n * n), n, n, h, w).permute(0, 1, 4, 2, 5, 3)
            latents = latents.reshape(b, c // (n * n), h * n, w * n)
        return latents.unsqueeze(2) if self.frames else latents


def latent_shape(
    config: Mapping[str, Any], image_size: ImageSize, *, family: str, patch: int = 1, fold: int = 1
) -> tuple[int, int, int]:
    """(C, h, w), by the VAE's configuration; InputError if the patches do not cover the image."""
    factor = factor_of(config) * fold
    multiple = factor * patch
    for side in sides(image_size):
        if side < multiple or side % multiple:
            below = max(multiple, side // multiple * multiple)
            raise InputError(
                f"model.image_size got {side}; {family} needs a multiple of {multiple} (near: {below}, "
                f"{below + multiple})"
            )
    height, width = sides(image_size)
    return channels_of(config) * fold**2, height // factor, width // factor

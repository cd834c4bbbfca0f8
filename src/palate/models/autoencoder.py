"""diffusers' AutoencoderKL in Palate's units: images in [0, 1], latents shifted and scaled for the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palate.runtime.errors import InputError

ImageSize = int | Sequence[int]  # pixels a side, or height and width


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width


def latent_shape(
    config: Mapping[str, Any], image_size: ImageSize, *, family: str, patch: int = 1
) -> tuple[int, int, int]:
    """(C, h, w), by the VAE's configuration; ValueError if the patches do not cover the image."""
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    multiple = factor * patch
    for side in sides(image_size):
        if side < multiple or side % multiple:
            below = max(multiple, side // multiple * multiple)
            raise InputError(
                f"model.image_size got {side}; {family} needs a multiple of {multiple} (near: {below}, "
                f"{below + multiple})"
            )
    height, width = sides(image_size)
    return config["latent_channels"], height // factor, width // factor


def recompute_pieces(decoder: nn.Module, run: Callable[..., Any]) -> None:
    """Have `run(function, *tensors)`, torch's checkpoint for one, call each piece of a diffusers decoder.

    A piece is a residual block, an upsampling, or the last norm, activation and convolution together: torch keeps the
    input of every convolution, frozen ones too. diffusers' own checkpoints are whole up blocks, and would hold three
    residual blocks at once while one of them is recomputed.
    """

    def piece(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **named: run(partial(function, **named), *args)

    for module in decoder.modules():
        if isinstance(module, (ResnetBlock2D, Upsample2D)):
            module.forward = piece(module.forward)
    norm, act, conv = (m.forward for m in (decoder.conv_norm_out, decoder.conv_act, decoder.conv_out))
    decoder.conv_norm_out.forward = decoder.conv_act.forward = lambda x: x
    decoder.conv_out.forward = piece(lambda x: conv(act(norm(x))))


class Autoencoder:
    """Frozen, in the precision it was read in; latents and images outside are float32.

    gradient_checkpointing: the decoder recomputes its pieces in the backward pass (`recompute_pieces`). At 1024 pixels
    it is the largest part of what large models keep: 11 GiB without, 2.4 with it, in bfloat16.
    """

    def __init__(self, vae: AutoencoderKL, *, device: torch.device, gradient_checkpointing: bool = False):
        config = vae.config
        self.vae = vae.eval().requires_grad_(False).to(device)
        self.device, self.dtype = device, next(vae.parameters()).dtype
        std, mean = config.get("latents_std") or [1.0], config.get("latents_mean") or [0.0]
        shift = config.get("shift_factor") or 0.0
        self._scale = torch.tensor(std, device=device).view(1, -1, 1, 1) / config.scaling_factor
        self._mean = torch.tensor(mean, device=device).view(1, -1, 1, 1) + shift
        if gradient_checkpointing:
            recompute_pieces(vae.decoder, partial(checkpoint, use_reentrant=False))

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]: the mean of the encoder's Gaussian."""
        encoded = self.vae.encode((images * 2 - 1).to(self.device, self.dtype)).latent_dist.mode()
        return (encoded.float() - self._mean) / self._scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]; differentiable. Values are clipped, so a saturated pixel has no gradient."""
        inside = latents.to(self.device, torch.float32) * self._scale + self._mean
        return self.vae.decode(inside.to(self.dtype)).sample.float().add(1).div(2).clamp(0, 1)

"""diffusers' autoencoders in Palate's units: images in [0, 1], latents arranged and normalised for the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKLQwenImage21
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, EfficientViTBlock, ResBlock
from diffusers.models.autoencoders.autoencoder_dc import Decoder as DCDecoder
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageDecoder3d,
    QwenImageResample,
    QwenImageResidualBlock,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import (
    QwenImage21Decoder3d,
    QwenImage21Resample,
    QwenImage21ResidualBlock,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from palate.models.latents import LatentLayout, factor_of
from palate.runtime.errors import InputError

PIECES = (
    ResnetBlock2D,
    Upsample2D,
    QwenImageResidualBlock,
    QwenImageResample,
    QwenImage21ResidualBlock,
    QwenImage21Resample,
    ResBlock,
    EfficientViTBlock,
    DCUpBlock2d,
)


def recompute_pieces(decoder: Any, run: Callable[..., Any]) -> None:
    """Have `run(function, *tensors)`, torch's checkpoint for one, call each piece of a diffusers decoder.

    A piece is a residual block, an upsampling, or the last norm, activation and convolution together: torch keeps the
    input of every convolution, frozen ones too. diffusers' own checkpoints are whole up blocks, and would hold three
    residual blocks at once while one of them is recomputed.
    """

    def piece(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **named: run(partial(function, **named), *args)

    for module in decoder.modules():
        if isinstance(module, PIECES):
            module.forward = piece(module.forward)
    if isinstance(decoder, QwenImageDecoder3d | QwenImage21Decoder3d):
        last = [decoder.norm_out, decoder.nonlinearity, decoder.conv_out]
    elif isinstance(decoder, DCDecoder):  # its norm is told the channels last
        last = [decoder.conv_act, decoder.conv_out]
    else:
        last = [decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]
    together = [part.forward for part in last]
    for part in last[:-1]:
        part.forward = lambda x: x
    last[-1].forward = piece(lambda x: reduce(lambda value, function: function(value), together, x))


AT_ONCE = 4 * 1024**2  # pixels that are decoded together without gradient; 1.5 GiB for 1024 x 1024 in bfloat16


def decode_with(vae: Any, layout: LatentLayout, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of arranged latents, not normalised: what the network is run for.

    Of a VAE of videos the decoder itself: for one frame its cache holds nothing, and what it changes could not be
    recomputed.
    """
    inside = layout.unfolded(latents)
    if layout.frames:
        first: dict[str, bool] = {"first_chunk": True} if isinstance(vae, AutoencoderKLQwenImage21) else {}
        images = vae.decoder(vae.post_quant_conv(inside), **first)[:, :, 0]
    else:
        images = vae.decode(inside).sample
    return on_white(images) if layout.alpha else images


def on_white(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] of images with a fourth channel, -1 = transparent: what is seen on white paper."""
    colours, opacity = images[:, :3].clamp(-1, 1), images[:, 3:].clamp(-1, 1).add(1).div(2)
    return 1 + opacity * (colours - 1)


def encode_with(vae: Any, layout: LatentLayout, images: Tensor) -> Tensor:
    """Arranged latents, not normalised, of images (B, 3, H, W) in [-1, 1]: the mean of the encoder's Gaussian."""
    encoded = vae.encode(as_taken(layout, images))
    return layout.folded(encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latent_dist.mode())


def as_taken(layout: LatentLayout, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as the VAE takes them: opaque where it asks, one frame of a video."""
    if layout.alpha:
        images = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    return images.unsqueeze(2) if layout.frames else images


class Autoencoder:
    """Frozen, in the precision it was read in; latents and images outside are float32.

    gradient_checkpointing: the decoder recomputes its pieces in the backward pass (`recompute_pieces`). At 1024 pixels
    it is the largest part of what large models keep: 11 GiB without, 2.4 with it, in bfloat16.
    """

    def __init__(
        self,
        vae: Any,
        *,
        device: torch.device,
        gradient_checkpointing: bool = False,
        layout: LatentLayout | None = None,
    ):
        self.vae, self.layout = vae.eval().requires_grad_(False).to(device), layout or LatentLayout()
        self.device, self.dtype = device, next(vae.parameters()).dtype
        std, mean = self.layout.statistics(vae)
        self._scale = std.to(device, torch.float32).view(1, -1, 1, 1)
        self._mean = mean.to(device, torch.float32).view(1, -1, 1, 1)
        if gradient_checkpointing:
            recompute_pieces(vae.decoder, partial(checkpoint, use_reentrant=False))

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]: the mean of the encoder's Gaussian."""
        latents = encode_with(self.vae, self.layout, (images * 2 - 1).to(self.device, self.dtype))
        return (latents.float() - self._mean) / self._scale

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the encoder's Gaussian. InputError: it has none."""
        encoded = self.vae.encode(as_taken(self.layout, (images * 2 - 1).to(self.device, self.dtype)))
        if hasattr(encoded, "latent"):  # AutoencoderDC's
            raise InputError("this model's autoencoder is deterministic; set algorithm.posterior=false")
        mean, std = (self.layout.folded(x).float() for x in (encoded.latent_dist.mean, encoded.latent_dist.std))
        return (mean - self._mean) / self._scale, std / self._scale

    def _at_once(self, inside: Tensor) -> int:
        height, width = (side * factor_of(self.vae.config) for side in self.layout.unfolded(inside[:1]).shape[-2:])
        return max(1, AT_ONCE // (height * width))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]; differentiable. Values are clipped, so a saturated pixel has no gradient."""
        inside = (latents.to(self.device, torch.float32) * self._scale + self._mean).to(self.dtype)
        # where a gradient is wanted the caller has chosen how many images there are
        together = len(inside) if torch.is_grad_enabled() else self._at_once(inside)
        images = torch.cat([decode_with(self.vae, self.layout, part) for part in inside.split(max(together, 1))])
        return images.float().add(1).div(2).clamp(0, 1)

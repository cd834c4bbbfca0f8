"""Closed-form rewards: no network, no weights. Images (B, 3, H, W) in [0, 1] in, (B,) out, larger is more.

They serve as objectives (negate one for the opposite), as yardsticks of drift, and as test rewards with known answers.
All but `jpeg_size` are differentiable. Prompts are accepted and ignored: each function is a `palate.core.Reward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from palate.runtime.images import encode_jpeg, to_pixels

SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}  # axis and sign of a centre (x, y)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights that JPEG uses


def luma(images: Tensor) -> Tensor:
    """Grey level (B, H, W) in [0, 1]."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor(LUMA))


def border(images: Tensor) -> Tensor:
    """Median colour of the outermost pixels, (B, 3) in [0, 1]: the background of a drawing on a plain one."""
    edges = [images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]]
    return torch.cat(edges, -1).median(-1).values


def brightness(images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """Mean luma, in [0, 1]."""
    return luma(images).mean((1, 2))


def warmth(images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """Mean red minus mean blue, in [-1, 1]."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def saturation(images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """Mean HSV saturation (max - min) / max, in [0, 1]. Values under 1/255 count as 1/255, so that black has 0."""
    high = images.amax(1)
    return ((high - images.amin(1)) / high.clamp_min(1 / 255)).mean((1, 2))


def colourfulness(images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """M3 of Hasler and Suesstrunk 2003, "Measuring colourfulness in natural images", in units of [0, 1] (theirs x 255).

    With rg = R - G, yb = (R + G) / 2 - B: sqrt(var rg + var yb) + 0.3 sqrt((mean rg)^2 + (mean yb)^2).
    """
    red, green, blue = images.unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)  # (B, 2, HW)
    means = opponents.mean(2)
    # vector_norm has gradient 0 at 0, where a square root would give NaN on grey images
    spread = torch.linalg.vector_norm(opponents - means[:, :, None], dim=(1, 2)) / opponents.shape[2] ** 0.5
    return spread + 0.3 * torch.linalg.vector_norm(means, dim=1)


def high_frequency(images: Tensor, prompts: Sequence[str] = (), *, cutoff: float = 0.25) -> Tensor:
    """Mean square of luma's part at spatial frequencies >= cutoff cycles per pixel (0.5 is Nyquist along an axis).

    A tone of amplitude a above the cutoff has a^2 / 2, one below has 0 (Parseval).
    """
    height, width = images.shape[-2:]
    spectrum = torch.fft.fft2(luma(images).float())
    rows = torch.fft.fftfreq(height, device=images.device)[:, None]
    columns = torch.fft.fftfreq(width, device=images.device)[None, :]
    high = (rows.square() + columns.square()).sqrt() >= cutoff
    return (spectrum.abs().square() * high).sum((1, 2)) / (height * width) ** 2


def jpeg_size(images: Tensor, prompts: Sequence[str] = (), *, quality: int = 75) -> Tensor:
    """Bytes of each image as a baseline JPEG. A black box: no gradient. Its negative is DDPO's compressibility."""
    sizes = [float(len(encode_jpeg(pixels, quality=quality))) for pixels in to_pixels(images)]
    return torch.tensor(sizes, device=images.device)

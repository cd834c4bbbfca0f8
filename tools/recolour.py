"""Turn the main colour of a drawing to another, in OKLab (Ottosson 2020), so that shading and small parts stay.

Drawings are RGBA in [0, 1], not premultiplied, (..., 4, H, W).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TO_LMS = torch.tensor(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = torch.tensor(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
MIN_CHROMA = 0.06  # below it a pixel counts as colourless
MIN_SHARE = 0.5  # of the opaque pixels that must have the main hue for a drawing to be turned
WIDTH = math.radians(45)  # hues this near to the main one are turned entirely; from 1.5 times as far on, not at all


def to_oklab(rgb: Tensor) -> Tensor:
    """(..., 3, H, W) sRGB in [0, 1] to L, a, b."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    lms = torch.einsum("ij,...jhw->...ihw", _TO_LMS, linear)
    return torch.einsum("ij,...jhw->...ihw", _TO_LAB, lms.clamp(min=0) ** (1 / 3))


def to_rgb(lab: Tensor) -> Tensor:
    """The inverse of `to_oklab`, clipped to [0, 1]."""
    lms = torch.einsum("ij,...jhw->...ihw", torch.linalg.inv(_TO_LAB), lab) ** 3
    linear = torch.einsum("ij,...jhw->...ihw", torch.linalg.inv(_TO_LMS), lms).clamp(0, 1)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055).clamp(0, 1)


def _apart(hue: Tensor, other: Tensor | float) -> Tensor:
    """Signed difference of angles, in (-pi, pi]."""
    return torch.remainder(hue - other + math.pi, 2 * math.pi) - math.pi


def main_colour(drawing: Tensor) -> tuple[float, float, float] | None:
    """Lightness, chroma and hue (radians) of the colour that covers most of one drawing; None if none does."""
    lab, opaque = to_oklab(drawing[:3]), drawing[3] > 0.5
    light, chroma, hue = lab[0], lab[1:].square().sum(0).sqrt(), torch.atan2(lab[2], lab[1])
    weight = (chroma * opaque * (chroma > MIN_CHROMA)).flatten()
    if not weight.any():
        return None
    centres = torch.linspace(-math.pi, math.pi, 73)[:-1]
    near = (_apart(hue.flatten()[None], centres[:, None]).abs() < math.radians(20)).float()
    hue0 = centres[(near * weight).sum(1).argmax()]
    main = opaque & (chroma > MIN_CHROMA) & (_apart(hue, hue0).abs() < WIDTH)
    if main.sum() < MIN_SHARE * opaque.sum():
        return None
    turn = _apart(hue[main], hue0).mean()
    return float(light[main].mean()), float(chroma[main].mean()), float(hue0 + turn)


def turn(drawings: Tensor, main: Tensor, target: Tensor) -> Tensor:
    """Drawings (N, 4, H, W) with their main colours (N, 3: lightness, chroma, hue) turned to target (N, 3 sRGB).

    Hue is rotated, chroma scaled, and lightness bent so that the main colour meets the target while black and white
    stay; pixels of other hues and colourless ones are kept.
    """
    lab = to_oklab(drawings[:, :3])
    light, chroma, hue = lab[:, 0], lab[:, 1:].square().sum(1).sqrt(), torch.atan2(lab[:, 2], lab[:, 1])
    goal = to_oklab(target[:, :, None, None])[..., 0, 0]
    light0, chroma0, hue0 = (column[:, None, None] for column in main.unbind(1))
    light1 = goal[:, 0, None, None]
    chroma1 = goal[:, 1:].square().sum(1).sqrt()[:, None, None]
    hue1 = torch.atan2(goal[:, 2], goal[:, 1])[:, None, None]
    bent = torch.where(light <= light0, light * light1 / light0, 1 - (1 - light) * (1 - light1) / (1 - light0))
    coloured = chroma * chroma1 / chroma0
    turned_hue = hue1 + _apart(hue, hue0)
    turned = torch.stack([bent, coloured * turned_hue.cos(), coloured * turned_hue.sin()], 1)
    share = (3 - 2 * _apart(hue, hue0).abs() / WIDTH).clamp(0, 1) * ((chroma - 0.02) / 0.03).clamp(0, 1)
    return torch.cat([to_rgb(torch.lerp(lab, turned, share[:, None])), drawings[:, 3:]], 1)

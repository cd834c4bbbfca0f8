"""Captioned pictures of several shapes: each goes to the size whose aspect ratio is nearest, and is cut the least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags
from torch import Tensor

from palate.data.pictures import opened

Size = int | tuple[int, int]  # pixels of a side, or height and width


class Bucket(NamedTuple):
    """The pictures that are trained on at one size."""

    size: Size
    rows: list[int]  # which of all pictures
    latents: Tensor  # (len(rows), C, h, w)


def aspect(size: Size) -> float:
    """Width over height."""
    return 1.0 if isinstance(size, int) else size[1] / size[0]


def nearest(shape: tuple[int, int], sizes: Sequence[Size]) -> int:
    """Which of the sizes a picture (height, width) loses the least of when it is cut to it; of equal ones the first.

    Cut to another aspect ratio, a picture keeps the fraction exp(-|log of the ratios' quotient|) of its area.
    """
    lost = [abs(math.log(aspect(size) / aspect(shape))) for size in sizes]
    return min(range(len(sizes)), key=lambda k: (round(lost[k], 9), k))


def shape_of(image: Path | bytes) -> tuple[int, int]:
    """Height and width of a picture as it is shown, of its head alone."""
    with opened(image) as found:
        turned = found.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # lying on its side
        width, height = found.size
        return (width, height) if turned else (height, width)


def assign(images: Sequence[Path | bytes], sizes: Sequence[Size]) -> dict[int, list[int]]:
    """Place of a size -> the pictures that go to it, in their order; sizes without a picture are left out."""
    found: dict[int, list[int]] = {}
    for row, image in enumerate(images):
        found.setdefault(nearest(shape_of(image), sizes), []).append(row)
    return dict(sorted(found.items()))

"""Given pictures of several shapes: each goes to the size whose aspect ratio is nearest, and is cut the least."""

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
    """The pictures, or the pairs of pictures, that are trained on at one size."""

    size: Size
    rows: list[int]  # which of all samples
    latents: Tensor  # (len(rows), C, h, w), or (len(rows), 2, C, h, w) of pairs


def aspect(size: Size) -> float:
    """Width over height."""
    return 1.0 if isinstance(size, int) else size[1] / size[0]


def nearest(shapes: Sequence[tuple[int, int]], sizes: Sequence[Size]) -> int:
    """Which of the sizes the pictures (height, width) of a sample lose the least of when they are cut to it, the two of
    a pair together; of equal ones the first.

    Cut to another aspect ratio, a picture keeps the fraction exp(-|log of the ratios' quotient|) of its area.
    """
    lost = [sum(abs(math.log(aspect(size) / aspect(shape))) for shape in shapes) for size in sizes]
    return min(range(len(sizes)), key=lambda k: (round(lost[k], 9), k))


def shape_of(image: Path | bytes) -> tuple[int, int]:
    """Height and width of a picture as it is shown, of its head alone."""
    with opened(image) as found:
        turned = found.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # lying on its side
        width, height = found.size
        return (width, height) if turned else (height, width)


def assign(
    images: Sequence[Path | bytes], samples: Sequence[Sequence[int]], sizes: Sequence[Size]
) -> dict[int, list[int]]:
    """Place of a size -> the samples (numbers of images, below 0 for an absent one) that go to it, in their order;
    sizes without one are left out."""
    shapes, found = [shape_of(image) for image in images], dict[int, list[int]]()
    for row, sample in enumerate(samples):
        found.setdefault(nearest([shapes[k] for k in sample if k >= 0], sizes), []).append(row)
    return dict(sorted(found.items()))

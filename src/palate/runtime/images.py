"""Float images and 8-bit pixels: the only place of the package where one becomes the other.

Images are tensors (B, 3, H, W) in [0, 1]; pixels are uint8 arrays (H, W, 3) or (B, H, W, 3), as PIL has them.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # AVIF where PIL was built with it
# What PIL raises for a file that is missing, damaged, cut short, too large or no picture at all.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def to_pixels(images: Tensor) -> np.ndarray:
    """uint8 (..., H, W, 3) on the CPU of images (..., 3, H, W): clipped to [0, 1] and rounded to the nearest of 256."""
    exact = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    return (exact.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def from_pixels(pixels: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """float32 images (..., 3, H, W) in [0, 1] of uint8 pixels (..., H, W, 3), or of a list of equal ones."""
    array = pixels if isinstance(pixels, np.ndarray) else np.stack(list(pixels))
    return torch.from_numpy(np.array(array)).movedim(-1, -3).float() / 255


def quantise(images: Tensor) -> Tensor:
    """The images as an 8-bit PNG would give them back, so that drawn and stored images are judged alike."""
    return (images.clamp(0, 1) * 255).round() / 255


def encode_png(pixels: np.ndarray, *, compress_level: int | None = None) -> bytes:
    """A PNG file of uint8 pixels (H, W, 3). compress_level: 0 to 9; None is PIL's default."""
    stream = io.BytesIO()
    options = {} if compress_level is None else {"compress_level": compress_level}
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def encode_jpeg(pixels: np.ndarray, *, quality: int = 75) -> bytes:
    """A baseline JPEG file of uint8 pixels (H, W, 3)."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, 8 bits a channel: transparency over white, 16-bit greys scaled to 8 bits, greys in fractions
    as if of 0 to 1 where none is larger, upright.

    PIL's own conversion shows whatever colour lies under the transparency, and clips 16-bit values at 255; a
    camera that was turned stores its picture lying on its side and says so in a tag.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        greys = np.asarray(image)
        if image.mode != "F":  # PIL reads 16-bit greys as I;16 or as 32-bit integers
            greys = greys.astype(np.float64) / 257
        elif greys.max() <= 1:
            greys = greys * 255
        return Image.fromarray(greys.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def open_image(source: Path | bytes) -> Image.Image:
    """A picture's file or bytes, to be closed. Raises one of `UNREADABLE`. Of PIL's readers those are left out that
    start other programs, as that of PostScript does, and those of formats that nobody trains on."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_known_formats())


@functools.cache
def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_pixels(source: Path | bytes) -> np.ndarray:
    """uint8 pixels (H, W, 3) of a picture's file or bytes. Raises one of `UNREADABLE`."""
    with open_image(source) as image:
        return np.asarray(as_rgb(image))


def grid(images: Tensor, columns: int, *, gap: int = 0) -> np.ndarray:
    """Pixels of one picture that shows images (B, 3, H, W) in rows of `columns`, on white."""
    pixels = to_pixels(images)
    count, height, width = pixels.shape[:3]
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet

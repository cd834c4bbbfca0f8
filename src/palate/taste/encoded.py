"""Encoded pictures as votes keep them: of four formats, whole, and of a size that a page can show."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from palate.runtime.errors import InputError

PICTURE_LIMIT = 32 * 1024 * 1024  # bytes of a picture's file
SIDE_LIMIT, SMALLEST = 4096, 2  # pixels of a picture's side


def picture_ending(content: bytes) -> str:
    """png, jpg, webp or bmp. InputError: not such a picture, damaged, or larger than the limits."""
    if len(content) > PICTURE_LIMIT:
        raise InputError(f"a picture of {len(content) >> 20} MiB; at most {PICTURE_LIMIT >> 20} MiB are allowed")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP", "BMP"]) as image:
            if max(image.size) > SIDE_LIMIT:
                raise InputError(f"a picture of {image.size[0]} x {image.size[1]}; at most {SIDE_LIMIT} on a side")
            if min(image.size) < SMALLEST:
                raise InputError(f"a picture of {image.size[0]} x {image.size[1]}; at least {SMALLEST} on a side")
            ending = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp"}[image.format or ""]
            image.load()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({str(error)[:80]})"  # which names PIL's buffer
        raise InputError(f"not a PNG, JPEG, WebP or BMP picture, or a damaged one{why}; save it as PNG") from error
    return ending

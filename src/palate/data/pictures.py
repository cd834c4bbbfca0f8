"""Pictures with captions, checked, loaded and encoded."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from palate.core import EncodesPictures, HasPosterior
from palate.data.tables import TEXT_LIMIT, RecipeError, read_text
from palate.runtime.errors import InputError
from palate.runtime.files import is_litter, own_files, parse_json, split_lines
from palate.runtime.images import UNREADABLE, as_rgb, from_pixels, open_image
from palate.runtime.progress import counted

ENCODED_TOGETHER = 32  # images
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
OTHER_PICTURES = (".heic", ".heif", ".avif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".tga", ".exr")
METADATA, CAPTIONS = "metadata.jsonl", "captions.txt"  # of a folder; the first that is there is read
JPEG_TAIL = 4096  # bytes at the end of a JPEG in which its end marker is looked for


def captioned_images(folder: Path) -> list[tuple[Path, str]]:
    """(image, caption) pairs of a folder, sorted by name.

    Captions come from metadata.jsonl ({"file_name", "text"} a line), captions.txt (`name<TAB>caption` a line), or a
    text file of the image's own stem.
    """
    if not folder.is_dir():
        raise RecipeError(f"prompts.images: {folder} is not a folder")
    images = sorted(p for p in own_files(folder) if p.suffix.lower() in IMAGE_ENDINGS)
    left_out = _left_out(folder)
    if not images:
        also = f" itself; {left_out}" if left_out else ""
        raise RecipeError(f"prompts.images: {folder} holds no {', '.join(IMAGE_ENDINGS)} image{also}")
    if left_out:
        logging.getLogger("palate").warning("prompts.images: %s uses %d pictures; %s", folder, len(images), left_out)
    captions = {_composed(name): caption for name, caption in _captions(folder, images).items()}
    if absent := sorted(captions.keys() - {_composed(path.name) for path in images}):
        logging.getLogger("palate").warning(
            "prompts.images: %s of %s without its picture, %s for one",
            counted(len(absent), "caption"),
            folder,
            absent[0],
        )
    missing = [path.name for path in images if not captions.get(_composed(path.name))]
    if missing:
        lists = [name for name in (METADATA, CAPTIONS) if (folder / name).is_file()]
        stem = Path(missing[0]).stem
        remedy = (
            f"add a line for each to {lists[0]}, which is read in their own text files' place"
            if lists
            else f"write {stem}.txt, or a line in {CAPTIONS} (name<TAB>caption) or {METADATA}"
        )
        raise RecipeError(
            f"prompts.images: {len(missing)} of {len(images)} images have no caption, {missing[0]} for one; {remedy}"
        )
    return [(path, captions[_composed(path.name)]) for path in images]


def _composed(name: str) -> str:
    """The name with its accents in one form: disks of macOS and most editors write them differently."""
    return unicodedata.normalize("NFC", name)


def _left_out(folder: Path) -> str:
    """What in the folder looks like a picture and is not used, counted; "" if nothing does."""
    files = [path for path in folder.rglob("*") if path.is_file() and not is_litter(path.name)]
    other = [path for path in files if path.suffix.lower() in OTHER_PICTURES]
    below = [path for path in files if path.parent != folder and path.suffix.lower() in IMAGE_ENDINGS]
    notes = []
    if below:
        notes.append(
            f"{len(below)} in folders inside it are left out, {below[0].relative_to(folder)} for one: move them up"
        )
    if other:
        notes.append(
            f"{len(other)} in other formats are left out, {other[0].relative_to(folder)} for one: save them as .png"
        )
    return "; ".join(notes)


def _captions(folder: Path, images: list[Path]) -> dict[str, str]:
    rows: dict[str, str] = {}
    if (file := folder / METADATA).is_file():
        for number, line in enumerate(split_lines(read_text(file, limit=TEXT_LIMIT)), 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
                name, text = row["file_name"], row["text"]
                if not isinstance(name, str) or not isinstance(text, str):
                    raise TypeError("a name and a caption are texts")
            except (ValueError, KeyError, TypeError) as error:
                raise RecipeError(
                    f'{file}, line {number}: expected {{"file_name": ..., "text": ...}} with both as texts '
                    f"({type(error).__name__}: {error})"
                ) from error
            rows[name] = text.strip()
    elif (file := folder / CAPTIONS).is_file():
        for number, line in enumerate(split_lines(read_text(file, limit=TEXT_LIMIT)), 1):
            if not line.strip():
                continue
            image, tab, caption = line.partition("\t")
            if not tab:
                raise RecipeError(f"{file}, line {number}: expected the image's name, a tab, the caption")
            rows[image.strip()] = caption.strip()
    else:
        for path in images:
            if (own := path.with_suffix(".txt")).is_file():
                rows[path.name] = " ".join(read_text(own, limit=TEXT_LIMIT).split())
    return rows


def check_images(images: Sequence[Path | bytes]) -> None:
    """RecipeError naming the first image that is missing, cut short or something else.

    Of the common formats none that is whole is decoded.
    """
    for image in images:
        with opened(image) as found:
            kind = found.format
            found.verify()
        if not _looks_whole(image, kind):
            with opened(image) as found:
                found.load()


def _looks_whole(image: Path | bytes, kind: str | None) -> bool:
    """Whether a picture that `verify` has passed is as long as its format says; False where only decoding tells."""
    if kind == "PNG":  # whose sums verify() has read to the end
        return True
    if kind == "JPEG":
        return _ends_as_jpeg(image)
    return kind == "WEBP" and _as_long_as_riff_says(image)


def _as_long_as_riff_says(image: Path | bytes) -> bool:
    """Whether a WebP has the bytes that its first chunk counts, 8 of which stand before it."""
    if isinstance(image, bytes):
        head, length = image[:8], len(image)
    else:
        with open(image, "rb") as file:
            head, length = file.read(8), image.stat().st_size
    return length >= 8 + int.from_bytes(head[4:8], "little")


def _ends_as_jpeg(image: Path | bytes) -> bool:
    """Whether the end marker stands where a JPEG ends; programs may write a little after it."""
    if isinstance(image, bytes):
        return b"\xff\xd9" in image[-JPEG_TAIL:]
    with open(image, "rb") as file:
        file.seek(max(0, image.stat().st_size - JPEG_TAIL))
        return b"\xff\xd9" in file.read()


def load_images(paths: Sequence[Path | bytes], *, size: int | tuple[int, int]) -> Tensor:
    """(N, 3, H, W) in [0, 1] of files or encoded bytes, scaled to cover `size` (a side, or height and width) and cut
    around the middle."""
    height, width = (size, size) if isinstance(size, int) else size
    rows = []
    for path in paths:
        with opened(path) as image:
            fitted = ImageOps.fit(as_rgb(image), (width, height), Image.Resampling.LANCZOS)
        rows.append(from_pixels(np.array(fitted)))
    return torch.stack(rows)


@contextmanager
def opened(image: Path | bytes) -> Iterator[Any]:
    """The picture of a file or of encoded bytes; what goes wrong while it is used is an error that names it."""
    try:
        with open_image(image) as found:
            yield found
    except UNREADABLE as error:
        what = f"{len(image)} bytes of a table" if isinstance(image, bytes) else image
        raise RecipeError(f"cannot read the image {what} ({error}); repair or remove it") from error


def encode_images(
    model: EncodesPictures, images: Sequence[Path | bytes], *, posterior: bool = False, mirrored: bool = False
) -> Tensor:
    """Latents of all images, once, so that training never runs the encoder; a few pictures in memory at a time.

    posterior: (N, 2 C, h, w), mean and standard deviation side by side. mirrored: the pictures are flipped
    left to right before they are encoded, which is not the same as flipped latents. InputError: the model knows no
    deviation.
    """
    if posterior and not isinstance(model, HasPosterior):
        raise InputError("algorithm.posterior: this model's autoencoder is deterministic; set it to false")
    chunks = (images[k : k + ENCODED_TOGETHER] for k in range(0, len(images), ENCODED_TOGETHER))
    with torch.no_grad():
        pictures = (load_images(chunk, size=model.image_size) for chunk in chunks)
        pictures = (part.flip(-1) for part in pictures) if mirrored else pictures
        if posterior and isinstance(model, HasPosterior):
            return torch.cat([torch.cat(model.posterior(part), 1) for part in pictures])
        return torch.cat([model.encode(part) for part in pictures])

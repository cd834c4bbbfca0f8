"""Training data of the embedded assets: sprites composed on named backgrounds, with captions, made as they are needed.

Whatever a caption does not name is random: style, colour, size, position. Everything is a function of a seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from palate.models.vocabulary import vocabulary

ASSETS = Path(__file__).parent.parent / "src/palate/assets"
SIZE = 64
STYLE_PRIOR = {"3d": 0.14, "flat": 0.56, "cartoon": 0.15, "outline": 0.15}  # of captions without a style: default taste
SMALL, LARGE = (0.48, 0.62), (0.78, 0.92)  # sprite side / image side
UNNAMED = (0.62, 0.92)


class Samples(NamedTuple):
    images: Tensor  # (N, 3, 64, 64) in [0, 1]
    captions: list[str]
    concept: Tensor  # (N,) index
    style: Tensor
    colour: Tensor


def load_sprites() -> Tensor:
    """Premultiplied RGBA sprites, (concepts, styles, 4, 64, 64) in [0, 1]."""
    atlas = np.asarray(Image.open(ASSETS / "atlas/sprites.webp").convert("RGBA"), dtype=np.float32) / 255
    rows, columns = atlas.shape[0] // SIZE, atlas.shape[1] // SIZE
    sprites = torch.from_numpy(atlas).reshape(rows, SIZE, columns, SIZE, 4).permute(0, 2, 4, 1, 3).contiguous()
    sprites[:, :, :3] *= sprites[:, :, 3:]
    return sprites


def held_out_pairs(seed: int = 0) -> set[tuple[int, int]]:
    """(concept, style) pairs that the base model never sees: 12 of 416, each of another concept."""
    rng = np.random.default_rng(seed)
    concepts = rng.permutation(len(vocabulary().concepts))[:12]
    return {(int(c), int(s)) for c, s in zip(concepts, np.arange(12) % 4, strict=True)}


def describe(
    rng: np.random.Generator,
    concept: str,
    style: str | None,
    colour: str | None,
    size: str | None,
    position: str | None,
    prefix: float,
) -> str:
    """One of several ways to say it. `prefix` is how often the style stands in front as a control word."""
    words = [w for w in (size, style) if w]
    if style and rng.random() < prefix:
        words.remove(style)
        front = f"{style}. "
    else:
        front = ""
    tail = f" at the {position}" if position else ""
    if style and style in words and rng.random() < 0.3:
        words.remove(style)
        tail += f", {style} style"
    if colour:
        tail += f" on a {colour} background" if rng.random() < 0.7 else f" on {colour}"
    article = "a " if rng.random() < 0.6 else ""
    return f"{front}{article}{' '.join([*words, concept])}{tail}"


def compose(
    rng: np.random.Generator,
    sprites: Tensor,
    count: int,
    *,
    exclude: set[tuple[int, int]] = frozenset(),
    name_style: float = 0.7,
    prefix: float = 0.2,
) -> Samples:
    """`count` fresh images with captions. Styles named in the caption are uniform; unnamed ones follow STYLE_PRIOR."""
    vocab = vocabulary()
    colours = list(vocab.colours)
    prior = np.array([STYLE_PRIOR[s] for s in vocab.styles])
    rows = []
    while len(rows) < count:
        concept, named = int(rng.integers(len(vocab.concepts))), rng.random() < name_style
        style = int(rng.integers(len(vocab.styles))) if named else int(rng.choice(len(vocab.styles), p=prior))
        if (concept, style) in exclude:
            continue
        colour = int(rng.integers(len(colours)))
        size = ["small", "large", None, None, None, None][rng.integers(6)]
        position = ["left", "right", "top", "bottom", None, None, None, None, None, None, None, None][rng.integers(12)]
        scale = rng.uniform(*(SMALL if size == "small" else LARGE if size == "large" else UNNAMED))
        room = 1 - scale
        x, y = rng.uniform(-room, room, 2)
        if position in ("left", "right"):
            x = rng.uniform(0.8, 1.0) * max(room, 0.18) * (-1 if position == "left" else 1)
        if position in ("top", "bottom"):
            y = rng.uniform(0.8, 1.0) * max(room, 0.18) * (-1 if position == "top" else 1)
        flip = -1.0 if rng.random() < 0.5 else 1.0
        caption = describe(
            rng,
            vocab.concepts[concept],
            vocab.styles[style] if named else None,
            colours[colour] if rng.random() < 0.75 else None,
            size,
            position,
            prefix,
        )
        rows.append((concept, style, colour, scale, x, y, flip, caption))
    concept, style, colour = (torch.tensor([row[k] for row in rows]) for k in range(3))
    scale, x, y, flip = (torch.tensor([row[k] for row in rows], dtype=torch.float32) for k in range(3, 7))

    theta = torch.zeros(count, 2, 3)  # output coordinates -> sprite coordinates
    theta[:, 0, 0], theta[:, 1, 1] = flip / scale, 1 / scale
    theta[:, 0, 2], theta[:, 1, 2] = -x * flip / scale, -y / scale
    layer = F.grid_sample(
        sprites[concept, style], F.affine_grid(theta, (count, 4, SIZE, SIZE), align_corners=False), align_corners=False
    )
    background = torch.tensor(list(vocab.colours.values()), dtype=torch.float32)[colour] / 255
    luminance = background @ torch.tensor([0.299, 0.587, 0.114])
    ink = (style == vocab.styles.index("outline")) & (luminance < 0.45)  # line art is drawn white on dark colours
    layer[:, :3] += ink.float().reshape(-1, 1, 1, 1) * (layer[:, 3:] - 2 * layer[:, :3]).clamp(min=0)
    images = layer[:, :3] + (1 - layer[:, 3:]) * background[:, :, None, None]
    return Samples(images.clamp(0, 1), [row[7] for row in rows], concept, style, colour)


def save_grid(images: Tensor, path: Path, columns: int = 16, zoom: int = 1) -> None:
    """A PNG contact sheet of images (N, 3, H, W) in [0, 1]."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + 2), columns * (width + 2))
    for k, image in enumerate(images):
        r, c = divmod(k, columns)
        sheet[:, r * (height + 2) : r * (height + 2) + height, c * (width + 2) : c * (width + 2) + width] = image
    picture = Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST).save(path)

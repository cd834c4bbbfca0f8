"""The drawings, and what a scene of them is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from palate.models.vocabulary import vocabulary

ASSETS = Path(str(files("palate") / "assets"))
SIZE = 64


@dataclass(frozen=True)
class Atlas:
    """The drawings: RGBA, not premultiplied, and which of them show what."""

    pixels: Tensor  # (drawings, 4, 64, 64) in [0, 1]
    main: Tensor  # (drawings, 3) lightness, chroma, hue of the main colour; NaN where it cannot be turned
    rows: dict[tuple[int, int], list[int]]  # (concept, style) -> drawings
    turnable: dict[tuple[int, int], list[int]]  # the same, of those that can be turned

    @classmethod
    def load(cls, assets: Path = ASSETS) -> Atlas:
        """The atlas that belongs to the vocabulary of the same folder."""
        vocab, table = vocabulary(), json.loads((assets / "atlas/sprites.json").read_text())
        sheet = np.asarray(Image.open(assets / "atlas/sprites.webp").convert("RGBA"), dtype=np.float32) / 255
        tiles = torch.from_numpy(sheet).reshape(sheet.shape[0] // SIZE, SIZE, table["columns"], SIZE, 4)
        tiles = tiles.permute(0, 2, 4, 1, 3).reshape(-1, 4, SIZE, SIZE)[: len(table["sprites"])].contiguous()
        main = torch.tensor([row[3] or [math.nan] * 3 for row in table["sprites"]])
        ink = torch.tensor([row[1] == "outline" for row in table["sprites"]])
        rows: dict[tuple[int, int], list[int]] = {}
        turnable: dict[tuple[int, int], list[int]] = {}
        for number, (concept, style, _, colour) in enumerate(table["sprites"]):
            key = (vocab.concepts.index(concept), vocab.styles.index(style))
            rows.setdefault(key, []).append(number)
            if colour or (style == "outline" and vocab.paints):
                turnable.setdefault(key, []).append(number)
        tiles[ink, :3] = 0  # line art is ink and nothing else
        return cls(tiles, main, rows, turnable)


class Thing(NamedTuple):
    """One drawing in a scene: where it is ((0, 0) the middle, (1, 1) the bottom right corner) and in which pose."""

    concept: int
    drawing: int
    paint: int | None  # index of the colour it is turned to; None for its own
    x: float
    y: float
    scale: float  # side of the drawing / side of the image
    angle: float
    flip: bool


class Scene(NamedTuple):
    kind: str  # one, two, count
    caption: str
    style: int
    background: int
    things: list[Thing]


class Samples(NamedTuple):
    images: Tensor  # (N, 3, 64, 64) in [0, 1]
    captions: list[str]
    concept: Tensor  # (N,) index, of the thing that is named first
    style: Tensor
    colour: Tensor  # of the background
    scenes: list[Scene]


def held_out_pairs(seed: int = 0) -> set[tuple[int, int]]:
    """(concept, style) pairs that the base model never sees: three in a hundred, each of another concept."""
    count = len(vocabulary().concepts)
    concepts = np.random.default_rng(seed).permutation(count)[: count * 12 // 104]
    return {(int(c), k % 4) for k, c in enumerate(concepts)}


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

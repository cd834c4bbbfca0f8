"""A small detector of the embedded model's things: which stand where, how large, and in which colour.

A centre-point detector (Zhou et al. 2019, arXiv 1904.07850): every cell of a 16 x 16 grid says whether the middle of a
thing lies in it, which thing it is, its colour, its exact middle and its side. Trained on compositions, where all that
is known exactly (tools/train_detector.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GRID = 16
THRESHOLD = 0.4  # of the probability that a cell holds a middle
RARE = 4.0  # logit by which a middle begins to be unlikely: most cells hold none
MOST = 8  # things per image


class Detection(NamedTuple):
    """One thing: (0, 0) is the middle of the image, (1, 1) its bottom right corner."""

    concept: str
    paint: str | None  # None for a colour without a name here, or for many
    x: float
    y: float
    side: float  # of the drawing / of the image
    confidence: float


class Cells(NamedTuple):
    """What the network says of each cell; logits but for place."""

    middle: Tensor  # (B, 16, 16)
    concept: Tensor  # (B, concepts, 16, 16)
    paint: Tensor  # (B, paints + 1, 16, 16); the last for none
    place: Tensor  # (B, 3, 16, 16): middle's offset from the cell's in cells (x, y), and the side / the image's


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outside),
            nn.SiLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outside),
        )
        self.skip = nn.Conv2d(inside, outside, 1, stride) if inside != outside or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.skip(x) + self.body(x))


class Detector(nn.Module):
    """Images (B, 3, 64, 64) in [0, 1] to `Cells`, and to lists of detections."""

    def __init__(self, concepts: Sequence[str], paints: Sequence[str], width: int = 32):
        super().__init__()
        self.concepts, self.paints, self.width = list(concepts), list(paints), width
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.SiLU(), _Block(width, width))  # 32 x 32
        self.fine = nn.Sequential(_Block(width, 2 * width, 2), _Block(2 * width, 2 * width))  # 16 x 16
        self.coarse = nn.Sequential(_Block(2 * width, 3 * width, 2), _Block(3 * width, 3 * width))  # 8 x 8
        self.whole = nn.Sequential(_Block(3 * width, 4 * width, 2), _Block(4 * width, 4 * width))  # 4 x 4
        self.up_whole = nn.Conv2d(4 * width, 3 * width, 1)
        self.up_coarse = nn.Conv2d(3 * width, 2 * width, 1)
        self.join = _Block(3 * width, 3 * width)
        self.merge = nn.Sequential(_Block(2 * width, 3 * width), _Block(3 * width, 3 * width))
        self.sizes = [1, len(self.concepts), len(self.paints) + 1, 3]
        self.head = nn.Conv2d(3 * width, sum(self.sizes), 1)

    def forward(self, images: Tensor) -> Cells:
        fine = self.fine(self.stem(images * 2 - 1))
        coarse = self.coarse(fine)
        coarse = self.join(coarse + F.interpolate(self.up_whole(self.whole(coarse)), scale_factor=2))
        cells = self.head(self.merge(fine + F.interpolate(self.up_coarse(coarse), scale_factor=2)))
        middle, concept, paint, place = cells.split(self.sizes, dim=1)
        return Cells(middle[:, 0] - RARE, concept, paint, place)

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[list[Detection]]:
        """The things of each image, the surest first."""
        cells: Cells = self(images.to(self.head.weight.device))
        sure = cells.middle.sigmoid()
        peak = (sure == F.max_pool2d(sure[:, None], 3, 1, 1)[:, 0]) & (sure > THRESHOLD)
        found: list[list[Detection]] = [[] for _ in range(len(images))]
        for b, row, column in peak.nonzero().tolist():
            dx, dy, side = cells.place[b, :, row, column].tolist()
            paint = int(cells.paint[b, :, row, column].argmax())
            found[b].append(
                Detection(
                    self.concepts[int(cells.concept[b, :, row, column].argmax())],
                    self.paints[paint] if paint < len(self.paints) else None,
                    (column + 0.5 + dx) * 2 / GRID - 1,
                    (row + 0.5 + dy) * 2 / GRID - 1,
                    side,
                    float(sure[b, row, column]),
                )
            )
        return [sorted(things, key=lambda thing: -thing.confidence)[:MOST] for things in found]

    def save(self, folder: Path) -> None:
        """model.safetensors (float16) and config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)
        config = {"concepts": self.concepts, "paints": self.paints, "width": self.width}
        (folder / "config.json").write_text(json.dumps(config) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Detector:
        """What `save` wrote, in float32, frozen."""
        model = cls(**json.loads((folder / "config.json").read_text("utf-8")))
        model.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
        return model.eval().requires_grad_(False)


WEIGHTS = "model.safetensors"

"""Pictures looked at: the features of those that a person has voted on, each once, and a run's previews."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palate.runtime import checkpoint
from palate.runtime.images import UNREADABLE
from palate.studio.artist import Artist, read_picture
from palate.taste.learner import Array
from palate.taste.votes import Picture


class KnownFeatures:
    """Features of pictures by file and prompt: those of the pool, and any other's once it was looked at."""

    def __init__(self, artist: Artist, pictures: Path):
        self.artist, self.pictures = artist, pictures
        self._known: dict[tuple[str, str], Array | None] = {}

    def of(self, picture: Picture, prompt: str) -> Array | None:
        """(D,), before scaling; None where the picture is gone, damaged, or too small to have features."""
        key = (picture.file, prompt)
        if key not in self._known:
            for drawn in self.artist.pool:
                self._known[drawn.picture.file, drawn.prompt] = drawn.features
        if key not in self._known:
            path = self.pictures / picture.file
            if not path.is_file():
                return None
            self._known[key] = None
            with contextlib.suppress(*UNREADABLE):
                row = self.artist.look(read_picture(path)[None], [prompt])[0]
                self._known[key] = row if np.isfinite(row).all() else None
        return self._known[key]


def previews(run: Path, step: int, rows: Sequence[dict[str, Any]]) -> Tensor | None:
    """(N, 3, H, W) in [0, 1] of the pictures that the rows of a step name; None where there are none, of several sizes,
    or where they are being written, or taken away in another window."""
    folder = run / "samples" / checkpoint.name(step)
    try:
        return torch.stack([read_picture(folder / row["file"]) for row in rows])
    except (*UNREADABLE, RuntimeError):
        return None

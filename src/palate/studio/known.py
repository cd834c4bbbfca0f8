"""Features of the pictures that a person has voted on, each looked at once."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

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

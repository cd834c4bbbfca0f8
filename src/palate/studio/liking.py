"""How a person's taste likes the pictures of a run that is aligned to it: always the same prompts and noise.

The reward of the training batches is no such thing: each batch has other prompts, and the reward holds more than taste.
"""

from __future__ import annotations

from pathlib import Path

import torch

from palate.recipe import Recipe
from palate.runtime.errors import InputError
from palate.studio.artist import Artist
from palate.studio.known import previews
from palate.studio.runview import RunView
from palate.taste.reward import TasteReward
from palate.taste.saved import FILE, parts_of
from palate.taste.taste import load_objective


class Liking:
    """The taste of a run over its previews; each picture is looked at once."""

    def __init__(self, artist: Artist):
        self.artist = artist
        self._tastes: dict[tuple[str, tuple[int, ...]], TasteReward] = {}
        self._means: dict[tuple[str, int, int], float] = {}

    def of(self, view: RunView) -> list[tuple[int, float]]:
        """(step, mean taste above that of the pictures before training, in standard deviations of the pool); empty for
        a run without a taste, or while nothing can be said yet."""
        if not self.artist.ready.is_set() or self.artist.problem:
            return []
        taste = self._taste(view.recipe)
        if taste is None:
            return []
        found = [(step, mean) for step in view.previews if (mean := self._mean(view, step, taste)) is not None]
        return [(step, mean - found[0][1]) for step, mean in found]

    def _taste(self, recipe: Recipe) -> TasteReward | None:
        """The run's taste on the embedded reward, without what is added to it; None if there is none to load."""
        source = recipe.reward.source.get("taste", "")
        if recipe.reward.name != "taste" or recipe.model.name != "emoji":
            return None
        try:
            files = [Path(folder) / FILE for folder, _ in parts_of(source)]
            key = source, tuple(file.stat().st_mtime_ns for file in files)  # one that was fitted again is another
            if key not in self._tastes:
                self._tastes[key] = load_objective(source, absolute=0.0, base=lambda name: self.artist.reward)
            return self._tastes[key]
        except (InputError, OSError):  # its folder is gone, or of other features
            return None

    def _mean(self, view: RunView, step: int, taste: TasteReward) -> float | None:
        rows = view.pictures(step)
        key = view.drawn(step)
        if key not in self._means:
            images = previews(view.folder, step, rows)
            if images is None:
                return None
            with torch.no_grad():
                self._means[key] = float(taste(images, [row["prompt"] for row in rows]).mean())
        return self._means[key]

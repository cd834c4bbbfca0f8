"""How a person's taste likes the pictures of a run that is aligned to it: always the same prompts and noise.

The reward of the training batches is no such thing: each batch has other prompts, and the reward holds more than taste.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from palate.recipe import Recipe
from palate.runs.comparison import common_to_all
from palate.runtime.errors import InputError
from palate.studio.artist import Artist
from palate.studio.known import previews
from palate.studio.runview import RunView
from palate.taste.reward import TasteReward
from palate.taste.saved import FILE, parts_of
from palate.taste.taste import load_objective

Known = tuple[list[dict[str, Any]], list[float]]  # the rows of a step, and the taste of each


class Liking:
    """The taste of a run over its previews; each picture is looked at once."""

    def __init__(self, artist: Artist):
        self.artist = artist
        self._tastes: dict[tuple[str, tuple[int, ...]], TasteReward] = {}
        self._values: dict[tuple[str, int, int], Known] = {}

    def of(self, view: RunView) -> list[tuple[int, float]]:
        """(step, mean taste above that of the pictures before training, in standard deviations of the pool), over the
        prompts and seeds that all steps have; empty for a run without a taste, or while nothing can be said yet."""
        if not self.artist.works:
            return []
        taste = self._taste(view.recipe)
        if taste is None:
            return []
        found = [(step, known) for step in view.previews if (known := self._known(view, step, taste)) is not None]
        try:
            shared = common_to_all([rows for _, (rows, _) in found], [f"step {step}" for step, _ in found])
        except (InputError, IndexError):  # nothing in common, or no step at all
            return []
        means = [
            (step, sum(values[each[k]] for each in shared) / len(shared)) for k, (step, (_, values)) in enumerate(found)
        ]
        return [(step, mean - means[0][1]) for step, mean in means]

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

    def _known(self, view: RunView, step: int, taste: TasteReward) -> Known | None:
        key = view.drawn(step)
        if key not in self._values:
            rows = view.pictures(step)
            images = previews(view.folder, step, rows)
            if images is None:
                return None
            with torch.no_grad():
                self._values[key] = rows, taste(images, [row["prompt"] for row in rows]).tolist()
        return self._values[key]

"""What the guard measures of a model that no judge knows: how far its images have moved from those of before training.

The same prompts and noise at each look. Nothing is needed besides what trains: distances are taken in the image tower
of the reward that is optimised where it has one, else in colours and textures of patches; and where the reward reads
prompts, images are compared with other prompts than their own. The measures are `evaluate.shift`'s. A held-out reward
is asked too where one is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from palate.core import EmbedsImages, Model, Random, Reward, Sampler, TwoTower
from palate.evaluate import shift
from palate.evaluate.samples import Drawing, drawn, noises_of
from palate.rewards.simple import saturation

LATENT_SIDE = 16  # at most: the base's latents are remembered, and what is finer is `shift.fine_detail`'s
AT_ONCE = 32  # images drawn and looked at together, unless training itself takes fewer

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "cast": shift.colour_cast,
    "saturation": saturation,
    "detail": shift.fine_detail,
}


class ImageMonitor:
    """A guard's measure (`palate.core.GuardMeasure`) with a memory: its first look is at the model of before.

    seed: of the noise. steps: of sampling; None = the model's default. tower: of the reward that is optimised; None =
    patches. heldout: a reward that is not optimised. batch_size: images at once, at most AT_ONCE.
    """

    def __init__(
        self,
        *,
        seed: int,
        sampler: Sampler | None = None,
        tower: EmbedsImages | None = None,
        heldout: Reward | None = None,
        steps: int | None = None,
        batch_size: int = AT_ONCE,
    ):
        self.seed, self.steps, self.sampler = seed, steps, sampler
        self.tower, self.heldout = tower, heldout
        self.batch_size = min(batch_size, AT_ONCE)
        self.base: dict[str, Tensor] = {}  # what is remembered of the first look, one row per image

    def __call__(self, model: Model, prompts: Sequence[str], ids: Sequence[int]) -> dict[str, float]:
        """`measures` of one image for each prompt, the noise a function of (seed, ids[i]), against the first look's."""
        now = self.look(model, prompts, ids)
        if not self.base:
            self.base = {name: rows.clone() for name, rows in now.items()}
        found = measures(now, self.base, prompts)
        return {name: float(f"{value:.6g}") for name, value in found.items() if not math.isnan(value)}

    @torch.no_grad()
    def look(self, model: Model, prompts: Sequence[str], ids: Sequence[int]) -> dict[str, Tensor]:
        """Draw, and keep what is measured: rows (N, ...) on the CPU, by name."""
        noises = noises_of([Random(self.seed, 0, ids)], "guard", model.latent_shape, self.sampler)
        device = next((p.device for p in model.parameters("policy")), torch.device("cpu"))
        how = Drawing(steps=self.steps, batch_size=self.batch_size, sampler=self.sampler)
        compared, parts = shift.others(prompts), []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            ((images, latents),) = drawn(model, prompts[rows], [noise[rows] for noise in noises], how)
            part = {name: statistic(images) for name, statistic in STATISTICS.items()}
            part |= self._seen(images.to(device), prompts[rows], compared[rows])
            part["pictures"] = shift.thumbnails(images)
            part["latents"] = shift.pooled(latents, LATENT_SIDE)
            if self.heldout is not None:
                part["heldout"] = self.heldout(images, prompts[rows])
            parts.append({name: values.detach().float().cpu() for name, values in part.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _seen(self, images: Tensor, prompts: Sequence[str], others: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Features of the images, and by how much each fits its own prompt better than the others, if a reward says."""
        if self.tower is None:
            return {"features": shift.patch_statistics(images)}
        seen = {"features": self.tower.embed_images(images)}
        if isinstance(self.tower, TwoTower) and others[0]:
            looked = self.tower.image_features(images)
            elsewhere = [self.tower.score(looked, list(texts)) for texts in zip(*others, strict=True)]
            seen["fit"] = self.tower.score(looked, prompts) - torch.stack(elsewhere).mean(0)
        return seen

    def state_dict(self) -> dict[str, Any]:
        """The first look, for a checkpoint."""
        return dict(self.base)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base = dict(state)


def measures(now: dict[str, Tensor], base: dict[str, Tensor], prompts: Sequence[str]) -> dict[str, float]:
    """Every measure of a look `now` against the look `base`, both `ImageMonitor.look`'s: `shift`s of the statistics,
    drift of the features, latent_drift, variety, fit with its standard error, duplicates, and of what is plotted the
    mean saturation; where it was asked the held-out reward's mean, and heldout_fall, its fall in standard deviations.
    """
    found = {f"{name}_shift": shift.shift(now[name], base[name]) for name in STATISTICS}
    for name, rows in (("drift", "features"), ("latent_drift", "latents")):
        found[name] = shift.displacement(now[rows], base[rows], shift.distance_across(base[rows], prompts))
    found["variety"] = shift.variety(now["features"], prompts) / max(shift.variety(base["features"], prompts), 1e-12)
    if "fit" in now and "fit" in base:
        found["fit"], found["fit_error"] = shift.ratio(now["fit"], base["fit"])
    across = shift.distance_across(base["pictures"], prompts)
    found["duplicates"] = shift.duplicates(now["pictures"], prompts, across)
    found["saturation"] = float(now["saturation"].mean())
    if "heldout" in now and "heldout" in base:
        values = now["heldout"].double(), base["heldout"].double()
        found["heldout"] = float(values[0].mean())
        found["heldout_fall"] = float(values[1].mean() - values[0].mean()) / max(shift.spread(values[1]), 1e-6)
    return found

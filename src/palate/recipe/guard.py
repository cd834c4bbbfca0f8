"""The settings of the guard, section trainer.guard of a recipe: when it looks, at what, and which limits it holds.

The limits of the image measures are in units of the spread of the base model's own images (`palate.evaluate.shift`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

LATER = (
    "background_drop", "measures", "steps", "cast_shift", "saturation_shift", "detail_shift", "drift", "latent_drift",
    "variety_ratio", "fit_ratio", "duplicates_rise", "heldout_fall", "base",
    "after",
)  # fmt: skip
# ^ came after the first release; at their defaults they are no part of what a resumed run must share


@dataclass(frozen=True)
class GuardSettings:
    """Watches quantities that are NOT optimised, on fixed prompts and seeds, against their values before training."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    every: Count = 10  # steps between checks; 0 = off
    after: Count = 0  # the first step that is looked at: while algorithm.context is learnt, pictures lie in between
    prompts: Positive = 48  # images at each look, two of a prompt
    # what "before training" is. start: the weights that this run begins with; reference: those that the policy is held
    # to, which are the model without any LoRA: what earlier rounds lost, whose result is model.start, counts as well
    base: Literal["start", "reference"] = "start"
    # judge: the embedded model's own, with names for what it sees; images: `palate.evaluate.monitor`, which needs no
    # weights. None = judge for the embedded model, images for every other
    measures: Literal["judge", "images"] | None = None
    # the judge's
    heldout_drop: NonNegative = 0.10  # largest fall of the held-out reward, in its own units
    concept_drop: NonNegative = 0.05  # largest fall of the share of images that still show the prompt's concept
    background_drop: NonNegative | None = None  # largest fall of the share with the named background; None = unwatched
    diversity_ratio: UnitInterval = 0.80  # smallest diversity inside a prompt and style, as a share of the base model's
    # the images'; None = unwatched. docs/evaluation.md says where each limit comes from
    steps: Positive | None = None  # of sampling; None = the model's default
    cast_shift: NonNegative | None = 0.5  # of the mean colour, in standard deviations over the base's images
    saturation_shift: NonNegative | None = 1.0
    detail_shift: NonNegative | None = 1.5  # of the logarithm of the amplitude of fine detail: blur and noise alike
    drift: NonNegative | None = 0.5  # in the optimised reward's image tower; 1 = as unlike as another prompt's image
    latent_drift: NonNegative | None = 0.5  # the same of the final latents
    variety_ratio: UnitInterval | None = 0.5  # smallest distance of two images of a prompt, as a share of the base's
    fit_ratio: UnitInterval | None = 0.9  # smallest lead of an image's own prompt over others, as a share of the base's
    duplicates_rise: NonNegative | None = 0.10  # of the share of images that another prompt nearly has too
    heldout_fall: NonNegative | None = 0.5  # of a held-out reward, in standard deviations over the base's images
    # what follows
    best: str | None = None  # the best step: highest in this metric among checks inside every limit; None = the newest
    action: Literal["stop", "rollback", "warn"] = "stop"
    rollbacks: Count = 2  # then stop; each one halves the learning rate


def identifying(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must share: without later fields at their defaults, so that older runs go on."""
    defaults = {field.name: field.default for field in dataclasses.fields(GuardSettings)}
    return {key: value for key, value in tree.items() if key not in LATER or value != defaults[key]}

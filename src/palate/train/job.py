"""What a run is made of, checked, and how it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.core import Algorithm, DrawsOwnSamples, GuardMeasure, Model, ReadsImages, Reward, TakesAnySize
from palate.data.buckets import Bucket
from palate.models.latents import ImageSize, sides
from palate.models.sizes import at_size
from palate.recipe import RESUMABLE_FIELDS, GuardSettings, SampleSettings, TrainerSettings, check_trainer
from palate.recipe.cross_checks import average_stays
from palate.recipe.guard import identifying
from palate.recipe.names import near
from palate.runtime.errors import InputError
from palate.runtime.files import json_digest
from palate.runtime.progress import counted
from palate.train.checks import check_parts
from palate.train.tracking import check_trackers


class Outcome(NamedTuple):
    """How a run ended."""

    folder: Path
    step: int
    reason: str  # "finished", "guard: ...", "signal"
    exit_code: int  # 0, or 128 + the signal's number


@dataclass(frozen=True)
class Job:
    """Everything that a run is made of. `train` makes one from its arguments, the command line from a recipe."""

    model: Model
    algorithm: Algorithm
    reward: Reward
    prompts: list[str]
    folder: Path
    trainer: TrainerSettings
    preview: list[str]  # prompts of the guard and, the first ones, of previews
    sample: SampleSettings = field(default_factory=SampleSettings)
    latents: Tensor | None = None  # (N, C, h, w), or (N, 2, C, h, w) of pairs: one for each prompt
    measure: GuardMeasure | None = None  # None = `train.guard.measure_of`
    identity: str = ""  # a resumed run must have the same; "" = the hash of the trainer's settings
    recipe: str | None = None  # the text of recipe.yaml
    kept: str | None = None  # the text of identity.json: what the run is started with, by content
    sizes: Sequence[ImageSize] = ()  # image sizes that steps draw in turn; () = the model's own
    buckets: Sequence[Bucket] = ()  # or the given pictures of each of several sizes
    reference: str | None = None  # what the policy is held to, in words, where that needs saying

    def check(self, *, resume: bool = False) -> None:
        """InputError: what was given cannot work; unless resume, what would have no effect is refused too."""
        count = len(self.prompts)
        if not count:
            raise InputError("got no prompts; give at least one")
        check_trackers(self.trainer.tracker)
        draws = bool(self.trainer.preview_every or (self.trainer.guard.every and self.measure is None))
        check_parts(self.model, self.algorithm, self.reward, samples=draws)
        if self.latents is not None:
            check_latents(self.latents, self.prompts, self.model.latent_shape[0])
        if unknown := sorted(set(self.trainer.lrs or ()) - set(self.algorithm.trains)):
            raise InputError(f"trainer.lrs.{unknown[0]}: the algorithm trains {', '.join(self.algorithm.trains)}")
        given = self.latents is not None or bool(self.buckets)
        if given and not resume and isinstance(self.algorithm, ReadsImages) and not self.algorithm.reads_images:
            raise InputError(
                f"latents: {type(self.algorithm).__name__} draws its own images and would not read given ones; leave "
                "them out, or train with SRPO, ReFL with pretrain above 0, or pairs with DPO"
            )
        if not resume and (problem := average_stays(self.trainer)):
            raise InputError(problem)
        own = isinstance(self.algorithm, DrawsOwnSamples)
        if own and (self.sample.steps is not None or self.sample.guidance is not None):
            raise InputError("sample.steps, sample.guidance: a generator draws as it was trained; leave them out")

    def check_sizes(self) -> None:
        """InputError: the model cannot draw one of the sizes, or the algorithm keeps latents from step to step."""
        sizes: list[tuple[ImageSize | None, str]] = [(size, "prompts.sizes") for size in self.sizes]
        sizes += [(bucket.size, "prompts.sizes") for bucket in self.buckets]
        if sizes and not (isinstance(self.algorithm, TakesAnySize) and self.algorithm.any_size):
            raise InputError(f"prompts.sizes: {type(self.algorithm).__name__} trains on one size; set model.image_size")
        if sizes and self.latents is not None:
            raise InputError("prompts.sizes: latents of one size are given; leave sizes out")
        if self.trainer.preview_every or self.trainer.guard.every:
            sizes.append((self.sample.image_size, "sample.image_size"))
        for size, key in sizes:
            with at_size(self.model, size, key):
                pass


def check_latents(latents: Tensor, prompts: Sequence[str], channels: int) -> None:
    """InputError: they are not one image or pair for each prompt, of finite numbers, in latents of so many channels."""
    if len(latents) != len(prompts):
        got = f"{counted(len(latents), 'latent')} and {counted(len(prompts), 'prompt')}"
        raise InputError(f"got {got}; expected one prompt per image")
    if latents.ndim not in (4, 5) or latents.shape[-3] != channels or latents.shape[1:-3] not in ((), (2,)):
        raise InputError(
            f"latents have shape {tuple(latents.shape)}; expected (images, {channels}, height, width) of the model's "
            f"latents, or (pairs, 2, {channels}, height, width)"
        )
    if bool((broken := _broken(latents)).any()):
        bad = int(broken.nonzero()[0])
        raise InputError(
            f"the latents of image {bad} ({prompts[bad]!r}) are not finite; expected numbers: encode it again"
        )


def _broken(latents: Tensor) -> Tensor:
    """Which samples hold numbers that are not finite, (N,). Of a pair one whole image may be absent, all NaN."""
    finite = torch.isfinite(latents)
    if latents.ndim != 5:
        return ~finite.flatten(1).all(1)
    absent = torch.isnan(latents).flatten(2).all(2)  # (N, sides)
    absent = absent & (absent[:, :2].sum(1, keepdim=True) == 1)
    return ~(finite.flatten(2).all(2) | absent).all(1)


def identity_of(settings: TrainerSettings, looked_at: ImageSize | None = None) -> str:
    """Hash of the settings that decide the numbers: what a resumed run must share. looked_at: `sample.image_size`, at
    which the guard draws what it decides by.

    Fields that came later than others are left out while they are unset, so that older runs can be resumed.
    """
    tree = {**dataclasses.asdict(settings), **dict.fromkeys(RESUMABLE_FIELDS)}
    del tree["tracker"], tree["reduce_gradients"]
    tree["guard"] = identifying(tree["guard"])
    if tree["ema_every"] == 1:
        del tree["ema_every"]
    return json_digest([tree, sides(looked_at)] if looked_at is not None and settings.guard.every else tree)


def check_settings(trainer: TrainerSettings | None, changes: dict[str, Any]) -> TrainerSettings:
    """`trainer` with some fields changed, checked as a recipe's are. InputError names an unknown field's nearest."""
    known = [field.name for field in dataclasses.fields(TrainerSettings)]
    for name in changes:
        if name not in known:
            hint = near(name, known) or f"; expected one of {', '.join(known)}"
            raise InputError(f"train() got an unknown option {name!r}{hint}")
    start = vars(trainer) if trainer else {"guard": GuardSettings(every=0)}
    return check_trainer({**start, **{k: v for k, v in changes.items() if not (k == "guard" and v is None)}})

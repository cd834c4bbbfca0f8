"""A run's folder: its recipe, log and result, each read once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from palate.core import Algorithm, Model, Sampler
from palate.recipe import SampleSettings, builder, evaluators, reader
from palate.recipe.algorithm import build_algorithm
from palate.recipe.cross_checks import rewards_placed
from palate.recipe.identity import changes
from palate.recipe.objective import Objective, control_words, objective_of
from palate.recipe.relocation import told_of_moves
from palate.recipe.settings import Recipe
from palate.recipe.start import reference_of
from palate.runs.result import load_result
from palate.runs.stored import RECIPE, read_recipe, require_run, steered
from palate.runtime.errors import InputError
from palate.runtime.result import result_of
from palate.runtime.runlog import METRICS, read_metrics

SOURCE = "reward.source."
# What a finished run may be judged with, other than its recipe says; nothing of it changes the run.
JUDGING = ("evaluate.", "sample.", SOURCE, "model.device", "model.text_cache")


class RunFolder:
    """The folder of a run. `overrides`, as of a recipe, say how it is judged: evaluate.*, sample.*, reward.source.*,
    model.device. InputError: the folder is no run, or an override would change the run itself."""

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()):
        self.path, self.overrides = Path(path), tuple(overrides)
        require_run(self.path)
        for override in self.overrides:
            if not override.startswith(JUDGING):
                raise InputError(
                    f"{override}: of a finished run only evaluate.*, sample.*, reward.source.*, model.device and "
                    "model.text_cache can be changed; start a new run for anything else"
                )

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @cached_property
    def text(self) -> str:
        """The recipe's YAML."""
        return reader.text_of(str(self.path / RECIPE))

    @cached_property
    def recipe(self) -> Recipe:
        """The run's recipe, checked, with the overrides."""
        return reader.parse(self.text, self.overrides, stored=True)

    @cached_property
    def tree(self) -> dict[str, Any]:
        """`read_recipe` of it."""
        return read_recipe(self.path)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.path / METRICS)

    def words(self, step: int | None = None) -> tuple[list[str], list[str]]:
        """The (positive, negative) control words that the weights of `step` (None = the result's) were trained with
        last: the recipe's, changed by the steering events."""
        if step is None and (result := result_of(self.path)):
            step = result.step
        return steered(control_words(self.recipe), self.metrics, step)

    @property
    def sample(self) -> SampleSettings:
        """How the run's pictures are drawn."""
        return self.recipe.sample

    @cached_property
    def algorithm(self) -> Algorithm:
        """The run's algorithm, in its first state."""
        return build_algorithm(self.recipe)

    @property
    def may_fall(self) -> float:
        """How far the held-out reward may fall without a warning, in its own units."""
        return evaluators.allowed_fall(self.recipe)

    @property
    def reference(self) -> str | None:
        """What the result is compared with, in words, where that needs saying."""
        return reference_of(self.recipe)

    def objective(self) -> Objective:
        """What the run optimised, with the words of its result."""
        return objective_of(self.recipe).with_words(*self.words())

    def model(
        self, warn: Callable[[str], None] = warnings.warn, *, mergeable: bool = False
    ) -> tuple[Model, Sampler | None]:
        """The recipe's model with the weights of the run's newest good checkpoint (of `palate optimize`: its newest
        round's), and how the algorithm draws from it (None = as the model does). It draws at `sample.image_size` where
        the recipe has one. `warn` gets a sentence for each damaged checkpoint that was passed over. CheckpointError:
        there is none, or the base model's files have changed. mergeable: as `without_savings` says.
        """
        with told_of_moves(self.path, lambda: self.tree):
            for change in changes(self.path, self.recipe):
                warn(f"{self.path}: {change}")
            seen = looked_at(self.recipe)
            model = builder.build_model(without_savings(seen) if mergeable else seen)
        load_result(model, self.path, warn=warn)
        return model, builder.sampler_of(self.algorithm)


def open_runs(run_folders: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[RunFolder]:
    """Each run with the overrides. One of `reward.source.NAME` goes to those runs alone whose recipes have a use for
    that reward; where none has, to all, whose recipes refuse it."""
    judging = [override for override in overrides if not override.startswith(SOURCE)]
    if len(judging) == len(overrides):
        return [RunFolder(folder, overrides) for folder in run_folders]
    known = [rewards_placed(RunFolder(folder, judging).recipe) for folder in run_folders]
    anywhere = set().union(*known)
    return [
        RunFolder(folder, [o for o in overrides if o in judging or source_name(o) not in anywhere - own])
        for folder, own in zip(run_folders, known, strict=True)
    ]


def source_name(override: str) -> str:
    """NAME of `reward.source.NAME=...`."""
    return override.partition("=")[0].removeprefix(SOURCE)


def looked_at(recipe: Recipe) -> Recipe:
    """The recipe whose model draws what is looked at: `sample.image_size` in the place of `model.image_size`."""
    size = recipe.sample.image_size
    return recipe if size is None else replace(recipe, model=replace(recipe.model, image_size=size))


def without_savings(recipe: Recipe) -> Recipe:
    """The recipe whose frozen weights are stored whole, so that a LoRA, which depends on no `model.quantize` and no
    `model.offload`, can be added to them: in the host's memory, since these say that the device has no room."""
    if recipe.model.quantize is None and not recipe.model.offload:
        return recipe
    return replace(recipe, model=replace(recipe.model, quantize=None, offload=None, device="cpu"))


def trained_model(
    run_folder: str | Path, *, warn: Callable[[str], None] = warnings.warn
) -> tuple[Model, Sampler | None]:
    """`RunFolder.model` of the folder at a path."""
    return RunFolder(run_folder).model(warn)

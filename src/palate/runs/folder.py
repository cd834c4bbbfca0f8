"""A run's folder: its recipe, log and result, each read once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from palate.core import Model, Sampler
from palate.recipe import builder, reader
from palate.recipe.identity import changes
from palate.recipe.objective import Objective, control_words, objective_of
from palate.recipe.settings import Recipe
from palate.runs.result import load_result
from palate.runtime.errors import InputError
from palate.runtime.runlog import METRICS, read_metrics

RECIPE = "recipe.yaml"
# What a finished run may be judged with, other than its recipe says; nothing of it changes the run.
JUDGING = ("evaluate.", "sample.", "reward.source.", "model.device", "model.text_cache")


class RunFolder:
    """The folder of a run. `overrides`, as of a recipe, say how it is judged: evaluate.*, sample.*, reward.source.*,
    model.device. InputError: the folder is no run, or an override would change the run itself."""

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()):
        self.path, self.overrides = Path(path), tuple(overrides)
        if not (self.path / RECIPE).is_file():
            raise InputError(f"{self.path} is not a run (it holds no {RECIPE}); give a run, for example runs/NAME")
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
        return reader.parse(self.text, self.overrides)

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The recipe as plain values, unchecked: of a run that an older or a newer version wrote, too."""
        try:
            tree = reader.Loader(self.text).get_single_data()
        except yaml.YAMLError as error:
            raise InputError(f"{self.path / RECIPE} is not YAML: {error}") from error
        if not isinstance(tree, dict):
            raise InputError(f"{self.path / RECIPE} holds {type(tree).__name__}; expected a mapping")
        return tree

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.path / METRICS)

    def words(self) -> tuple[list[str], list[str]]:
        """The (positive, negative) control words at the end: the recipe's, changed by the steering events."""
        return steered(control_words(self.recipe), self.metrics)

    def objective(self) -> Objective:
        """What the run optimised, with the words in force at its end."""
        return objective_of(self.recipe).with_words(*self.words())

    def model(
        self, warn: Callable[[str], None] = warnings.warn, *, mergeable: bool = False
    ) -> tuple[Model, Sampler | None]:
        """The recipe's model with the weights of the run's newest good checkpoint (of `palate optimize`: its newest
        round's), and how the algorithm draws from it (None = as the model does). It draws at `sample.image_size` where
        the recipe has one. `warn` gets a sentence for each damaged checkpoint that was passed over. CheckpointError:
        there is none, or the base model's files have changed. mergeable: as `without_savings` says.
        """
        for change in changes(self.path, self.recipe):
            warn(f"{self.path}: {change}")
        seen = looked_at(self.recipe)
        model = builder.build_model(without_savings(seen) if mergeable else seen)
        load_result(model, self.path, warn=warn)
        return model, builder.sampler_of(builder.build_algorithm(self.recipe))


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


def steered(words: dict[str, list[str]], rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The (positive, negative) words after the steering events among the rows of metrics.jsonl."""
    for row in rows:
        if row.get("event") == "steer":
            words = words | {side: list(row[side]) for side in words if row.get(side) is not None}
    return words["positive"], words["negative"]


def run_names(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, or its path where two are alike. InputError when one occurs twice."""
    whole = [str(folder.resolve()) for folder in folders]
    for i, path in enumerate(whole):
        if path in whole[:i]:
            raise InputError(f"run {folders[i]} is given twice; name each run once")
    short = [folder.resolve().name for folder in folders]
    return [path if short.count(name) > 1 else name for path, name in zip(whole, short, strict=True)]


def tree_words(tree: dict[str, Any]) -> dict[str, list[str]]:
    """`recipe.objective.control_words` of a recipe as plain values."""
    if relative := (tree.get("reward") or {}).get("relative"):
        return {side: [relative[side]] if relative.get(side) else [] for side in ("positive", "negative")}
    return {side: list((tree.get("algorithm") or {}).get(side) or ()) for side in ("positive", "negative")}


def words_in_force(run_folder: str | Path, tree: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The (positive, negative) words at the end of a run whose recipe is given as plain values."""
    return steered(tree_words(tree), read_metrics(Path(run_folder) / METRICS))


def read_recipe(run_folder: str | Path) -> dict[str, Any]:
    """The run's recipe as plain values. InputError when the folder is not a run."""
    return RunFolder(run_folder).tree


def trained_model(
    run_folder: str | Path, *, warn: Callable[[str], None] = warnings.warn
) -> tuple[Model, Sampler | None]:
    """`RunFolder.model` of the folder at a path."""
    return RunFolder(run_folder).model(warn)

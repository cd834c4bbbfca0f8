"""A run's folder: its recipe, log and result, each read once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from palate.core import Algorithm, Model, Sampler
from palate.recipe import SECTIONS, SampleSettings, builder, evaluators, reader
from palate.recipe.cross_checks import rewards_placed
from palate.recipe.identity import changes
from palate.recipe.objective import Objective, control_words, objective_of
from palate.recipe.relocation import told_of_moves
from palate.recipe.settings import Recipe
from palate.recipe.start import reference_of
from palate.runs.result import load_result
from palate.runtime.errors import InputError
from palate.runtime.result import result_of
from palate.runtime.runlog import METRICS, read_metrics, words_after

RECIPE = "recipe.yaml"
SOURCE = "reward.source."
SHAPES: dict[tuple[str, ...], type] = {  # of a run's recipe: what lists and reports read, the outer ones first
    **{(section,): dict for section in ("algorithm", *SECTIONS)},
    ("reward", "relative"): dict, ("trainer", "steps"): int, ("optimize", "budget"): int,
}  # fmt: skip
KINDS = {dict: "a mapping", int: "a whole number"}
# What a finished run may be judged with, other than its recipe says; nothing of it changes the run.
JUDGING = ("evaluate.", "sample.", SOURCE, "model.device", "model.text_cache")


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
        return reader.parse(self.text, self.overrides, stored=True)

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The recipe as plain values, unchecked: of a run that an older or a newer version wrote, too."""
        try:
            tree = reader.Loader(self.text).get_single_data()
        except yaml.YAMLError as error:
            raise InputError(f"{self.path / RECIPE} is not YAML: {error}") from error
        if not isinstance(tree, dict):
            raise InputError(f"{self.path / RECIPE} holds {type(tree).__name__}; expected a mapping")
        if wrong := misshapen(tree):
            raise InputError(f"{self.path / RECIPE}: {wrong}; restore the file")
        return tree

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
        return builder.build_algorithm(self.recipe)

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


def misshapen(tree: Mapping[str, Any]) -> str:
    """What of a run's recipe is not of the kind that lists and reports read, in words; "" where all of it is."""
    for keys, kind in SHAPES.items():
        value: Any = tree
        for key in keys:
            value = (value or {}).get(key)
        if value is not None and not isinstance(value, kind):
            return f"{'.'.join(keys)} is {type(value).__name__}, where {KINDS[kind]} is expected"
    return ""


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


def trained_to(rows: Sequence[dict[str, Any]], step: int) -> int:
    """The last update that is in the weights of `step`: an earlier one where the guard went back to it there."""
    for row in rows:
        if row.get("event") == "guard" and row["step"] == step and row.get("action") in ("rollback", "stop"):
            return int(row.get("best_step", step))
    return step


def ended_by_guard(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the guard's last look at the run made it end before its last step."""
    return [row.get("action") for row in rows if row.get("event") == "guard"][-1:] == ["stop"]


def steered(
    words: dict[str, list[str]], rows: Sequence[dict[str, Any]], step: int | None
) -> tuple[list[str], list[str]]:
    """The (positive, negative) words after those steering events among the rows of metrics.jsonl that the weights of
    `step` have seen; None = after all."""
    last = math.inf if step is None else trained_to(rows, step)
    for row in rows:
        if row.get("event") == "steer" and row["step"] <= last:
            words = words_after(words, row)
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
    own = {side: (tree.get("algorithm") or {}).get(side) for side in ("positive", "negative")}
    return {side: list(given) if isinstance(given, list) else [] for side, given in own.items()}  # else no words


def read_recipe(run_folder: str | Path) -> dict[str, Any]:
    """The run's recipe as plain values. InputError when the folder is not a run."""
    return RunFolder(run_folder).tree


def trained_model(
    run_folder: str | Path, *, warn: Callable[[str], None] = warnings.warn
) -> tuple[Model, Sampler | None]:
    """`RunFolder.model` of the folder at a path."""
    return RunFolder(run_folder).model(warn)

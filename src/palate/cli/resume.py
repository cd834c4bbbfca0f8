"""The recipe with which `palate resume` goes on."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from palate import recipe as recipes
from palate.cli.options import recipe_file
from palate.recipe import Recipe
from palate.recipe.relocation import told_of_moves
from palate.runtime import checkpoint
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import in_shell


def read_resumed(run: Path, overrides: Sequence[str]) -> Recipe:
    """The run's own recipe with the overrides. InputError where they would change the run itself; CheckpointError
    where there is nothing to continue from."""
    text = recipes.text_of(str(file := recipe_file(run)))
    with told_of_moves(run, lambda: recipes.reader.read_yaml(text, "recipe")):
        started = recipes.parse(text, beside=file.absolute().parent, stored=True)
    if started.optimize is not None:
        raise InputError(f"{run} queries a black-box objective; continue it with `palate optimize {in_shell(file)}`")
    recipe = recipes.parse(text, overrides, beside=file.absolute().parent, stored=True)
    recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, folder=str(run)))
    if recipes.fingerprint(started) != recipes.fingerprint(recipe):
        raise InputError(
            "these overrides would change the run itself; when resuming, only trainer.steps, previews, checkpoints, "
            "threads, evaluate and sample (sample.image_size only without a guard) may change. For the rest start a "
            f"new run, from these weights if you like: palate train {in_shell(file)} run.folder=NEW "
            + shlex.join([*overrides, *([f"model.start={run}"] if recipe.model.weights == "lora" else [])])
        )
    if not checkpoint.steps(run / "checkpoints") and not checkpoint.set_aside(run / "checkpoints"):
        raise CheckpointError(f"{run / 'checkpoints'} holds no checkpoint; start the run again with --fresh")
    return recipe

"""What `palate replay` does: repeat a step that was not finite."""

from __future__ import annotations

from pathlib import Path

import torch
import typer

from palate import recipe as recipes
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.progress import printable
from palate.train import replay as replay_bundle


def replay_and_print(bundle: Path) -> None:
    """Print where the first value that is not finite arises. typer.Exit(1): the step no longer fails."""
    saved = checkpoint.load(bundle)
    if not saved.state.get("recipe"):
        raise InputError(f"{bundle} is of a run that Python started, without a recipe; use palate.train.replay there")
    recipe = recipes.parse(saved.state["recipe"], stored=True)
    torch.manual_seed(recipe.trainer.seed)
    model, algorithm = recipes.build_whole_model(recipe), recipes.build_algorithm(recipe)
    reward = recipes.as_asked(recipe, recipes.build_reward(recipe.reward))
    found = replay_bundle(bundle, model, algorithm, reward)
    print(printable(found.text()))
    if not found.reproduced:
        raise typer.Exit(1)

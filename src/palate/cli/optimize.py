"""What `palate optimize` does once the recipe is read."""

from __future__ import annotations

from pathlib import Path

import typer

from palate import recipe as recipes
from palate.cli.run_folder import remove_run
from palate.optimize import from_recipe
from palate.plan import require_room
from palate.recipe import Recipe
from palate.runtime.progress import printable
from palate.runtime.runlock import owned


def _print(text: str) -> None:
    print(printable(text), flush=True)


def _silent(text: str) -> None:
    """What stands in rounds.jsonl too."""


def optimize_recipe(recipe: Recipe, *, fresh: bool, quiet: bool) -> None:
    """Query and train as the owner of the run's folder. typer.Exit with the outcome's code."""
    require_room(recipe)
    folder = Path(recipe.run.folder)
    with owned(folder):
        if fresh:
            recipes.prompts_of(recipe)  # a missing file must not cost the old scores
            remove_run(folder)
        outcome = from_recipe(recipe, progress=not quiet, say=_silent if quiet else _print)
    if outcome.exit_code:
        print(f"continue with the same command{', without --fresh' if fresh else ''}")
        raise typer.Exit(outcome.exit_code)
    print(f"finished after {outcome.step} queries: {printable(recipe.run.folder)}")

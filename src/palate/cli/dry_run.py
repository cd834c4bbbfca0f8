"""What `palate train RECIPE --dry-run` does: all that can be known before anything large loads."""

from __future__ import annotations

from pathlib import Path

import typer

from palate import plan as planner
from palate import recipe as recipes
from palate.cli.requirements import requirements
from palate.recipe import Recipe
from palate.recipe.pictures import pictures_of
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.progress import printable

SHOWN = 5  # prompts


def dry_run_of(recipe: Recipe, *, fresh: bool = False) -> None:
    """Print plan, folders, what is there and what is missing with the command that fetches it, and the first prompts.

    typer.Exit with 2 where the run could not start as it is.
    """
    made = planner.plan(recipe)
    print(planner.table(recipe, made, device=None))
    print("\nfolders")
    good = _folders(recipe, fresh)
    print("\nneeded")
    for requirement in requirements(recipe, made=made):
        finding = requirement.finding()
        print("\n".join(f"  {printable(line)}" for line in f"{finding.state:8} {finding.text}".split("\n")))
        good = good and requirement.state not in ("bad", "missing")
    good = _start(recipe) and good
    print("\nprompts")
    _prompts(recipe)
    print(f"\n{'ready' if good else 'not ready'}: nothing was loaded, nothing written")
    if not good:
        raise typer.Exit(2)


def _folders(recipe: Recipe, fresh: bool) -> bool:
    folder = Path(recipe.run.folder)
    held = bool(checkpoint.steps(folder / "checkpoints")) or (folder / "metrics.jsonl").exists()
    state = "new"
    if held:
        state = "holds a run, which --fresh replaces" if fresh else "holds a run already; add --fresh or change it"
    print(f"  run.folder {printable(str(folder))}: {state}")
    print(f"    metrics.jsonl, samples/, checkpoints/ (the newest {recipe.trainer.keep_checkpoints}), adapter/")
    if recipe.model.text_cache is not None:
        print(f"  model.text_cache {printable(recipe.model.text_cache)}")
    return fresh or not held


def _start(recipe: Recipe) -> bool:
    """Whether the LoRAs that the recipe names fit, said only where they do not."""
    if recipe.model.start is None and recipe.model.consistency is None:
        return True
    try:
        recipes.check_start(recipe)
    except (InputError, OSError) as error:
        print(f"  bad      {printable(str(error).splitlines()[0])}")
        return False
    return True


def _prompts(recipe: Recipe) -> None:
    try:
        pictures = pictures_of(recipe)
        training, preview = recipes.prompts_of(recipe, pictures.prompts if pictures else None)
    except (InputError, OSError):  # said above
        return
    for name, texts in (("training", training), ("previews", preview)):
        print(f"  {len(texts)} of {name}, the first:")
        for text in texts[:SHOWN]:
            print(f"    {printable(text)[:160]}")

"""What `palate train` and `palate resume` do once the recipe is read."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
import typer

from palate import recipe as recipes
from palate.cli.phases import show_phases
from palate.cli.ranks import OnMain
from palate.cli.run_folder import remove_run
from palate.models.options import place_of
from palate.plan import require_room
from palate.recipe import Recipe
from palate.recipe.relocation import stored_moves, told_of_moves
from palate.report.pictures import preview_folders
from palate.report.sheet import write_page_of
from palate.runtime.checkpoint import check_space
from palate.runtime.files import in_shell
from palate.runtime.progress import say
from palate.runtime.runlock import owned
from palate.train import Job, Outcome, run_job
from palate.train.tracking import check_trackers


def train_recipe(recipe: Recipe, on_main: OnMain, *, resume: bool, fresh: bool, quiet: bool) -> None:
    """Train as the owner of the run's folder, and say how to go on. typer.Exit with the outcome's code."""
    folder = Path(recipe.run.folder)
    with contextlib.ExitStack() as held:
        on_main(lambda: held.enter_context(owned(folder)))
        on_main(lambda: check_space(folder, need=1 << 20))
        with told_of_moves(folder, lambda: recipes.as_tree(recipe)) if resume else contextlib.nullcontext():
            outcome = _trained(recipe, on_main, resume=resume, fresh=fresh, quiet=quiet)
        on_main(lambda: _index_previews(folder))
    if outcome.exit_code:
        on_main(lambda: say(f"continue with: palate resume {in_shell(folder)}"))
        raise typer.Exit(outcome.exit_code)
    on_main(lambda: say(f"{outcome.reason} at step {outcome.step}: {folder}"))


def _index_previews(folder: Path) -> None:
    """A page beside the previews of each step, to look at without the report."""
    for step in preview_folders(folder):
        if not (step / "index.html").is_file():
            write_page_of(step)


def _trained(recipe: Recipe, on_main: OnMain, *, resume: bool, fresh: bool, quiet: bool) -> Outcome:
    folder = Path(recipe.run.folder)
    moves = stored_moves(folder) if resume else {}
    if resume:
        recipes.check_identity(folder, recipe)
    else:
        recipe = recipes.begun(recipe)
    torch.manual_seed(recipe.trainer.seed)  # the LoRA's first weights; nothing later draws from this generator
    place_of(recipe.model.device)  # before anything large loads
    check_trackers(recipe.trainer.tracker)
    with show_phases(quiet or "RANK" in os.environ):
        parts = recipes.build(recipe, before_model=lambda: on_main(lambda: require_room(recipe)))
    if fresh:
        on_main(lambda: remove_run(folder))  # only now: a recipe that cannot be built must not cost the old run
    job = Job(
        parts.model,
        parts.algorithm,
        parts.reward,
        list(parts.prompts),
        folder,
        recipe.trainer,
        list(parts.preview_prompts),
        sample=recipe.sample,
        sizes=() if parts.buckets else recipe.prompts.sizes or (),
        buckets=parts.buckets,
        latents=parts.latents,
        measure=recipes.guard_measure(recipe, parts.tower),
        identity=recipes.run_identity(recipe, moves),
        recipe=recipes.dump(recipe),
        kept=recipes.identity_text(recipe),
        reference=recipes.reference_of(recipe),
    )
    return run_job(job, resume=resume, progress=not quiet)

"""Commands that train: train, resume, optimize, steer."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.cli.app import TRAIN, app, examples
from palate.cli.folders import check_room, remove_run
from palate.cli.options import Fresh, Overrides, Ranks, RecipeName, Run, WordsOption, recipe_file
from palate.cli.phases import shown
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.progress import printable, say
from palate.runtime.runlock import owned, status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from palate.recipe import Recipe
    from palate.train import Outcome


@app.command(rich_help_panel=TRAIN, epilog=examples(
    "palate train srpo-emoji trainer.steps=40",
    """palate train srpo-emoji run.folder=runs/mine algorithm.positive='["cartoon"]'""",
))  # fmt: skip
def train(
    ctx: typer.Context,
    recipe: RecipeName,
    overrides: Overrides = None,
    fresh: Fresh = False,
    nproc: Ranks = 1,
) -> None:
    """Run the training that a recipe describes."""
    from palate import recipe as recipes

    read = recipes.read(recipe, overrides or ())
    if read.optimize is not None:
        raise InputError("optimize: this recipe queries a black-box objective; use `palate optimize`")
    with _ranks(nproc, read) as on_main:
        on_main(lambda: check_room(Path(read.run.folder), fresh))
        _go(read, on_main, resume=False, fresh=fresh, quiet=ctx.obj["quiet"])


@app.command(rich_help_panel=TRAIN, epilog=examples(
    "palate resume runs/mine",
    "palate resume runs/mine trainer.steps=200    a longer run",
))  # fmt: skip
def resume(
    ctx: typer.Context,
    run: Run,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Only length, previews and checkpoints may change: trainer.steps=200.")
    ] = None,
    nproc: Ranks = 1,
) -> None:
    """Continue a run from its newest good checkpoint.

    The result is the same, bit for bit, as if the run had never stopped.
    """
    from palate import recipe as recipes
    from palate.runtime import checkpoint

    file = recipe_file(run)
    started = recipes.read(str(file))
    if started.optimize is not None:
        raise InputError(f"{run} queries a black-box objective; continue it with `palate optimize {file}`")
    read = recipes.read(str(file), overrides or ())
    read = dataclasses.replace(read, run=dataclasses.replace(read.run, folder=str(run)))
    if recipes.fingerprint(started) != recipes.fingerprint(read):
        raise InputError(
            "these overrides would change the run itself; when resuming, only trainer.steps, previews, checkpoints, "
            "threads, sample and evaluate may change. Start a new run for the rest"
        )
    if not checkpoint.steps(run / "checkpoints"):
        raise CheckpointError(f"{run / 'checkpoints'} holds no checkpoint; start the run again with --fresh")
    with _ranks(nproc, read) as on_main:
        _go(read, on_main, resume=True, quiet=ctx.obj["quiet"])


@app.command(rich_help_panel=TRAIN, epilog=examples(
    "palate optimize optimize-emoji",
    "palate optimize optimize-emoji optimize.oracle='{function: my_score:score}' optimize.budget=500",
))  # fmt: skip
def optimize(recipe: RecipeName, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Train towards a score that can only be queried.

    The same command continues what was interrupted; scores that were paid for are never queried again.
    """
    from palate import recipe as recipes

    read = recipes.read(recipe, overrides or ())
    if read.optimize is None:
        raise InputError("optimize: this recipe has no such section; use `palate train`, or give optimize.oracle.name")
    from palate.optimize import from_recipe

    folder = Path(read.run.folder)
    with owned(folder):
        if fresh:
            recipes.prompts_of(read)  # a missing file must not cost the old scores
            remove_run(folder)
        outcome = from_recipe(read, say=lambda text: print(printable(text), flush=True))
    if outcome.exit_code:
        print("continue with the same command")
        raise typer.Exit(outcome.exit_code)
    print(f"finished after {outcome.step} queries: {printable(read.run.folder)}")


@app.command(rich_help_panel=TRAIN, epilog=examples(
    'palate steer runs/mine --positive "outline"',
    'palate steer runs/mine --positive 3d --negative "flat, cartoon"',
))  # fmt: skip
def steer(run: Run, positive: WordsOption = None, negative: WordsOption = None) -> None:
    """Change the control words of a running run."""
    from palate.runtime.runlog import METRICS, read_metrics
    from palate.train import steer as change
    from palate.train.steering import await_words

    seen = read_metrics(run / METRICS)
    change(run, *(None if words is None else list(words) for words in (positive, negative)))
    state = status(run).state
    if state != "running":
        done = max((row["step"] for row in seen), default=0)
        say(
            f"{run}: this run is not running ({state}), so the words wait; `palate resume {run} "
            f"trainer.steps={2 * max(done, 1)}` takes them at its first step"
        )
        return
    longest = max([row["step_seconds"] for row in seen[-20:] if "step_seconds" in row], default=10.0)
    found = await_words(run, len(seen), min(2 * longest + 5, 120))
    if found is None:
        say(f"{run}: the running step is still at work; the next one takes the words, and metrics.jsonl says so")
    elif found["event"] == "steer":
        say(f"{run}: step {found['step']} took the words")
    else:
        raise InputError(f"step {found['step']} refused the words and keeps the old ones: {found['reason']}")


# ----------------------------------------------------------------------------------------------------- parts


@contextlib.contextmanager
def _ranks(nproc: int, recipe: Recipe) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Inside, this process is one of its run's ranks; gives what lets rank 0 alone act. Launches them if need be."""
    if "RANK" in os.environ:  # started by torchrun, by srun or by the lines below
        from palate.runtime.distributed import process_group

        with process_group(timeout_seconds=recipe.run.rank_timeout_seconds) as ranks:
            yield ranks.on_main
    elif nproc > 1:
        from palate.runtime.launch import launch

        raise typer.Exit(launch([sys.executable, "-m", "palate", *sys.argv[1:]], nproc))
    else:
        yield lambda act: act()


def _go(
    recipe: Recipe, on_main: Callable[[Callable[[], Any]], Any], *, resume: bool, fresh: bool = False, quiet: bool
) -> None:
    from palate.runtime.checkpoint import check_space

    folder = Path(recipe.run.folder)
    with contextlib.ExitStack() as held:
        on_main(lambda: held.enter_context(owned(folder)))
        on_main(lambda: check_space(folder, need=1 << 20))
        outcome = _trained(recipe, on_main, resume=resume, fresh=fresh, quiet=quiet)
        on_main(lambda: _index_previews(folder))
    if outcome.exit_code:
        on_main(lambda: say(f"continue with: palate resume {folder}"))
        raise typer.Exit(outcome.exit_code)
    on_main(lambda: say(f"{outcome.reason} at step {outcome.step}: {folder}"))


def _index_previews(folder: Path) -> None:
    """A page beside the previews of each step, to look at without the report."""
    from palate.report.pictures import preview_folders
    from palate.report.sheet import write_page_of

    for step in preview_folders(folder):
        if not (step / "index.html").is_file():
            write_page_of(step)


def _trained(
    recipe: Recipe, on_main: Callable[[Callable[[], Any]], Any], *, resume: bool, fresh: bool, quiet: bool
) -> Outcome:
    import torch

    from palate import recipe as recipes
    from palate.train import Job, run_job

    folder = Path(recipe.run.folder)
    if resume:
        recipes.check_identity(folder, recipe)
    torch.manual_seed(recipe.trainer.seed)  # the LoRA's first weights; nothing later draws from this generator
    with shown(quiet or "RANK" in os.environ):
        parts = recipes.build(recipe)
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
        latents=parts.latents,
        measure=recipes.guard_measure(recipe),
        identity=recipes.run_identity(recipe),
        recipe=recipes.dump(recipe),
        kept=recipes.identity_text(recipe),
    )
    return run_job(job, resume=resume, progress=not quiet)

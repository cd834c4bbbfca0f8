"""Commands that train: train, resume, optimize, steer; and what happened to a run: checkpoints, replay."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.cli.app import CHECK, TRAIN, app, examples
from palate.cli.options import Fresh, Overrides, Ranks, RecipeName, Run, WordsOption, recipe_file
from palate.cli.phases import shown
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.own_files import foreign_files
from palate.runtime.progress import printable, say
from palate.runtime.runlock import OWNER, owned

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
    from palate.train import steer as change

    change(run, *(None if words is None else list(words) for words in (positive, negative)))
    print(f"{printable(str(run))}: the next step takes the words; if the reward refuses them, metrics.jsonl says so")


@app.command(
    rich_help_panel=CHECK, epilog=examples("palate checkpoints runs/mine", "palate checkpoints runs/mine --prune")
)
def checkpoints(
    run: Run,
    prune: Annotated[bool, typer.Option("--prune", help="Delete all but the newest and the guard's best.")] = False,
    keep: Annotated[int, typer.Option(min=1, help="With --prune: how many of the newest good ones stay.")] = 1,
) -> None:
    """List the checkpoints of a run and verify every byte."""
    from palate.runtime import checkpoint

    folder = run / "checkpoints"
    found = checkpoint.steps(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint")
    damaged = 0
    for step in found:
        path = folder / checkpoint.name(step)
        problem = checkpoint.verify(path)
        damaged += problem is not None
        size = sum(part.stat().st_size for part in path.iterdir()) / 2**20
        print(f"{path.name}  {size:8.1f} MiB  {printable(problem) if problem else 'ok'}")
    if prune:
        _prune(run, keep)
    elif damaged:
        raise CheckpointError(f"{damaged} of {len(found)} checkpoints are damaged; resuming passes them over")


@app.command(rich_help_panel=CHECK, epilog=examples("palate replay runs/mine/failures/step-000012"))
def replay(
    bundle: Annotated[Path, typer.Argument(help="What a run left: runs/NAME/failures/step-NNNNNN.")],
) -> None:
    """Repeat a step that was not finite and find the cause.

    Prints where the first value that is not finite arises. Exit code 1 where the step no longer fails.
    """
    import torch

    from palate import recipe as recipes
    from palate.runtime import checkpoint
    from palate.train import replay as replay_bundle

    if (bundle / "recipe.yaml").is_file():
        left = sorted(path for path in (bundle / "failures").glob("step-*"))
        told = f"give one of its failures, for example {left[-1]}" if left else "it has left no failures to replay"
        raise InputError(f"{bundle} is a run; {told}")
    saved = checkpoint.load(bundle)
    if not saved.state.get("recipe"):
        raise InputError(f"{bundle} is of a run that Python started, without a recipe; use palate.train.replay there")
    read = recipes.parse(saved.state["recipe"])
    torch.manual_seed(read.trainer.seed)
    model, algorithm = recipes.build_model(read), recipes.build_algorithm(read)
    recipes.load_consistency(read, model)
    found = replay_bundle(bundle, model, algorithm, recipes.build_reward(read.reward))
    print(printable(found.text()))
    if not found.reproduced:
        raise typer.Exit(1)


def _prune(run: Path, keep: int) -> None:
    """Delete checkpoints: the newest `keep` good ones stay, the guard's best, and all newer than these."""
    from palate.report.curves import read_metrics
    from palate.runtime import checkpoint

    folder = run / "checkpoints"
    steps = checkpoint.steps(folder)
    good = [step for step in steps if checkpoint.verify(folder / checkpoint.name(step)) is None]
    if not good:
        raise CheckpointError(f"all {len(steps)} checkpoints of {run} are damaged; nothing is deleted")
    guard = [row["best_step"] for row in read_metrics(run) if row.get("best_step") is not None]
    first = good[-keep:][0]
    checkpoint.prune(folder, keep=sum(step >= first for step in steps), also={int(guard[-1])} if guard else set())
    left = checkpoint.steps(folder)
    print(f"deleted {len(steps) - len(left)} of {len(steps)}; left: {', '.join(map(str, left))}")


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


def check_room(folder: Path, fresh: bool) -> None:
    """InputError where the folder holds a run that nobody asked to replace."""
    if fresh:
        check_removable(folder)
    elif (folder / "metrics.jsonl").exists():
        raise InputError(
            f"{folder} already holds a run: continue it with `palate resume {folder}`, choose another run.folder, "
            "or replace it with --fresh"
        )
    elif (folder / "queries.jsonl").exists():
        raise InputError(
            f"{folder} holds the queries of a black-box objective, by palate optimize; choose another run.folder, or "
            "replace it, scores included, with --fresh"
        )


def _go(
    recipe: Recipe, on_main: Callable[[Callable[[], Any]], Any], *, resume: bool, fresh: bool = False, quiet: bool
) -> None:
    from palate.runtime.checkpoint import check_space

    folder = Path(recipe.run.folder)
    with contextlib.ExitStack() as held:
        on_main(lambda: held.enter_context(owned(folder)))
        on_main(lambda: check_space(folder, need=1 << 20))
        outcome = _trained(recipe, on_main, resume=resume, fresh=fresh, quiet=quiet)
    if outcome.exit_code:
        on_main(lambda: say(f"continue with: palate resume {folder}"))
        raise typer.Exit(outcome.exit_code)
    on_main(lambda: say(f"{outcome.reason} at step {outcome.step}: {folder}"))


def _trained(
    recipe: Recipe, on_main: Callable[[Callable[[], Any]], Any], *, resume: bool, fresh: bool, quiet: bool
) -> Outcome:
    import torch

    from palate import recipe as recipes
    from palate.train import Job, run_job

    folder = Path(recipe.run.folder)
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
        identity=recipes.fingerprint(recipe),
        recipe=recipes.dump(recipe),
    )
    return run_job(job, resume=resume, progress=not quiet)


def remove_run(folder: Path) -> None:
    """Delete an earlier run, as its owner; refuses a folder that is not one, whatever the recipe says."""
    check_removable(folder)
    if folder.exists():
        with owned(folder):
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != OWNER:
                    path.unlink()


def check_removable(folder: Path) -> None:
    """InputError where the folder holds anything that no run wrote."""
    if not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"run.folder: {folder} is not an ordinary folder")
    if keys := sorted(path.name for path in folder.glob("compare*-key.json")):
        raise InputError(
            f"run.folder: {folder} holds {keys[0]}, without which the choices of its blind study cannot "
            "be read; move it elsewhere, or delete it, and then replace the run with --fresh"
        )
    if foreign := foreign_files(folder):
        raise InputError(f"run.folder: {folder} also holds {foreign[0]}, which no run wrote; --fresh leaves it alone")

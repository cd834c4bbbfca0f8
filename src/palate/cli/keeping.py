"""Commands about what a run kept: checkpoints, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palate.cli.app import CHECK, app, examples
from palate.cli.options import Run
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.progress import printable
from palate.runtime.runlock import require_free


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
    require_free(run, "its checkpoints stay as they are")
    steps = checkpoint.steps(folder)
    good = [step for step in steps if checkpoint.verify(folder / checkpoint.name(step)) is None]
    if not good:
        raise CheckpointError(f"all {len(steps)} checkpoints of {run} are damaged; nothing is deleted")
    guard = [row["best_step"] for row in read_metrics(run) if row.get("best_step") is not None]
    first = good[-keep:][0]
    checkpoint.prune(folder, keep=sum(step >= first for step in steps), also={int(guard[-1])} if guard else set())
    left = checkpoint.steps(folder)
    print(f"deleted {len(steps) - len(left)} of {len(steps)}; left: {', '.join(map(str, left))}")

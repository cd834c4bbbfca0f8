"""Commands about what a run kept: checkpoints, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palate.cli.app import CHECK, app, examples
from palate.cli.options import Run
from palate.runtime.errors import CheckpointError, InputError


@app.command(
    rich_help_panel=CHECK, epilog=examples("palate checkpoints runs/mine", "palate checkpoints runs/mine --prune")
)
def checkpoints(
    run: Run,
    prune: Annotated[bool, typer.Option("--prune", help="Delete all but the newest and the guard's best.")] = False,
    keep: Annotated[int, typer.Option(min=1, help="With --prune: how many of the newest good ones stay.")] = 1,
) -> None:
    """List the checkpoints of a run and verify every byte."""
    from palate.cli import verifying

    there, damaged = verifying.verify(run)
    if prune:
        verifying.prune(run, keep)
    elif damaged:
        raise CheckpointError(f"{damaged} of {there} checkpoints are damaged; resuming passes them over")


@app.command(rich_help_panel=CHECK, epilog=examples("palate replay runs/mine/failures/step-000012"))
def replay(
    bundle: Annotated[Path, typer.Argument(help="What a run left: runs/NAME/failures/step-NNNNNN.")],
) -> None:
    """Repeat a step that was not finite and find the cause.

    Prints where the first value that is not finite arises. Exit code 1 where the step no longer fails.
    """
    if (bundle / "recipe.yaml").is_file():
        left = sorted(path for path in (bundle / "failures").glob("step-*"))
        remedy = f"give one of its failures, for example {left[-1]}" if left else "it has left no failures to replay"
        raise InputError(f"{bundle} is a run; {remedy}")
    from palate.cli import replaying

    replaying.replay(bundle)

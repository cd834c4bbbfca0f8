"""Commands that train: train, resume, optimize, steer, init, recipes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate.cli.app import TRAIN, app, examples
from palate.cli.options import (
    Fresh,
    Overrides,
    Ranks,
    RecipeName,
    Run,
    UnwantedWords,
    WantedWords,
    read_recipe,
    recipe_file,
)
from palate.cli.run_folder import check_room
from palate.runtime.errors import InputError
from palate.runtime.files import in_shell
from palate.runtime.progress import printable

if TYPE_CHECKING:
    from palate.recipe import Recipe


@app.command(rich_help_panel=TRAIN, epilog=examples(
    "palate train srpo-emoji trainer.steps=40",
    "palate train srpo-flux --dry-run",
    """palate train srpo-emoji run.folder=runs/mine algorithm.positive='["cartoon"]'""",
))  # fmt: skip
def train(
    ctx: typer.Context,
    recipe: RecipeName,
    overrides: Overrides = None,
    fresh: Fresh = False,
    nproc: Ranks = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, folders, what is missing and the first prompts; load nothing.")
    ] = False,
) -> None:
    """Run the training that a recipe describes."""
    read = read_recipe(recipe, overrides, to_run=not dry_run)
    if read.optimize is not None:
        raise InputError("optimize: this recipe queries a black-box objective; use `palate optimize`")
    if dry_run:
        from palate.cli.dry_run import dry_run_of

        dry_run_of(read, gpus=nproc, fresh=fresh)
        return
    _run(read, nproc, resume=False, fresh=fresh, quiet=ctx.obj["quiet"])


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
    recipe_file(run)
    from palate.cli.resume import read_resumed

    _run(read_resumed(run, overrides or ()), nproc, resume=True, fresh=False, quiet=ctx.obj["quiet"])


@app.command(rich_help_panel=TRAIN, epilog=examples(
    "palate optimize optimize-emoji",
    "palate optimize optimize-emoji optimize.oracle='{function: my_score:score}' optimize.budget=500",
))  # fmt: skip
def optimize(ctx: typer.Context, recipe: RecipeName, overrides: Overrides = None, fresh: Fresh = False) -> None:
    """Train towards a score that can only be queried.

    The same command continues what was interrupted; scores that were paid for are never queried again.
    """
    read = read_recipe(recipe, overrides, to_run=True)
    if read.optimize is None:
        raise InputError("optimize: this recipe has no such section; use `palate train`, or give optimize.oracle.name")
    from palate.cli.optimize import optimize_recipe

    optimize_recipe(read, fresh=fresh, quiet=ctx.obj["quiet"])


@app.command(rich_help_panel=TRAIN, epilog=examples(
    'palate steer runs/mine --positive "outline"',
    'palate steer runs/mine --positive 3d --negative "flat, cartoon"',
))  # fmt: skip
def steer(run: Run, positive: WantedWords = None, negative: UnwantedWords = None) -> None:
    """Change the control words of a run while it trains."""
    from palate.cli.steer import steer_and_wait

    steer_and_wait(run, positive, negative)


@app.command(rich_help_panel=TRAIN, epilog=examples(
    "palate init                              asks for what is not given",
    "palate init --model flux2 --card rtx-4090 --words 'film photo' --without 'CG render' --out mine.yaml",
    "palate init --model sdxl --method sqdf --reward pickscore --prompts my_prompts.txt --card 24",
))  # fmt: skip
def init(
    model: Annotated[str | None, typer.Option(help="The model's family, for example emoji, flux2, sdxl.")] = None,
    method: Annotated[str | None, typer.Option(help="For example srpo, sqdf, distar; srpo if left out.")] = None,
    card: Annotated[str | None, typer.Option(help="A GPU, as rtx-4090, or its GiB; this machine if left out.")] = None,
    words: WantedWords = None,
    without: UnwantedWords = None,
    reward: Annotated[str | None, typer.Option(help="The reward to maximise, for example hpsv2.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", "--prompts-file", help="What to train on: a file of prompts, or the package's: real."
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to train on; may be given several times.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; METHOD-MODEL.yaml if left out.")] = None,
) -> None:
    """Write a commented recipe from a few answers."""
    from palate.cli.init import Answers, write_recipe

    if prompts and prompt:
        raise InputError("--prompts, --prompt: give a file or single prompts, not both")
    answers = Answers(
        model, method, card, tuple(words or ()), tuple(without or ()), reward, prompts, tuple(prompt or ())
    )
    path = write_recipe(answers, out)
    print(f"{printable(str(path))}: look at it, then palate train {printable(in_shell(path))} --dry-run")


@app.command(rich_help_panel=TRAIN, epilog=examples(
    "palate recipes",
    "palate recipes srpo-emoji > mine.yaml    a recipe of your own to edit",
))  # fmt: skip
def recipes(
    show: Annotated[str | None, typer.Argument(help="Print this recipe instead of the list.")] = None,
    words: Annotated[bool, typer.Option("--words", help="List the words that the embedded model knows.")] = False,
) -> None:
    """List the published recipes, or print one."""
    if words:
        from palate.models.vocabulary import vocabulary

        vocab = vocabulary()
        sides = ("to the left of", "to the right of", *vocab.relations) if vocab.relations else ()
        kinds: dict[str, Collection[str]] = {
            "styles": vocab.styles, "colours": vocab.colours, "colours of things": vocab.paints, "sizes": vocab.sizes,
            "positions": vocab.positions, "one thing from another": sides, "numbers": vocab.counts,
            "concepts": vocab.concepts,
        }  # fmt: skip
        for kind, listed in kinds.items():
            if listed:
                print(f"{kind}: {', '.join(listed)}")
        print("synonyms: " + ", ".join(f"{word} = {known}" for word, known in vocab.synonyms.items()))
        return
    from palate.recipe import published, text_of

    if show is not None:
        print(text_of(show), end="")
        return
    known = published()
    width = max(map(len, known))
    titles = {
        True: "On the embedded model, nothing to download:",
        False: "On other models (palate doctor RECIPE lists the weights that one needs):",
    }
    for embedded, title in titles.items():
        print(title)
        for name, summary in known.items():
            if ("emoji" in name.split("-")) == embedded:
                print(f"  {name:{width}}  {summary}")


def _run(recipe: Recipe, nproc: int, *, resume: bool, fresh: bool, quiet: bool) -> None:
    from palate.cli.ranks import ranks

    with ranks(nproc, recipe) as on_main:
        if not resume:
            on_main(lambda: check_room(Path(recipe.run.folder), fresh))
        from palate.cli.train import train_recipe

        train_recipe(recipe, on_main, resume=resume, fresh=fresh, quiet=quiet)

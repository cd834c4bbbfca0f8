"""Commands that look at runs: sample, evaluate, compare, report, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palate.cli.app import LOOK, app, examples
from palate.cli.evaluate_options import EvaluateOptions
from palate.cli.options import (
    MAX_SEEDS,
    Json,
    Run,
    Seeds,
    Size,
    StrengthsOption,
    all_prompts,
    belongs,
    finite,
    new_place,
    page_file,
    recipe_file,
    run_names,
)
from palate.cli.phases import show_phases
from palate.runtime.errors import InputError
from palate.runtime.progress import counted, printable


@app.command(rich_help_panel=LOOK, epilog=examples(
    'palate sample runs/mine --prompt "a fox on a blue background" --seeds 0-7 --out fox',
    'palate sample runs/mine --prompt "a fox" --strength 0,0.5,1    how much of its LoRA',
    'palate sample --model emoji-1step --prompt "a 3d dog"    the shipped one-step generator',
))  # fmt: skip
def sample(
    ctx: typer.Context,
    run: Annotated[Path | None, typer.Argument(help="A run to sample from; or use --model.")] = None,
    model: Annotated[str | None, typer.Option(help="emoji, a run, a generator, a diffusers folder or hub id.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts_file: Annotated[str | None, typer.Option(help="A text file, one prompt per line.")] = None,
    seeds: Annotated[Seeds, typer.Option(parser=Seeds, metavar="SEEDS", help="For example 0-15 or 1,5,9.")] = "0-3",  # type: ignore[assignment]
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; else the run's, or the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, callback=finite, help="Guidance scale, 1 = off.")] = None,
    size: Annotated[
        Size | None, typer.Option(parser=Size, metavar="PIXELS", help="A side, or height,width; else the run's.")
    ] = None,
    strength: StrengthsOption = None,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("samples"),
) -> None:
    """Draw pictures with a run or a model.

    Writes single PNGs, index.jsonl, grid.png (a row per prompt, a column per seed or strength) and index.html.
    """
    prompts = all_prompts(prompt, prompts_file)
    new_place("--out", out)
    if (run is None) == (model is None):
        raise InputError("give either a run folder or --model, for example --model emoji")
    with show_phases(ctx.obj["quiet"]):
        from palate.cli.sample import Wanted, draw

        source = model if model is not None else str(run)
        count = draw(source, prompts, seeds, Wanted(steps, guidance, size, strength), out)
    print(f"{counted(count, 'image')} in {printable(str(out))}, all together in {printable(str(out / 'grid.png'))}")


@app.command(rich_help_panel=LOOK, epilog=examples(
    "palate evaluate runs/mine",
    "palate evaluate runs/a runs/b runs/c --json > found.json    paired by prompt and seed",
    "palate evaluate runs/mine --protocol hpdv2                  as papers report",
    "palate evaluate runs/mine --strength 0.5,1,1.5              how much of its LoRA",
    "palate evaluate runs/mine --questions geneval2_data.jsonl --judge http://127.0.0.1:8000/v1/chat/completions#M",
))  # fmt: skip
def evaluate(
    ctx: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(
            help="One or more runs, paired by prompt and seed; then evaluate.*=, sample.*=, reward.source.*=."
        ),
    ],
    prompts_file: Annotated[str | None, typer.Option(help="One prompt per line; else the recipe's.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Prompts to use at most.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=MAX_SEEDS, help="Images per prompt.")] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Judge the images of the last evaluation.")] = False,
    out: Annotated[Path | None, typer.Option(help="The page; else evaluation.html in the first run.")] = None,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Measure things, numbers, colours and places instead.")
    ] = False,
    questions: Annotated[
        str | None, typer.Option(help="A benchmark's file of questions, which a vision-language model answers.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="With --questions: its URL#MODEL (chat completions).")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Prompts of drawbench, hpdv2 or parti, and every fetched reward.")
    ] = None,
    strength: StrengthsOption = None,
    as_json: Json = False,
) -> None:
    """Measure a run against its base model.

    Both draw the same prompts from the same noise: rewards, right concepts, diversity and drift, with intervals, and
    one page with the pictures.
    """
    overrides = [word for word in runs if "=" in word and not Path(word).is_dir()]
    folders = [Path(word) for word in runs if word not in overrides]
    if not folders:
        raise InputError("give at least one run, for example runs/mine")
    page_file("--out", out)
    for run in folders:
        recipe_file(run)
    from palate.cli.evaluate import evaluate_and_print

    evaluate_and_print(folders, EvaluateOptions(
        prompts_file=prompts_file, count=count, seeds=seeds, stored=stored, overrides=overrides, tasks=tasks,
        questions=questions, judge=judge, protocol=protocol, out=out, as_json=as_json,
        strengths=strength, quiet=ctx.obj["quiet"],
    ))  # fmt: skip


@app.command(
    rich_help_panel=LOOK,
    epilog=examples(
        "palate compare runs/a runs/b              side by side, the same prompts and seeds",
        "palate compare runs/a runs/b --blind      a page on which people choose without names",
        "palate compare runs/s0 runs/s1 runs/s2 --group seed --format latex",
    ),
)
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Two or more runs.", autocompletion=run_names)] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Write an anonymised comparison page; its answer key is a separate file.")
    ] = False,
    count: Annotated[int | None, typer.Option(min=1, help="With --blind: pairs to show at most, else 40.")] = None,
    seed: Annotated[int | None, typer.Option(help="With --blind: fixes order and sides, else secret.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --blind: the page, else RUN/compare-blind.html.")] = None,
    score: Annotated[list[Path] | None, typer.Option(help="Choices made on the page (JSONL); repeatable.")] = None,
    key: Annotated[Path | None, typer.Option(help="With --score: the page's key, where it is not found.")] = None,
    group: Annotated[
        str | None, typer.Option(help="With --format: mean ± sd over runs that differ in this key.")
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help="Print markdown, latex, csv or json instead.")] = None,
) -> None:
    """Show runs side by side, or let people choose blindly."""
    for option, value in (("--count", count), ("--seed", seed), ("--out", out)):
        belongs(option, value is not None, "--blind", blind)
    page_file("--out", out)
    belongs("--key", key is not None, "--score", bool(score))
    belongs("--group", group is not None, "--format", form is not None)
    if blind + bool(score) + bool(form) > 1:
        raise InputError("--blind writes a page, --score reads its choices, --format prints a table; give one of them")
    chosen = list(runs or ())
    for run in () if score else chosen:
        recipe_file(run)
    if form is not None and not chosen:
        raise InputError("--format: give the runs to compare")
    if not score and form is None and len(chosen) < 2:
        raise InputError("give two runs: palate compare runs/a runs/b; or --score with the choices of a blind study")
    from palate.cli import compare as comparison

    if score:
        comparison.print_score(score, key, chosen[0] if chosen else None)
    elif form is not None:
        comparison.print_table(chosen, form, group)
    elif blind:
        comparison.write_blind_study(chosen, out, count or 40, seed)
    else:
        comparison.write_side_by_side(chosen)


@app.command(
    rich_help_panel=LOOK,
    epilog=examples("palate runs", "palate runs --json | jq '.[] | select(.state == \"stopped\")'"),
)
def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs: state, step, words, headline, size."""
    from palate.cli.runs import print_runs

    print_runs(folder, as_json)


@app.command(rich_help_panel=LOOK, epilog=examples("palate report runs/mine"))
def report(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="The page to write; RUN/report.html if left out.")] = None,
) -> None:
    """Write a run's page: pictures, curves, numbers in one file."""
    recipe_file(run)
    page_file("--out", out)
    from palate.report import write_report

    print(f"report: {printable(str(write_report(run, out=out)))}")

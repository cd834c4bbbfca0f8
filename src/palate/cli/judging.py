"""Commands that look at a run: sample, evaluate, compare, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate.cli.app import LOOK, app, examples
from palate.cli.options import Json, Run, Seeds, belongs, recipe_file
from palate.runtime.errors import InputError
from palate.runtime.progress import printable

if TYPE_CHECKING:
    from palate.core import Model
    from palate.evaluate import Sampler


@app.command(rich_help_panel=LOOK, epilog=examples(
    'palate sample runs/mine --prompt "a fox on a blue background" --seeds 0-7 --out fox',
    'palate sample --model emoji-1step --prompt "a 3d dog"    the shipped one-step generator',
))  # fmt: skip
def sample(
    run: Annotated[Path | None, typer.Argument(help="A run to sample from; or use --model.")] = None,
    model: Annotated[str | None, typer.Option(help="A model by name (emoji), a run, or an exported generator.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts_file: Annotated[str | None, typer.Option(help="A text file, one prompt per line.")] = None,
    seeds: Annotated[Seeds, typer.Option(parser=Seeds, metavar="SEEDS", help="For example 0-15 or 1,5,9.")] = "0-3",  # type: ignore[assignment]
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; else the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Classifier-free scale, 1 = off.")] = None,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("samples"),
) -> None:
    """Draw pictures with a run or a model.

    Writes single PNGs, index.jsonl, grid.png (a row per prompt, a column per seed) and index.html.
    """
    prompts = _prompts(prompt, prompts_file)
    if (run is None) == (model is None):
        raise InputError("give either a run folder or --model, for example --model emoji")
    loaded, sampler = load_source(model if model is not None else str(run))

    from palate.evaluate import generate, pairs, write_samples
    from palate.report.sheet import write_sheet

    if sampler and (steps is not None or guidance is not None):
        raise InputError("--steps, --guidance: a generator draws as it was trained; leave them out")
    steps = sampler.steps if sampler else steps or loaded.default_steps
    guidance = 1.0 if sampler else loaded.default_guidance if guidance is None else guidance
    images = generate(loaded, prompts, seeds, steps=steps, guidance=guidance, sampler=sampler)
    told, rows = pairs(prompts, seeds)
    write_samples(out, images, told, rows, guidance=guidance, steps=steps)
    write_sheet(out)
    print(f"{len(images)} images in {printable(str(out))}, all together in {printable(str(out / 'grid.png'))}")


def _prompts(prompt: list[str] | None, prompts_file: str | None) -> list[str]:
    from palate.data import read_prompts

    prompts = list(prompt or ())
    if any(not text.strip() for text in prompts):
        raise InputError("--prompt: got an empty prompt")
    if prompts_file:
        prompts += read_prompts(prompts_file)
    if not prompts:
        raise InputError("no prompt: give --prompt or --prompts-file")
    return prompts


@app.command(rich_help_panel=LOOK, epilog=examples(
    "palate evaluate runs/mine",
    "palate evaluate runs/a runs/b runs/c --json > found.json    paired by prompt and seed",
))  # fmt: skip
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="One or more runs; several are paired by prompt and seed.")],
    prompts_file: Annotated[str | None, typer.Option(help="One prompt per line; else the recipe's.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Prompts to use at most.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Images per prompt.")] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Judge the images of the last evaluation.")] = False,
    out: Annotated[Path | None, typer.Option(help="The page; else evaluation.html in the first run.")] = None,
    as_json: Json = False,
) -> None:
    """Measure base model and result on the same noise.

    Rewards, right concepts, diversity, drift, all with intervals; one page with the pictures.
    """
    from palate.data import read_prompts

    if stored and (prompts_file or count or seeds):
        raise InputError("--stored judges the images that are there; leave out --prompts-file, --count and --seeds")
    for run in runs:
        recipe_file(run)
    prompts = read_prompts(prompts_file) if prompts_file else None

    from palate.cli.text import print_evaluation
    from palate.evaluate import to_json
    from palate.report import write_evaluation
    from palate.runs import evaluate_runs

    numbers = None if seeds is None else range(seeds)
    found = evaluate_runs(runs, prompts=prompts, count=count, seeds=numbers, stored=stored, load=load_run, warn=_warn)
    page = write_evaluation(runs, found, out)
    if as_json:
        print(to_json(found), end="")
        return
    for name, evaluation in found["runs"].items():
        print_evaluation(name, evaluation)
    print(f"report: {printable(str(page))}")


@app.command(rich_help_panel=LOOK, epilog=examples(
    "palate compare runs/a runs/b              side by side, the same prompts and seeds",
    "palate compare runs/a runs/b --blind      a page on which people choose without names",
))  # fmt: skip
def compare(
    run_a: Annotated[Path | None, typer.Argument(help="The folder of a run, for example runs/NAME.")] = None,
    run_b: Annotated[Path | None, typer.Argument(help="Another, on the same prompts and seeds.")] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Write an anonymised comparison page; its answer key is a separate file.")
    ] = False,
    count: Annotated[int | None, typer.Option(min=1, help="With --blind: pairs to show at most, else 40.")] = None,
    seed: Annotated[int | None, typer.Option(help="With --blind: fixes order and sides, else secret.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --blind: the page, else RUN_A/compare-blind.html.")] = None,
    score: Annotated[list[Path] | None, typer.Option(help="Choices made on the page (JSONL); repeatable.")] = None,
    key: Annotated[Path | None, typer.Option(help="With --score: the page's key, where it is not found.")] = None,
) -> None:
    """Show runs side by side, or let people choose blindly."""
    from palate.report import study

    for option, value in (("--count", count), ("--seed", seed), ("--out", out)):
        belongs(option, value is not None, "--blind", blind)
    belongs("--key", key is not None, "--score", bool(score))
    if blind and score:
        raise InputError("--blind writes a page, --score reads its choices; give one of them")
    if score:
        result = study.score(study.read_choices(score), study.find_key(score, key, run_a))
        print(printable(study.text_of(result)))
        return
    if run_a is None or run_b is None:
        raise InputError("give two runs: palate compare runs/a runs/b; or --score with the choices of a blind study")
    for run in (run_a, run_b):
        recipe_file(run)
    if blind:
        page, secret = study.write_study(run_a, run_b, page=out, count=count or 40, seed=seed)
        print(f"page: {printable(str(page))}")
        print(f"key:  {printable(str(secret))} (keep it; whoever chooses must not see it)")
        return
    from palate.report import write_report

    print(f"side by side: {printable(str(write_report(run_a, compare=(run_b,))))}")


@app.command(rich_help_panel=LOOK, epilog=examples("palate report runs/mine"))
def report(run: Run) -> None:
    """Write a run's page: pictures, curves, numbers in one file."""
    recipe_file(run)
    from palate.report import write_report

    print(f"report: {printable(str(write_report(run)))}")


# ----------------------------------------------------------------------------------------------------- parts


def load_source(source: str) -> tuple[Model, Sampler | None]:
    """What `--model` or a run folder names: the embedded base model, an exported generator, or a run's result."""
    if source == "emoji" and not Path(source).is_dir():
        return base_model(), None
    from palate.export import load_one_step, one_step_folder

    exported = one_step_folder(source)
    return load_one_step(exported) if exported else load_run(Path(source))


def base_model() -> Model:
    """The embedded model, untrained."""
    from palate.models.emoji import EmojiModel

    return EmojiModel.load(training="none")


def load_run(run: Path) -> tuple[Model, Sampler | None]:
    """The result of a run; InputError where the folder is none."""
    from palate.runs import trained_model

    return trained_model(recipe_file(run).parent, warn=_warn)


def _warn(text: str) -> None:
    import logging

    logging.getLogger("palate").warning("%s", text)

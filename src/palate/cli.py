"""The `palate` command. Everything heavy is imported inside the commands, so that --help answers at once.

Exit codes: 0 ok, 1 a replayed step that no longer fails, 2 bad input, 3 losses not finite, 4 checkpoint or disk,
5 reward service or oracle, 6 out of memory, 7 another rank is lost, 130 and 143 signals.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.runtime.errors import CheckpointError, InputError, PalateError, PeerAbortedError
from palate.runtime.progress import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from palate.core import Model
    from palate.evaluate import Sampler
    from palate.recipe import Recipe

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Align text-to-image models with a preference. Begin with: palate train srpo-emoji",
)
MAX_LINES = 12  # of an error message

Run = Annotated[Path, typer.Argument(help="The folder of a run, as runs/NAME.")]
Ranks = Annotated[
    int, typer.Option("--nproc", min=1, help="Ranks on this machine, one for each GPU; see docs/distributed.md.")
]
Words = Annotated[str | None, typer.Option(help='Words separated by commas, as "3d, glossy".')]


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A published recipe (see `palate recipes`) or the path of a YAML file.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as trainer.steps=40")] = None,
    fresh: Annotated[bool, typer.Option(help="Replace a run that is already in run.folder.")] = False,
    nproc: Ranks = 1,
) -> None:
    """Train as a recipe says."""
    from palate import recipe as recipes

    plan = recipes.read(recipe, overrides or ())
    if plan.optimize is not None:
        raise InputError("optimize: this recipe asks an oracle; use `palate optimize`")
    with _ranks(nproc, plan) as on_first:
        on_first(lambda: _check_room(Path(plan.run.folder), fresh))
        _go(plan, on_first, resume=False, fresh=fresh)


@app.command()
def resume(
    run: Run,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Only the length, previews and checkpoints may change: trainer.steps=200")
    ] = None,
    nproc: Ranks = 1,
) -> None:
    """Continue a run from its newest good checkpoint, as if it had never stopped."""
    from palate import recipe as recipes
    from palate.runtime import checkpoint

    file = _recipe_file(run)
    started = recipes.read(str(file))
    if started.optimize is not None:
        raise InputError(f"{run} asks an oracle; continue it with `palate optimize {file}`")
    plan = recipes.read(str(file), [*(overrides or ()), f"run.folder={_quoted(run)}"])
    if recipes.fingerprint(started) != recipes.fingerprint(plan):
        raise InputError(
            "these overrides would change the run itself; when resuming, only trainer.steps, previews, checkpoints, "
            "threads, sample and evaluate may change. Start a new run for the rest"
        )
    if not checkpoint.steps(run / "checkpoints"):
        raise checkpoint.CheckpointError(f"{run / 'checkpoints'} holds no checkpoint; start the run again with --fresh")
    with _ranks(nproc, plan) as on_first:
        _go(plan, on_first, resume=True)


@app.command()
def optimize(
    recipe: Annotated[str, typer.Argument(help="A recipe with an optimize section, as optimize-emoji.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as optimize.budget=500")] = None,
    fresh: Annotated[bool, typer.Option(help="Replace what is already in run.folder, the answers included.")] = False,
) -> None:
    """Train towards an oracle that can only be asked; the same command continues what was interrupted."""
    from palate import recipe as recipes

    plan = recipes.read(recipe, overrides or ())
    if plan.optimize is None:
        raise InputError("optimize: this recipe has no such section; use `palate train`, or give optimize.oracle.name")
    if fresh:
        recipes.prompts_of(plan)  # a missing file must not cost the old answers
        _remove_run(Path(plan.run.folder))
    from palate.optimize import from_recipe

    outcome = from_recipe(plan, say=lambda text: print(printable(text), flush=True))
    if outcome.exit_code:
        print("continue with the same command")
        raise typer.Exit(outcome.exit_code)
    print(f"finished after {outcome.step} questions: {printable(plan.run.folder)}")


@app.command()
def steer(run: Run, positive: Words = None, negative: Words = None) -> None:
    """Change the control words of a run while it goes on."""
    from palate.train import steer as change

    change(run, *(None if words is None else _split(words) for words in (positive, negative)))
    print(f"{printable(str(run))}: its next step takes up the words; if the reward refuses them, metrics.jsonl says so")


@app.command()
def sample(
    run: Annotated[Path | None, typer.Argument(help="A run to sample from; or use --model.")] = None,
    model: Annotated[str | None, typer.Option(help="A model by name (emoji), a run, or an exported generator.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    prompts_file: Annotated[str | None, typer.Option(help="One prompt a line.")] = None,
    seeds: Annotated[str, typer.Option(help="As 0-15 or 1,5,9.")] = "0-3",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps; the model's own default if left out.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="Classifier-free scale, 1 = off.")] = None,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("samples"),
) -> None:
    """Draw images: single PNGs, index.jsonl and a grid (a row a prompt, a column a seed)."""
    from palate.recipe import read_prompts

    numbers = _numbers(seeds)
    prompts = list(prompt or ())
    if any(not text.strip() for text in prompts):
        raise InputError("--prompt: got an empty prompt")
    if prompts_file:
        prompts += read_prompts(prompts_file)
    if not prompts:
        raise InputError("no prompt: give --prompt or --prompts-file")
    if (run is None) == (model is None):
        raise InputError("give either a run folder or --model, as --model emoji")
    source = model if model is not None else str(run)
    plain = source == "emoji" and not Path(source).is_dir()
    if plain:
        loaded, sampler = _base_model(), None
    else:
        from palate.export import load_one_step, one_step_folder

        exported = one_step_folder(source)
        loaded, sampler = load_one_step(exported) if exported else _trained_model(Path(source))

    from palate.evaluate import generate, pairs
    from palate.runs import write_samples

    if sampler and (steps is not None or guidance is not None):
        raise InputError("--steps, --guidance: a generator draws as it was trained; leave them out")
    steps = sampler.steps if sampler else steps or loaded.default_steps
    guidance = 1.0 if sampler else loaded.default_guidance if guidance is None else guidance
    images = generate(loaded, prompts, numbers, steps=steps, guidance=guidance, sampler=sampler)
    words, rows = pairs(prompts, numbers)
    write_samples(out, images, words, rows, guidance=guidance, steps=steps)
    _grid(images, len(numbers)).save(out / "grid.png")
    print(f"{len(images)} images in {printable(str(out))}, all together in {printable(str(out / 'grid.png'))}")


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="One or more runs; several are paired by prompt and seed.")],
    prompts_file: Annotated[str | None, typer.Option(help="One prompt a line; the recipe's if left out.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Prompts to use at most.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Images a prompt.")] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Judge the images of the last evaluation.")] = False,
    out: Annotated[Path | None, typer.Option(help="The page; evaluation.html in the first run if left out.")] = None,
) -> None:
    """Base model against each run's result: same prompts, same seeds, rewards, concepts, diversity, drift; one page."""
    from palate.data import read_prompts

    if stored and (prompts_file or count or seeds):
        raise InputError("--stored judges the images that are there; leave out --prompts-file, --count and --seeds")
    for run in runs:
        _recipe_file(run)
    prompts = read_prompts(prompts_file) if prompts_file else None

    from palate.report import write_evaluation
    from palate.runs import evaluate_runs

    numbers = None if seeds is None else range(seeds)
    found = evaluate_runs(
        runs, prompts=prompts, count=count, seeds=numbers, stored=stored, load=_trained_model, warn=_warn
    )
    for name, evaluation in found["runs"].items():
        _print_evaluation(name, evaluation)
    print(f"report: {printable(str(write_evaluation(runs, found, out)))}")


@app.command()
def compare(
    run_a: Annotated[Path | None, typer.Argument(help="The folder of a run, as runs/NAME.")] = None,
    run_b: Annotated[Path | None, typer.Argument(help="Another, on the same prompts and seeds.")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="A page to choose on, without names; the key apart.")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="With --blind: pairs to show at most, else 40.")] = None,
    seed: Annotated[int | None, typer.Option(help="With --blind: fixes order and sides, else secret.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --blind: the page, else RUN_A/compare-blind.html.")] = None,
    score: Annotated[list[Path] | None, typer.Option(help="Choices made on the page (JSONL); repeatable.")] = None,
    key: Annotated[Path | None, typer.Option(help="With --score: the page's key, where it is not found.")] = None,
) -> None:
    """Two runs side by side on the same prompts and seeds; or a blind study of them, and its result."""
    from palate.report import study

    given = {"--blind": blind, "--score": bool(score)}
    needs = {
        "--count": (count is not None, "--blind"),
        "--seed": (seed is not None, "--blind"),
        "--out": (out is not None, "--blind"),
        "--key": (key is not None, "--score"),
    }
    for option, (used, other) in needs.items():
        if used and not given[other]:
            raise InputError(f"{option} belongs to {other}; give both, or neither")
    if blind and score:
        raise InputError("--blind writes a page, --score reads its choices; give one of them")
    if score:
        result = study.score(study.read_choices(score), study.find_key(score, key, run_a))
        print(printable(study.text_of(result)))
        return
    if run_a is None or run_b is None:
        raise InputError("give two runs, as palate compare runs/a runs/b; or --score with the choices of a blind study")
    for run in (run_a, run_b):
        _recipe_file(run)
    if blind:
        page, secret = study.write_study(run_a, run_b, page=out, count=count or 40, seed=seed)
        print(f"page: {printable(str(page))}")
        print(f"key:  {printable(str(secret))} (keep it; whoever chooses must not see it)")
        return
    from palate.report import write_report

    print(f"side by side: {printable(str(write_report(run_a, compare=(run_b,))))}")


@app.command()
def report(run: Run) -> None:
    """Write the self-contained report.html of a run."""
    _recipe_file(run)
    from palate.report import write_report

    print(f"report: {printable(str(write_report(run)))}")


@app.command()
def export(
    run: Run,
    form: Annotated[
        str, typer.Option("--format", help="diffusers, kohya, comfyui, merged; one-step (DI*).")
    ] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="The folder to write to; RUN/export/FORMAT if left out.")] = None,
) -> None:
    """Write the LoRA of a run in the form that another program loads, or a generator as a whole diffusers pipeline."""
    from palate.export import export_lora, export_one_step, lora_file

    if form == "one-step":
        from palate import recipe as recipes

        plan = recipes.read(str(_recipe_file(run)))
        if plan.algorithm_name != "distar":
            raise InputError(
                f"--format one-step: {plan.algorithm_name} makes no generator; use the run of a distar recipe"
            )
        target = export_one_step(_trained_model(run)[0], plan.algorithm, out or run / "export" / form)
        print(f"pipeline: {printable(str(target))}; its README.md has the call")
        return
    if form == "merged":
        from palate.export import export_merged

        print(f"network: {printable(str(export_merged(run, _trained_model(run)[0], out)))}")
        return
    target = export_lora(run, form, out, _words_of(run)) / lora_file(run, form)
    print(f"LoRA: {printable(str(target))}")


def _words_of(run: Path) -> dict[str, str]:
    """The control words in force at the end of the run."""
    from palate import runs

    if not (run / "recipe.yaml").is_file():
        return {}
    positive, negative = runs.words_in_force(run, runs.read_recipe(run))
    return {"positive": ", ".join(positive), "negative": ", ".join(negative)}


@app.command("plan")
def plan_recipe(
    recipe: Annotated[str, typer.Argument(help="A published recipe or the path of a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as trainer.batch_size=2")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the batch.")] = 1,
    device: Annotated[str | None, typer.Option(help="For example rtx-4090 or cpu; left out: this machine.")] = None,
    utilisation: Annotated[float, typer.Option(help="The fraction of the peak that is reached.")] = 0.35,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU for one hour, to add up the cost.")] = None,
) -> None:
    """What a recipe costs: FLOPs, memory and time of an update, without loading weights."""
    from palate import plan as planner
    from palate import recipe as recipes

    read = recipes.read(recipe, overrides or ())
    made = planner.plan(read, gpus=gpus)
    print(planner.table(read, made, device=device, utilisation=utilisation, price=price))
    if not planner.can_fit(read, made, device):
        raise typer.Exit(1)


@app.command()
def doctor(
    reward: Annotated[str | None, typer.Option(help="Also load this reward and try it.")] = None,
    source: Annotated[str | None, typer.Option(help="Where its weights are, as reward.source in a recipe.")] = None,
) -> None:
    """Look at versions, devices, disk and weights, and say what to mend."""
    from palate import doctor as doctors

    found = list(doctors.findings())
    if reward is not None:
        found += doctors.check_reward(reward, source)
    for state, text in found:
        print(f"{state:5}{printable(text)}")
    if any(state == "bad" for state, _ in found):
        raise typer.Exit(2)


@app.command()
def recipes(
    show: Annotated[str | None, typer.Argument(help="Print this recipe instead of the list.")] = None,
    words: Annotated[bool, typer.Option("--words", help="List the words that the embedded model knows.")] = False,
) -> None:
    """The published recipes."""
    from palate.recipe import published, text_of

    if words:
        from palate.models.vocabulary import vocabulary

        vocab = vocabulary()
        for kind in ("styles", "colours", "sizes", "positions", "concepts"):
            print(f"{kind}: {', '.join(getattr(vocab, kind))}")
        print("synonyms: " + ", ".join(f"{word} = {known}" for word, known in vocab.synonyms.items()))
        return
    if show is not None:
        print(text_of(show), end="")
        return
    for name, summary in published().items():
        print(f"{name:24} {summary}")


@app.command()
def checkpoints(run: Run) -> None:
    """List the checkpoints of a run and verify every byte of them."""
    from palate.runtime import checkpoint

    folder = run / "checkpoints"
    found = checkpoint.steps(folder)
    if not found:
        raise checkpoint.CheckpointError(f"{folder} holds no checkpoint")
    damaged = 0
    for step in found:
        path = folder / checkpoint.name(step)
        problem = checkpoint.verify(path)
        damaged += problem is not None
        size = sum(part.stat().st_size for part in path.iterdir()) / 2**20
        print(f"{path.name}  {size:8.1f} MiB  {printable(problem) if problem else 'ok'}")
    if damaged:
        raise checkpoint.CheckpointError(
            f"{damaged} of {len(found)} checkpoints are damaged; resuming passes them over"
        )


@app.command()
def replay(
    bundle: Annotated[
        Path, typer.Argument(help="What a run left when a step was not finite: runs/NAME/failures/step-NNNNNN.")
    ],
) -> None:
    """Run a step again that was not finite, and say where the first such value arises."""
    import torch

    from palate import failure
    from palate import recipe as recipes
    from palate.runtime import checkpoint

    saved = checkpoint.load(bundle)
    if not saved.state.get("recipe"):
        raise InputError(f"{bundle} is of a run that Python started, without a recipe; use palate.failure.replay there")
    plan = recipes.parse(saved.state["recipe"])
    torch.manual_seed(plan.trainer.seed)
    model, algorithm = recipes.build_model(plan), recipes.build_algorithm(plan)
    recipes.load_consistency(plan, model)
    found = failure.replay(bundle, model, algorithm, recipes.build_reward(plan.reward))
    print(printable(found.text()))
    if not found.reproduced:
        raise typer.Exit(1)


# ----------------------------------------------------------------------------------------------------- parts


@contextlib.contextmanager
def _ranks(nproc: int, plan: Recipe) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Inside, this process is one of its run's ranks; gives what lets rank 0 alone act. Launches them if need be."""
    if "RANK" in os.environ:  # started by torchrun, by srun or by the lines below
        from palate.runtime.distributed import join

        with join(timeout_seconds=plan.run.rank_timeout_seconds) as ranks:
            yield ranks.on_first
    elif nproc > 1:
        from palate.runtime.launch import launch

        raise typer.Exit(launch([sys.executable, "-m", "palate", *sys.argv[1:]], nproc))
    else:
        yield lambda act: act()


def _check_room(folder: Path, fresh: bool) -> None:
    if fresh:
        _check_removable(folder)
    elif (folder / "metrics.jsonl").exists():
        raise InputError(
            f"{folder} already holds a run: continue it with `palate resume {folder}`, choose another run.folder, "
            "or replace it with --fresh"
        )
    elif (folder / "queries.jsonl").exists():
        raise InputError(
            f"{folder} holds the answers of an oracle, by palate optimize; choose another run.folder, or "
            "replace it, answers included, with --fresh"
        )


def _go(plan: Recipe, on_first: Callable[[Callable[[], Any]], Any], *, resume: bool, fresh: bool = False) -> None:
    import torch

    from palate import recipe as recipes
    from palate.runtime.checkpoint import check_space, write_atomically
    from palate.train import train

    folder = Path(plan.run.folder)
    on_first(lambda: check_space(folder, need=1 << 20))
    torch.manual_seed(plan.trainer.seed)  # the LoRA's first weights; nothing later draws from this generator
    parts = recipes.build(plan)
    if fresh:
        on_first(lambda: _remove_run(folder))  # only now: a recipe that cannot be built must not cost the old run
        on_first(folder.mkdir)
    on_first(lambda: write_atomically(folder / "recipe.yaml", recipes.dump(plan).encode()))
    outcome = train(
        parts.model,
        parts.algorithm,
        parts.reward,
        parts.prompts,
        folder=folder,
        **vars(plan.trainer),
        preview=parts.preview_prompts,
        sample_steps=plan.sample.steps,
        sample_guidance=plan.sample.guidance,
        latents=parts.latents,
        identity=recipes.fingerprint(plan),
        resume=resume,
        check=recipes.guard_check(plan),
    )
    if outcome.exit_code:
        on_first(lambda: print(f"continue with: palate resume {printable(str(folder))}"))
        raise typer.Exit(outcome.exit_code)
    on_first(lambda: print(f"{outcome.reason} at step {outcome.step}: {printable(str(folder))}"))


def _base_model() -> Model:
    from palate.models.emoji import EmojiModel

    return EmojiModel.load(training="none")


def _trained_model(run: Path) -> tuple[Model, Sampler | None]:
    from palate.runs import trained_model

    return trained_model(_recipe_file(run).parent, warn=_warn)


def _warn(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _recipe_file(run: Path) -> Path:
    file = run / "recipe.yaml"
    if not file.is_file():
        raise InputError(f"{run} is not a run (it holds no recipe.yaml); give the folder of one, as runs/NAME")
    return file


def _remove_run(folder: Path) -> None:
    """Delete an earlier run; refuses a folder that is not one, whatever the recipe says."""
    _check_removable(folder)
    if folder.exists():
        shutil.rmtree(folder)


def _check_removable(folder: Path) -> None:
    if not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"run.folder: {folder} is not an ordinary folder")
    ours = {"recipe.yaml", "environment.json", "metrics.jsonl", "samples", "checkpoints", "adapter", "export",
            "report.html",
            "evaluation", "evaluation.json", "evaluation.html", "evaluations.json", "control.json",
            "steering.json", "failures", "queries",
            "queries.jsonl", "rounds.jsonl"}  # fmt: skip
    parts = (".tmp-", "compare", "round-")
    if keys := sorted(path.name for path in folder.glob("compare*-key.json")):
        raise InputError(
            f"run.folder: {folder} holds {keys[0]}, without which the choices of its blind study cannot "
            "be read; move it elsewhere, or delete it, and then replace the run with --fresh"
        )
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours and not p.name.startswith(parts))
    if foreign:
        raise InputError(f"run.folder: {folder} also holds {foreign[0]}, which no run wrote; --fresh leaves it alone")


def _split(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


def _numbers(text: str) -> list[int]:
    """0-3,8 -> [0, 1, 2, 3, 8]."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            numbers += range(int(first), int(last if dash else first) + 1)
            if len(numbers) > 4096:
                raise ValueError
    except ValueError as error:
        raise InputError(f"--seeds: expected whole numbers as 0-15 or 1,5,9 (at most 4096), got {text!r}") from error
    if not numbers:
        raise InputError(f"--seeds: {text!r} names no seed")
    return numbers


def _grid(images, columns: int):
    from PIL import Image

    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    rows = -(-len(pixels) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for i, array in enumerate(pixels):
        grid.paste(Image.fromarray(array), (i % columns * width, i // columns * height))
    return grid


def _print_evaluation(name: str, result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "before", "after", "change", title=f"{printable(name)}: base model against the result")
    for name, metric in result["metrics"].items():
        if metric.get("value") is None or metric.get("base") is None:
            continue
        marked = f"{name} (optimised)" if name.removeprefix("reward/") in result.get("optimised", ()) else name
        change = metric["value"] - metric["base"]
        table.add_row(printable(marked), f"{metric['base']:.3f}", f"{metric['value']:.3f}", f"{change:+.3f}")
    console = Console()
    console.print(table)
    verdict = result.get("verdict") or {}
    for text in (verdict.get("text"), *verdict.get("warnings", ())):
        if text:
            console.print(printable(text), markup=False, highlight=False)


# ---------------------------------------------------------------------------------------------------- errors


def main() -> None:
    """The entry point: errors that a user can mend take a few lines, --debug shows where they come from."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:  # the libraries' own talk while they load; read when they are imported
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.showwarning = _warned
    try:
        code = app(arguments or ["--help"], prog_name="palate", standalone_mode=False)
    except BaseException as error:  # every kind gets its exit code; what is not ours goes on
        if debug and not isinstance(error, (SystemExit, typer.Exit)):
            raise
        code = _failed(error)
    if "RANK" in os.environ:
        from palate.runtime.distributed import leave

        leave(code if isinstance(code, int) else 0)
    sys.exit(code if isinstance(code, int) else 0)


def _warned(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """Palate's own warnings are sentences for the user; others keep the form that their makers look for."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        print(f"palate: {printable(str(message))}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def _failed(error: BaseException) -> int:
    """Say what was wrong; the exit code."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return 130
    if usage := getattr(error, "format_message", None):  # a mistake in the options, from typer
        _say(usage() or "no command; see palate --help")
        return 2
    if isinstance(error, PeerAbortedError):  # another rank has said it
        return error.exit_code
    if isinstance(error, PalateError):
        code = error.exit_code
    elif isinstance(error, OSError):
        code = CheckpointError.exit_code
    else:
        raise error
    _say(str(error))
    return code


def _say(message: str) -> None:
    lines = [printable(line) for line in message.splitlines() if line.strip()] or ["unknown error"]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"... and {len(lines) - MAX_LINES} more"]
    rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
    width = max(200, shutil.get_terminal_size((200, 24)).columns * 3)
    for number, line in enumerate(lines):
        cut = line if len(line) <= width * 2 else line[: width * 2] + "..."
        print((f"palate: {rank}" if number == 0 else "        ") + cut, file=sys.stderr)
    sys.stderr.flush()

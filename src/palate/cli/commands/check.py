"""Commands that check: plan, doctor, fetch, checkpoints, relocate, trust, replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from palate.cli.app import CHECK, app, examples
from palate.cli.options import (
    Json,
    Overrides,
    RecipeName,
    Run,
    belongs,
    finite,
    known_device,
    read_recipe,
    run_names,
)
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.progress import counted, printable
from palate.runtime.trust import ALL, known, record, remember


@app.command("plan", rich_help_panel=CHECK, epilog=examples(
    "palate plan srpo-flux --device rtx-4090",
    "palate plan srpo-sdxl-24gb trainer.batch_size=4 --gpus 4 --device h100",
))  # fmt: skip
def plan_recipe(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the batch.")] = 1,
    device: Annotated[str | None, typer.Option(help="For example rtx-4090 or cpu; else this machine.")] = None,
    utilisation: Annotated[float, typer.Option(callback=finite, help="Fraction of the peak FLOP/s reached.")] = 0.35,
    price: Annotated[
        float | None, typer.Option(min=0, callback=finite, help="Price of a GPU hour, to add up the cost.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory and time of a recipe before training."""
    read = read_recipe(recipe, overrides)
    from palate import plan as planner

    known_device(device)
    made = planner.plan(read, gpus=gpus)
    if as_json:
        print(planner.as_json(read, made, device=device, utilisation=utilisation, price=price))
    else:
        print(planner.table(read, made, device=device, utilisation=utilisation, price=price))
    if not planner.can_fit(read, made, device):
        raise typer.Exit(1)


@app.command(
    rich_help_panel=CHECK,
    epilog=examples(
        "palate doctor",
        "palate doctor srpo-flux --device rtx-4090    every file that it needs, with a command for each",
        "palate doctor --reward hpsv2 --source weights/hpsv2",
    ),
)
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="Also list what this recipe needs.")] = None,
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(help="For the recipe's memory; else this machine.")] = None,
    reward: Annotated[str | None, typer.Option(help="Also load this reward and try it.")] = None,
    source: Annotated[str | None, typer.Option(help="Where its weights are, as reward.source in a recipe.")] = None,
    as_json: Json = False,
) -> None:
    """Check this machine, and the files that a recipe needs.

    Exit code 2 where something is bad or missing.
    """
    belongs("--device", device is not None, "a recipe", recipe is not None)
    belongs("--source", source is not None, "--reward", reward is not None)
    from palate.cli import doctor as doctors

    found = list(doctors.findings())  # first of all: what is imported below may be what is broken
    if recipe is not None:
        read = read_recipe(recipe, overrides)
        known_device(device)
        from palate.cli.requirements import requirements

        found += [requirement.finding() for requirement in requirements(read, device)]
    if reward is not None:
        found += doctors.try_reward(reward, source)
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        for state, text in found:
            print(f"{state:8}{printable(text)}")
    if any(finding.state in doctors.STOPS for finding in found):
        raise typer.Exit(2)


@app.command(
    rich_help_panel=CHECK,
    epilog=examples(
        "palate fetch hpsv2",
        "palate fetch hpsv2 --from HPS_v2.1_compressed.pt    converts a file that is already here",
    ),
)
def fetch(
    name: Annotated[
        str,
        typer.Argument(help="clip-score, pickscore, hpsv2, image-reward, aesthetic, hpsv3; prompts: hpdv2, parti."),
    ],
    out: Annotated[Path, typer.Option(help="Where converted weights go, in a folder of the name.")] = Path("weights"),
    source: Annotated[Path | None, typer.Option("--from", help="A downloaded file, to convert only.")] = None,
) -> None:
    """Download a published reward or set of prompts.

    A reward is converted to safetensors; pickles are read with weights_only, so no code in them can run.
    """
    from palate.cli import fetch as fetching

    if source is None and name in fetching.PROMPT_SETS:
        files, licence = fetching.fetch_prompts(name), fetching.PROMPT_SETS[name].licence
        print(f"ready: palate evaluate RUN --protocol {name} ({counted(len(files), 'file')}, {licence})")
        return
    if source is None and name in fetching.PUBLISHED:
        reward = fetching.PUBLISHED[name]
        print(
            f"{name}: about {reward.gigabytes:.2f} GB from {reward.weights.place}; licence {reward.licence}", flush=True
        )
    where = fetching.fetch(name, out, source)
    if note := fetching.PUBLISHED[name].note:
        print(note)
    print(f"ready: reward.source.{name}={printable(where)}" if where else f"ready: reward.name={name}")


@app.command(
    rich_help_panel=CHECK, epilog=examples("palate checkpoints runs/mine", "palate checkpoints runs/mine --prune")
)
def checkpoints(
    run: Run,
    prune: Annotated[bool, typer.Option("--prune", help="Delete all but the newest and the guard's best.")] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, help="With --prune: how many of the newest good ones stay, else 1.")
    ] = None,
) -> None:
    """List the checkpoints of a run and verify every byte."""
    belongs("--keep", keep is not None, "--prune", prune)
    from palate.cli.checkpoints import print_checkpoints, prune_checkpoints

    there, damaged = print_checkpoints(run)
    if prune:
        prune_checkpoints(run, keep or 1)
    elif damaged:
        raise CheckpointError(
            f"damaged: {damaged} of {counted(there, 'checkpoint')}; resuming passes over what is damaged"
        )


@app.command(rich_help_panel=CHECK, epilog=examples(
    "palate relocate runs/mine --from /old/flux --to /new/flux",
    "palate relocate runs/* --from /old --to /new    everything below these folders",
))  # fmt: skip
def relocate(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", autocompletion=run_names)],
    old: Annotated[Path, typer.Option("--from", help="Where files lay that the runs stand on, or a folder above.")],
    new: Annotated[Path, typer.Option("--to", help="Where that lies now.")],
) -> None:
    """Tell runs where their files lie now.

    Moves nothing: it changes the paths in their recipes. Files that are not those a run began with are refused.
    """
    from palate.cli.relocate import relocate_runs

    relocate_runs(runs, old, new)


@app.command(rich_help_panel=CHECK, epilog=examples("palate trust my_reward.py"))
def trust(files: Annotated[list[Path], typer.Argument(help="Python files that you have read.")]) -> None:
    """Let code that recipes or runs name run here.

    Training by a recipe does so by itself. Code of a run that came from elsewhere, or changed since, waits for this.
    """
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is no file; give the Python file that the message names")
        remember(file)
        if file.resolve() not in {place for _, place in known()}:
            raise InputError(f"{record()} cannot be written to, so nothing is remembered; set {ALL}=1 instead")
        print(f"{printable(str(file.resolve()))}: may run")


@app.command(rich_help_panel=CHECK, epilog=examples("palate replay runs/mine/failures/step-000012"))
def replay(
    bundle: Annotated[Path, typer.Argument(help="What a run left: runs/NAME/failures/step-NNNNNN.")],
) -> None:
    """Repeat a step that was not finite and find the cause.

    Prints where the first value that is not finite arises. Exit code 1 where the step no longer fails.
    """
    if (bundle / "recipe.yaml").is_file():
        left = sorted((bundle / "failures").glob("step-*"))
        remedy = f"give one of its failures, for example {left[-1]}" if left else "it has left no failures to replay"
        raise InputError(f"{bundle} is a run; {remedy}")
    from palate.cli.replay import replay_and_print

    replay_and_print(bundle)

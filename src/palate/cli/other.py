"""Commands that share and check: export, recipes, plan, doctor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from palate.cli.app import CHECK, SHARE, TRAIN, app, examples
from palate.cli.options import Json, Overrides, RecipeName, Run, belongs, finite, read_recipe, recipe_file
from palate.runtime.errors import InputError
from palate.runtime.progress import printable


@app.command(rich_help_panel=SHARE, epilog=examples(
    "palate export runs/mine --format comfyui",
    "palate export runs/mine --push-to-hub me/my-lora --dry-run",
    "palate export runs/mine-distar --format one-step --out generator",
))  # fmt: skip
def export(
    run: Run,
    form: Annotated[
        str, typer.Option("--format", help="diffusers, kohya, comfyui, merged; one-step (DI*).")
    ] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="The folder to write to; RUN/export/FORMAT if left out.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Of merged: the largest file, as 5GB; 10GB.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="ID", help="Send it to this repository, private.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: everybody can see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push-to-hub: say what would be sent.")] = False,
) -> None:
    """Write a run's LoRA or generator for other programs."""
    recipe_file(run)
    belongs("--public", public, "--push-to-hub", push_to_hub is not None)
    belongs("--dry-run", dry_run, "--push-to-hub", push_to_hub is not None)
    from palate.cli import exporting

    hub = exporting.Hub(push_to_hub, public, dry_run) if push_to_hub else None
    exporting.export(run, form, out, max_shard_size=max_shard_size, hub=hub)


@app.command("merge", rich_help_panel=SHARE, epilog=examples(
    "palate merge runs/warm runs/outline --out runs/both",
    "palate train srpo-emoji model.start=runs/both model.lora_rank=8",
))  # fmt: skip
def merge(
    adapters: Annotated[list[str], typer.Argument(help="Runs, adapter folders or LoRA files of one network.")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    weights: Annotated[
        str | None, typer.Option(help="A number for each, as 0.7,0.3; equal shares of 1 if left out.")
    ] = None,
) -> None:
    """Add LoRAs up into one, without training."""
    try:
        numbers = [float(part) for part in weights.split(",")] if weights else [1 / len(adapters)] * len(adapters)
    except ValueError as error:
        raise InputError(f"--weights: expected numbers, as 0.7,0.3, got {weights!r}") from error
    for number in numbers:
        if not math.isfinite(number):
            raise InputError(f"--weights: expected finite numbers, got {number}")
    if len(numbers) != len(adapters):
        raise InputError(f"--weights: {len(adapters)} adapters take as many numbers, got {len(numbers)}")
    from palate.models.merge import merge_adapters

    rank = merge_adapters(adapters, numbers, out)
    print(f"LoRA of rank {rank}: {printable(str(out))}; train on from it with model.start and model.lora_rank={rank}")


@app.command("plan", rich_help_panel=CHECK, epilog=examples(
    "palate plan srpo-flux --device rtx-4090",
    "palate plan srpo-sdxl-24gb trainer.batch_size=2 --gpus 4 --device h100",
))  # fmt: skip
def plan_recipe(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the batch.")] = 1,
    device: Annotated[str | None, typer.Option(help="For example rtx-4090 or cpu; else this machine.")] = None,
    utilisation: Annotated[float, typer.Option(callback=finite, help="Fraction of the peak that is reached.")] = 0.35,
    price: Annotated[
        float | None, typer.Option(min=0, callback=finite, help="Of one GPU for one hour, to add up the cost.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory and time of a recipe before training."""
    read = read_recipe(recipe, overrides)
    from palate import plan as planner

    made = planner.plan(read, gpus=gpus)
    if as_json:
        print(planner.as_json(read, made, device=device, utilisation=utilisation))
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
    from palate.cli import doctor as doctors

    found = list(doctors.findings())  # first of all: what is imported below may be what is broken
    if recipe is not None:
        read = read_recipe(recipe, overrides)
        from palate.cli.needs import needs

        found += [need.finding() for need in needs(read, device)]
    if reward is not None:
        found += doctors.try_reward(reward, source)
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        for state, text in found:
            print(f"{state:8}{printable(text)}")
    if any(finding.state in ("bad", "missing") for finding in found):
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
        print(f"ready: palate evaluate RUN --protocol {name} ({len(files)} files, {licence})")
        return
    if source is None and name in fetching.PUBLISHED:
        reward = fetching.PUBLISHED[name]
        size = reward.weights.gigabytes + sum(extra.gigabytes for extra in reward.extra)
        print(f"{name}: about {size:.2f} GB from {reward.weights.place}; licence {reward.licence}", flush=True)
    where = fetching.fetch(name, out, source)
    if note := fetching.PUBLISHED[name].note:
        print(note)
    print(f"ready: reward.source.{name}={printable(where)}" if where else f"ready: reward.name={name}")


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
        for kind in ("styles", "colours", "sizes", "positions", "concepts"):
            print(f"{kind}: {', '.join(getattr(vocab, kind))}")
        print("synonyms: " + ", ".join(f"{word} = {known}" for word, known in vocab.synonyms.items()))
        return
    from palate.recipe import published, text_of

    if show is not None:
        print(text_of(show), end="")
        return
    for name, summary in published().items():
        print(f"{name:24} {summary}")

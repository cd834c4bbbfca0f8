"""Commands that share: export, merge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from palate.cli.app import SHARE, app, examples
from palate.cli.options import Run, belongs, new_place, recipe_file
from palate.runtime.errors import InputError
from palate.runtime.progress import counted, printable


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
    max_shard_size: Annotated[str | None, typer.Option(help="Of merged: the largest file, else 10GB.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="ID", help="Send it to this repository, private.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: everybody can see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push-to-hub: say what would be sent.")] = False,
) -> None:
    """Write a run's LoRA or generator for other programs."""
    recipe_file(run)
    new_place("--out", out)
    belongs("--public", public, "--push-to-hub", push_to_hub is not None)
    belongs("--dry-run", dry_run, "--push-to-hub", push_to_hub is not None)
    from palate.cli.export import Hub, export_run

    hub = Hub(push_to_hub, public, dry_run) if push_to_hub else None
    export_run(run, form, out, max_shard_size=max_shard_size, hub=hub)


@app.command("merge", rich_help_panel=SHARE, epilog=examples(
    "palate merge runs/warm runs/outline --out runs/both",
    "palate train srpo-emoji model.start=runs/both model.lora_rank=8",
))  # fmt: skip
def merge(
    adapters: Annotated[list[str], typer.Argument(help="Runs, adapter folders or LoRA files of one network.")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    weights: Annotated[str | None, typer.Option(help="A number for each, for example 0.7,0.3; else the mean.")] = None,
) -> None:
    """Merge LoRAs into one, without training."""
    new_place("--out", out)
    if out.resolve() in [Path(adapter).resolve() for adapter in adapters]:
        raise InputError(f"--out: {out} is one of the adapters; name another folder")
    try:
        numbers = [float(part) for part in weights.split(",")] if weights else [1 / len(adapters)] * len(adapters)
    except ValueError as error:
        raise InputError(f"--weights: expected numbers, for example 0.7,0.3, got {weights!r}") from error
    for number in numbers:
        if not math.isfinite(number):
            raise InputError(f"--weights: expected finite numbers, got {number}")
    if len(numbers) != len(adapters):
        raise InputError(
            f"--weights: expected {counted(len(adapters), 'number')}, one for each adapter, got {len(numbers)}"
        )
    from palate.models.merge import merge_adapters

    rank = merge_adapters(adapters, numbers, out)
    print(f"LoRA of rank {rank}: {printable(str(out))}; train on from it with model.start and model.lora_rank={rank}")

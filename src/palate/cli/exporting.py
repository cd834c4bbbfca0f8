"""What `palate export` does once its options are read."""

from __future__ import annotations

import logging
from pathlib import Path

from palate.export import export_lora, export_merged, export_one_step, lora_file
from palate.runs import RunFolder, adapter_of
from palate.runtime.errors import InputError
from palate.runtime.progress import printable
from palate.runtime.runlock import require_free

_warn = logging.getLogger("palate").warning


def export(folder: Path, form: str, out: Path | None) -> None:
    """Write the run's result in that form, and say where it lies."""
    run = RunFolder(folder)
    require_free(folder, "its result changes with every step")
    if form == "one-step":
        algorithm = run.recipe.algorithm
        if algorithm.name != "distar":
            raise InputError(f"--format one-step: {algorithm.name} makes no generator; use the run of a distar recipe")
        target = export_one_step(run.model(_warn)[0], algorithm, out or folder / "export" / form)
        print(f"pipeline: {printable(str(target))}; its README.md has the call")
        return
    if form == "merged":
        target = export_merged(folder, run.model(_warn)[0], out, recipe=run.recipe)
        print(f"network: {printable(str(target))}")
        return
    if run.recipe.model.weights == "lora":
        adapter_of(folder, lambda: run.model(_warn)[0])
    positive, negative = run.words()
    words = {"positive": ", ".join(positive), "negative": ", ".join(negative)}
    target = export_lora(folder, form, out, words, recipe=run.recipe) / lora_file(folder, form)
    print(f"LoRA: {printable(str(target))}")

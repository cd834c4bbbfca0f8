"""What `palate sample` does once its options are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from palate.cli.model_source import load_source
from palate.core import HasStrength
from palate.evaluate import generate, pairs, read_index, write_samples
from palate.report.sheet import write_sheet
from palate.runtime.errors import InputError
from palate.train.checks import require_sampleable


def draw(
    source: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None,
    guidance: float | None,
    strengths: Sequence[float] | None,
    out: Path,
) -> int:
    """Pictures of prompts x seeds with a run or a model, their index and their sheet, in `out`; how many there are.

    strengths: of the run's LoRA, each on the same noise, side by side; None = as it was trained.
    """
    model, sampler = load_source(source)
    if sampler and (steps is not None or guidance is not None):
        raise InputError("--steps, --guidance: a generator draws as it was trained; leave them out")
    if sampler:
        steps, guidance = sampler.steps, 1.0
    else:
        own = require_sampleable(model, "samples")
        steps = steps or own.default_steps
        guidance = own.default_guidance if guidance is None else guidance
    if strengths is None:
        images = generate(model, prompts, seeds, steps=steps, guidance=guidance, sampler=sampler)
        clear_samples(out)
        write_samples(out, images, *pairs(prompts, seeds), guidance=guidance, steps=steps)
        write_sheet(out)
        return len(images)
    if not isinstance(model, HasStrength):
        raise InputError(f"--strength: {source} has no LoRA whose strength could be changed; leave it out")
    found = []
    for strength in strengths:
        with model.at_strength(strength):
            found.append(generate(model, prompts, seeds, steps=steps, guidance=guidance, sampler=sampler))
    images = torch.stack(found, 1).flatten(0, 1)  # of one prompt and seed, every strength side by side
    rows = list(zip(*pairs(prompts, seeds), strict=True))
    asked, noises = [prompt for prompt, _ in rows for _ in strengths], [seed for _, seed in rows for _ in strengths]
    clear_samples(out)
    write_samples(
        out, images, asked, noises, guidance=guidance, steps=steps, strengths=[*strengths] * (len(images) // len(found))
    )
    write_sheet(out)
    return len(images)


def clear_samples(folder: Path) -> None:
    """Delete what an earlier `sample` wrote there, so that the folder holds one set; other files stay."""
    if (folder / "index.jsonl").is_file():
        for row in read_index(folder):
            (folder / row["file"]).unlink(missing_ok=True)

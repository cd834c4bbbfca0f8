"""What `palate sample` does once its options are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from palate.cli.model_source import load_source
from palate.core import HasStrength, Model, Sampler
from palate.evaluate import generate, pairs, read_index, write_samples
from palate.evaluate.samples import Drawing, steps_and_guidance, write_strengths
from palate.models.latents import ImageSize
from palate.models.sizes import at_size
from palate.recipe import SampleSettings
from palate.report.sheet import write_sheet
from palate.runs.folder import RunFolder
from palate.runtime.errors import InputError
from palate.train.checks import require_sampleable


class Wanted(NamedTuple):
    """How to draw. None = the run's own way, the section `sample` of its recipe, else the model's."""

    steps: int | None = None
    guidance: float | None = None
    image_size: ImageSize | None = None
    strengths: Sequence[float] | None = None  # of a run's LoRA, on the same noise, side by side; None = as trained


def draw(source: str, prompts: Sequence[str], seeds: Sequence[int], wanted: Wanted, out: Path) -> int:
    """Pictures of prompts x seeds with a run or a model, their index and their sheet, in `out`; how many there are."""
    model, sampler = load_source(source)
    steps, guidance = _way(source, model, sampler, wanted)
    with at_size(model, wanted.image_size, "--size"):
        if wanted.strengths is None:
            images = generate(model, prompts, seeds, steps=steps, guidance=guidance, sampler=sampler)
            clear_samples(out)
            write_samples(out, images, *pairs(prompts, seeds), guidance=guidance, steps=steps)
            write_sheet(out)
            return len(images)
        if not isinstance(model, HasStrength):
            raise InputError(f"--strength: {source} has no LoRA whose strength could be changed; leave it out")
        found = []
        for strength in wanted.strengths:
            with model.at_strength(strength):
                found.append(generate(model, prompts, seeds, steps=steps, guidance=guidance, sampler=sampler))
    clear_samples(out)
    write_strengths(out, found, prompts, seeds, wanted.strengths, guidance=guidance, steps=steps)
    write_sheet(out)
    return sum(map(len, found))


def _way(source: str, model: Model, sampler: Sampler | None, wanted: Wanted) -> tuple[int, float]:
    """Steps and guidance. InputError: they are given for a generator, which has its own."""
    if sampler and (wanted.steps is not None or wanted.guidance is not None):
        raise InputError("--steps, --guidance: a generator draws as it was trained; leave them out")
    if not sampler:
        require_sampleable(model, "samples")
    run = Path(source).expanduser()
    how = RunFolder(run).recipe.sample if (run / "recipe.yaml").is_file() else SampleSettings()
    guidance = how.guidance if wanted.guidance is None else wanted.guidance
    return steps_and_guidance(model, Drawing(wanted.steps or how.steps, guidance, sampler=sampler))


def clear_samples(folder: Path) -> None:
    """Delete what an earlier `sample` wrote there, so that the folder holds one set; other files stay."""
    if (folder / "index.jsonl").is_file():
        for row in read_index(folder):
            (folder / row["file"]).unlink(missing_ok=True)

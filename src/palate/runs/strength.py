"""A run judged at several strengths of its LoRA: how much of the change one wants is a number of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from palate.core import HasStrength, Sampleable
from palate.data import listed
from palate.evaluate.measurement import evaluate_samples, to_json
from palate.evaluate.panel import EvaluationPanel
from palate.evaluate.samples import (
    Drawing,
    generate,
    pairs,
    steps_and_guidance,
    strength_text,
    write_samples,
    write_strengths,
)
from palate.recipe import evaluators
from palate.runs.evaluation import evaluating, prompts_of, seeds_of
from palate.runs.folder import RunFolder
from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically

FOLDER = "strengths"


def evaluate_strengths(
    run_folder: str | Path | RunFolder,
    strengths: Sequence[float],
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    panel: EvaluationPanel | None = None,
) -> dict[str, Any]:
    """What the run's LoRA does at each strength, on the same prompts and noise, against strength 0, the base model.

    Writes strengths/S/ with the pictures of each, strengths/ with all of them side by side, and strengths.json in the
    run, which is returned: {"strengths": {"0.5": evaluation}, "prompts", "seeds", "optimised", "heldout"}. InputError:
    the run has no LoRA, or draws by a generator of its own that has no strength.
    """
    run = run_folder if isinstance(run_folder, RunFolder) else RunFolder(run_folder)
    strengths = list(dict.fromkeys(strength + 0.0 for strength in strengths))  # -0 is 0
    panel = panel or evaluators.panel_of(run.recipe)
    rewards, optimised = run.objective().rewards(panel.rewards, panel.heldout)
    panel = panel._replace(rewards=rewards)
    prompts = prompts_of(run.recipe) if prompts is None else listed(prompts)
    seeds = seeds_of(run.recipe) if seeds is None else list(seeds)
    with evaluating(run):
        _draw(run, strengths, prompts, seeds)  # by a network that is gone when the judges look
        folders = {strength_text(strength): run.path / FOLDER / strength_text(strength) for strength in strengths}
        base = run.path / FOLDER / "0"
        result = {
            "strengths": {
                text: evaluate_samples(folder, base_folder=base, panel=panel) for text, folder in folders.items()
            },
            "prompts": len(prompts),
            "seeds": len(seeds),
            "optimised": optimised,
            "heldout": panel.heldout,
        }
        write_atomically(run.path / f"{FOLDER}.json", to_json(result).encode())
    return result


def _draw(run: RunFolder, strengths: Sequence[float], prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Write the pictures of strength 0 and of each strength into folders of their own, and all of them side by side."""
    model, sampler = run.model()
    if not isinstance(model, HasStrength) or not isinstance(model, Sampleable):
        raise InputError(f"--strength: the model of {run.path} has none")
    how = run.recipe.sample
    steps, guidance = steps_and_guidance(model, Drawing(how.steps, how.guidance, sampler=sampler))
    drawn: list[Tensor] = []
    for strength in dict.fromkeys((0.0, *strengths)):
        with model.at_strength(strength):
            images = generate(model, prompts, seeds, steps=steps, guidance=guidance, sampler=sampler)
        drawn += [images] if strength in strengths else []
        folder = run.path / FOLDER / strength_text(strength)
        write_samples(folder, images, *pairs(prompts, seeds), guidance=guidance, steps=steps)
    write_strengths(run.path / FOLDER, drawn, prompts, seeds, strengths, guidance=guidance, steps=steps)

"""What a recipe trains on, and what its previews draw."""

from __future__ import annotations

from collections.abc import Sequence

from palate.data import evenly_spaced, prompts_at
from palate.recipe.settings import Recipe


def prompts_of(recipe: Recipe, captions: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """What is trained on, the captions of images if there are any, and what previews draw.

    evaluate.file is read too, so that a missing one does not show after the training.
    """
    asked, judged = recipe.prompts, recipe.evaluate.file
    if judged is not None:
        prompts_at("evaluate.file", judged)
    prompts = captions or asked.list or prompts_at("prompts.file", asked.file or "")
    preview = prompts_at("prompts.preview", asked.preview) if asked.preview else evenly_spaced(prompts)
    return list(prompts), preview

"""What a recipe trains on, and what its previews draw."""

from __future__ import annotations

from collections.abc import Sequence

from palate.data import RecipeError, evenly_spaced, read_prompts
from palate.recipe.settings import Recipe


def prompts_of(recipe: Recipe, captions: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """What is trained on, the captions of images if there are any, and what previews draw.

    evaluate.file is read too, so that a missing one does not show after the training.
    """
    if recipe.evaluate.file is not None:
        try:
            read_prompts(recipe.evaluate.file)
        except RecipeError as error:
            raise RecipeError(f"evaluate.file: {error}") from error
    prompts = captions or recipe.prompts.list or read_prompts(recipe.prompts.file or "")
    preview = read_prompts(recipe.prompts.preview) if recipe.prompts.preview else evenly_spaced(prompts)
    return list(prompts), preview

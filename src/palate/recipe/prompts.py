"""What a recipe trains on: prompts, captions, pictures; and what its previews draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palate.data import RecipeError, captioned_images, evenly_spaced, preference_pairs, read_prompts
from palate.recipe.settings import Recipe


def pictures_of(recipe: Recipe) -> tuple[list[str] | None, list[Path | bytes]]:
    """Captions and images of prompts.images or of prompts.pairs, the preferred image of a pair first; else neither."""
    images: list[Path | bytes] = []
    if recipe.prompts.images is not None:
        found = captioned_images(Path(recipe.prompts.images))
        images += [path for path, _ in found]
        return [caption for _, caption in found], images
    if recipe.prompts.pairs is None:
        return None, images
    pairs = [pair for pair in preference_pairs(recipe.prompts.pairs) if pair.preference != 0.5]
    if not pairs:
        raise RecipeError(f"prompts.pairs: {recipe.prompts.pairs} holds no pair with a preference")
    for pair in pairs:
        images += [pair.first, pair.second] if pair.preference > 0.5 else [pair.second, pair.first]
    return [pair.prompt for pair in pairs], images


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

"""What a recipe trains on, and what its previews draw."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from palate.core import Steerable
from palate.core.random import used_prompts
from palate.data import evenly_spaced, prompts_at
from palate.models.vocabulary import known_words
from palate.recipe.algorithm import build_algorithm
from palate.recipe.cross_checks import rewards_used
from palate.recipe.settings import Recipe
from palate.runtime.errors import InputError


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


def check_words(recipe: Recipe, prompts: Sequence[str], preview: Sequence[str]) -> None:
    """InputError: the embedded model does not know a word of a prompt that the run would use, or its reward one of a
    control word."""
    if recipe.model.name != "emoji" or not prompts:
        return
    trainer = recipe.trainer
    used = used_prompts(prompts, trainer.seed, trainer.steps * trainer.batch_size)
    for prompt in dict.fromkeys([*used, *(preview if trainer.preview_every or trainer.guard.every else [])]):
        known_words(prompt)
    algorithm = build_algorithm(recipe)
    if isinstance(algorithm, Steerable):
        check_control_words(recipe, algorithm, longest_of(used), "algorithm.")


def longest_of(prompts: Sequence[str]) -> str:
    """The prompt with the most words: the first that is too long with a control word before it."""
    return max(prompts, key=lambda prompt: len(prompt.split()))


def check_control_words(
    recipe: Recipe, algorithm: Steerable, prompt: str, key: str = "", sides: Collection[str] = ("positive", "negative")
) -> None:
    """InputError: the embedded reward, if the recipe asks it, does not know one of the control words in force on those
    sides, or not with the prompt behind it. key: what stands before the side's name in the message."""
    if recipe.model.name != "emoji" or "emoji" not in rewards_used(recipe.reward):
        return
    for side, texts in algorithm.control_texts(prompt).items():
        for text in texts if side in sides else ():
            try:
                known_words(text)
            except InputError as error:
                raise InputError(f"{key}{side}: {error}") from error

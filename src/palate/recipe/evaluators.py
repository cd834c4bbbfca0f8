"""Who judges a recipe's results, and what its guard measures."""

from __future__ import annotations

import logging

import torch

from palate.core import EmbedsImages, GuardMeasure, Reward, TwoTower
from palate.evaluate.monitor import ImageMonitor
from palate.evaluate.panel import EvaluationPanel, embedded_panel, published_panel
from palate.models.options import place_of
from palate.recipe.algorithm import build_algorithm
from palate.recipe.builder import sampler_of
from palate.recipe.cross_checks import heldout_of, judge_guards, rewards_used, stands_on_tower
from palate.recipe.settings import Recipe
from palate.rewards.load import load_reward
from palate.rewards.located import located
from palate.rewards.table import HELD_OUT_CANDIDATES
from palate.runtime.errors import InputError


def panel_of(recipe: Recipe) -> EvaluationPanel:
    """The evaluators of the recipe's results."""
    name = heldout_of(recipe)
    if recipe.model.name == "emoji":
        return embedded_panel()
    if name is None:
        candidates = ", ".join(HELD_OUT_CANDIDATES)
        raise InputError(f"reward.weights: {candidates} are all optimised, so none is left to judge; leave one out")
    reward = load_reward(name, recipe.reward.source.get(name), recipe.reward.dtype)
    assert isinstance(reward, TwoTower), "the candidates are two-tower rewards"
    return published_panel(name, reward, judging_device(recipe))


def judging_device(recipe: Recipe) -> torch.device:
    """Where the judges compute: model.device, and the CPU on a machine that has no accelerator."""
    return place_of(recipe.model.device) if torch.cuda.is_available() else torch.device("cpu")


def allowed_fall(recipe: Recipe) -> float:
    """How far the held-out reward of a run towards a taste may fall: as far as its guard lets it, since a taste changes
    what plain prompts leave open and has no words to be judged by; 0 for every other run."""
    guard = recipe.trainer.guard
    judged = bool(guard.every) and judge_guards(recipe)
    return guard.heldout_drop if judged and recipe.reward.name == "taste" else 0.0


def guard_measure(recipe: Recipe, tower: EmbedsImages | None = None) -> GuardMeasure | None:
    """What the guard of a run measures; None = the embedded model's judges, which `palate.train` asks by itself.

    tower: the image tower of what is optimised, `Parts.tower`.
    """
    guard, trainer = recipe.trainer.guard, recipe.trainer
    if not guard.every or judge_guards(recipe):
        return None
    return ImageMonitor(
        seed=trainer.seed,
        sampler=sampler_of(build_algorithm(recipe)),
        tower=tower,
        steps=guard.steps,
        heldout=_heldout_at_hand(recipe) if recipe.model.name != "emoji" else None,
        batch_size=max(1, trainer.batch_size // trainer.micro_batches),
    )


def _heldout_at_hand(recipe: Recipe) -> Reward | None:
    """The held-out reward, else another candidate that is not optimised, of which the weights are on this machine."""
    used = rewards_used(recipe.reward)
    if stands_on_tower(recipe):
        used |= {*recipe.reward.source} & {*HELD_OUT_CANDIDATES}
    wanted = heldout_of(recipe)
    names = [name for name in dict.fromkeys([wanted, *HELD_OUT_CANDIDATES]) if name and name not in used]
    for name in names:
        source = located(name, recipe.reward.source.get(name))
        if source is not None:
            try:
                return load_reward(name, source or None, recipe.reward.dtype)
            except InputError as error:  # a tokenizer is missing beside the weights, for one
                logging.getLogger("palate").info("the guard cannot ask the held-out reward %s: %s", name, error)
    if names:
        logging.getLogger("palate").info(
            "the guard asks no held-out reward: the weights of %s are not on this machine; `palate fetch %s` gets some",
            ", ".join(names), names[0],
        )  # fmt: skip
    return None

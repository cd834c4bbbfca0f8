"""A recipe's objects, the arguments of `palate.train`. What is cheap and can be wrong comes first, the
weights last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor

from palate.algorithms import table as algorithms
from palate.core import (
    Algorithm,
    AsksOtherPrompts,
    DrawsOwnSamples,
    EmbedsImages,
    Model,
    Reward,
    Sampler,
    TextCached,
    TwoTower,
    used_prompts,
)
from palate.data import (
    RecipeError,
    check_images,
)
from palate.data.buckets import Bucket
from palate.models import families
from palate.recipe.algorithm import build_algorithm
from palate.recipe.cross_checks import AsksBlackBox, trained_names, without_effect
from palate.recipe.objective import check_taste, image_tower, reward_objective
from palate.recipe.pictures import buckets_of, latents_of, pictures_of
from palate.recipe.prompts import prompts_of
from palate.recipe.settings import Recipe, RewardSettings
from palate.recipe.start import check_folder, check_start, load_consistency, start_folder, teachers_of, warn_of_noise
from palate.rewards.learned import BlackBox, Features, tower_features
from palate.rewards.load import load_reward
from palate.rewards.table import HELD_OUT_CANDIDATES
from palate.runtime.errors import InputError

TRAINING_ADAPTER = "training_adapter"  # its name among the named weights
LARGE_LR = 0.1  # from here on a sentence is due: a step of that size destroys any network


class Parts(NamedTuple):
    """What a recipe builds: the arguments of `palate.train`."""

    model: Model
    algorithm: Algorithm
    reward: Reward
    prompts: list[str]
    preview_prompts: list[str]
    latents: Tensor | None
    tower: EmbedsImages | None = None  # of the rewards that are optimised
    buckets: Sequence[Bucket] = ()  # given pictures of several sizes, in the place of latents


@runtime_checkable
class SharesRollouts(Protocol):
    """Settings of an algorithm whose rollout may serve several updates."""

    @property
    def rollout_every(self) -> int:
        """Updates that a rollout serves."""


@runtime_checkable
class LearnsContext(Protocol):
    """Settings of an algorithm whose first updates teach what words would draw."""

    @property
    def context(self) -> Sequence[str]: ...

    @property
    def context_steps(self) -> int: ...


def build(recipe: Recipe, *, before_model: Callable[[], None] = lambda: None) -> Parts:
    """Load everything the recipe names. `before_model` is called once all that is small has been checked and loaded."""
    if (lr := recipe.trainer.lr) >= LARGE_LR:
        logging.getLogger("palate").warning(
            "trainer.lr = %g: AdamW moves each weight by about that much per step; usual values are 1e-6 to 1e-3", lr
        )
    warn_of_noise(recipe)
    warn_of_no_gradient(recipe)
    pictures = pictures_of(recipe)
    check_images(pictures.files if pictures else [])
    prompts, preview = prompts_of(recipe, pictures.prompts if pictures else None)
    check_folder(recipe)
    check_start(recipe)
    check_taste(recipe.reward, recipe.model.name)
    check_context(recipe)
    with torch.random.fork_rng(devices=[]):  # first, for its missing files; the LoRA's first weights do not see it
        reward, tower = reward_and_tower(recipe.reward)
        reward = as_asked(recipe, reward)
    before_model()
    model = build_whole_model(recipe, cut=recipe.trainer.sharding != "none")
    algorithm = build_algorithm(recipe)
    if isinstance(model, TextCached):
        trainer = recipe.trainer  # of a long list, a short run uses only a part
        every = len(prompts) if recipe.prompts.sizes else trainer.steps * trainer.batch_size
        used = used_prompts(prompts, trainer.seed, every)
        other = algorithm.other_prompts(model, used) if isinstance(algorithm, AsksOtherPrompts) else []
        model.cache_prompts([*used, *other, *preview])
    latents, buckets, sizes = None, [], recipe.prompts.sizes
    if pictures and pictures.files and sizes:
        buckets = buckets_of(model, pictures, recipe.algorithm, sizes)
    elif pictures and pictures.files:
        latents = latents_of(model, pictures, recipe.algorithm)
    return Parts(model, algorithm, reward, list(prompts), preview, latents, tower, buckets)


def warn_of_no_gradient(recipe: Recipe) -> None:
    """Say so when a reward of a sum gives no gradient, and the algorithm moves by gradients alone."""
    kind = algorithms.find(recipe.algorithm.name).load_class()
    if names := without_effect(recipe.reward, recipe.algorithm, kind):
        logging.getLogger("palate").warning(
            "reward.weights: %s gives no gradient, and %s learns by gradients alone: it is asked and counted in the "
            "reward that is shown, and nothing is trained on it. Leave it out, or use ddpo, flow_grpo or nft",
            ", ".join(names), recipe.algorithm.name,
        )  # fmt: skip


def check_context(recipe: Recipe) -> None:
    """InputError: the guard waits for a context to be learnt, and none is named."""
    algorithm, after = recipe.algorithm, recipe.trainer.guard.after
    if isinstance(algorithm, LearnsContext) and not algorithm.context and after >= algorithm.context_steps:
        raise InputError(
            f"algorithm.context: name what the {after} updates before the guard's first look teach, as [black] "
            "(palate taste words TASTE SAMPLES says which background a taste likes); without any, train taste-emoji"
        )


def sampler_of(algorithm: Algorithm) -> Sampler | None:
    """How the algorithm draws from its policy; None = as the model does."""
    return algorithm.sampler if isinstance(algorithm, DrawsOwnSamples) else None


# --- parts ----------------------------------------------------------------------------------------------------------


def build_reward(settings: RewardSettings) -> Reward:
    """The reward of the section."""
    return reward_and_tower(settings)[0]


def as_asked(recipe: Recipe, reward: Reward) -> Reward:
    """The reward as the recipe's algorithm asks it: with features beside it where a head is to learn it."""
    if isinstance(recipe.algorithm, AsksBlackBox) and recipe.algorithm.head_queries:
        return BlackBox(reward, head_features(recipe))
    return reward


def reward_and_tower(settings: RewardSettings) -> tuple[Reward, EmbedsImages | None]:
    """The reward that the loop is given, and the image tower among its terms if there is one."""
    objective = reward_objective(settings)
    loaded = objective.terms_loaded()
    return objective.reward(loaded), image_tower(loaded.values())


def build_model(recipe: Recipe, *, cut: bool = False) -> Model:
    """The model, with the named weights that the recipe's algorithm trains. cut: its networks wait on the host until
    the loop cuts them over the ranks."""
    settings = recipe.model
    family, values = families.find(settings.name), vars(settings)
    model = family.load_class().load(
        settings.folder,
        training=settings.weights,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_targets=settings.lora_targets,
        names=trained_names(recipe.algorithm.name),
        **({"cut": True} if cut and "cut" in family.keys else {}),
        **{key: values[key] for key in family.keys if key in values and values[key] is not None},
    )
    if settings.lora_init == "gaussian":
        model.weights.draw_first_factor()
    if settings.start is not None and settings.weights == "lora":
        start, reference = start_folder(settings.start), settings.reference or "base"
        model.weights.begin(start, rank=settings.lora_rank, alpha=settings.lora_alpha, reference=reference)
    elif settings.start is not None:
        try:
            model.weights.load(start_folder(settings.start), "policy")
        except (ValueError, SafetensorError) as error:
            raise InputError(f"model.start: {error}") from error
    if settings.training_adapter is not None:
        model.weights.add_frozen(settings.training_adapter, TRAINING_ADAPTER, "model.training_adapter")
        model.weights.selection.companion = TRAINING_ADAPTER
    return model


def build_whole_model(recipe: Recipe, *, cut: bool = False) -> Model:
    """The same with the frozen weights that the algorithm asks besides: a consistency model, teachers."""
    model = build_model(recipe, cut=cut)
    load_consistency(recipe, model)
    load_teachers(recipe, model)
    return model


def load_teachers(recipe: Recipe, model: Model) -> None:
    """Give the model the frozen adapters that the algorithm learns from, each under its name."""
    for name, key, adapter in teachers_of(recipe):
        model.weights.add_frozen(adapter, name, key)  # type: ignore[attr-defined]


def head_features(recipe: Recipe) -> Features:
    """What the head of a black-box reward sees: those of the embedded reward, or of the first two-tower reward whose
    weights the recipe names."""
    named = [name for name in HELD_OUT_CANDIDATES if name in recipe.reward.source]
    candidates = ["emoji"] if recipe.model.name == "emoji" else named
    if not candidates:
        raise RecipeError(
            "algorithm.head_queries: a head needs features of images; name the weights of a two-tower reward, as "
            "reward.source.pickscore=PATH"
        )
    tower = load_reward(candidates[0], recipe.reward.source.get(candidates[0]), recipe.reward.dtype)
    assert isinstance(tower, TwoTower), "the candidates are two-tower rewards"
    return tower_features(tower)

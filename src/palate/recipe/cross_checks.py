"""What must fit together in a recipe, across its sections."""

from __future__ import annotations

import contextlib
import inspect
import math
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from palate.algorithms import table as algorithms
from palate.core import ChecksBatch, DrawsOtherSizes, TakesAnySize
from palate.models import families
from palate.recipe.model_checks import check_lora_read, check_model
from palate.recipe.names import near
from palate.recipe.picture_checks import ComparesErrors, check_images_read, check_pictures, check_prompts
from palate.recipe.settings import Recipe, RewardSettings, TrainerSettings
from palate.rewards import table as rewards
from palate.runtime.code import load_object, names_a_file, refused_call, short_name
from palate.runtime.errors import InputError
from palate.taste.saved import parts_of, source_of


@runtime_checkable
class NeedsRewardGradient(Protocol):
    """An algorithm that differentiates the reward, if the attribute is true."""

    needs_reward_gradient: bool


@runtime_checkable
class ControlWords(Protocol):
    """Settings of an algorithm with control words of its own."""

    @property
    def positive(self) -> tuple[str, ...]: ...
    @property
    def negative(self) -> tuple[str, ...]: ...


@runtime_checkable
class PrefersWords(ControlWords, Protocol):
    """Such settings of which the words may be compared with each other, where it is "relative"."""

    @property
    def preference(self) -> str: ...


@runtime_checkable
class AsksBlackBox(Protocol):
    """Settings of an algorithm that learns a head on a reward that can only be asked, where the number is above 0."""

    @property
    def head_queries(self) -> int: ...


@runtime_checkable
class ScalesReward(Protocol):
    """Settings of an algorithm that leaves the reward out at scale 0."""

    @property
    def reward_scale(self) -> float: ...


@runtime_checkable
class ComparesParts(Protocol):
    """Settings of an algorithm that may standardise each part of a reward by itself."""

    @property
    def per_reward(self) -> bool: ...


@runtime_checkable
class ComparesCalls(Protocol):
    """An algorithm that compares calls of the network without a gradient with calls that have one, if the attribute is
    true: both must be told the same."""

    compares_calls: bool


@runtime_checkable
class PullsToReference(Protocol):
    """Settings of an algorithm that compares so where the number is above 0."""

    @property
    def reference_penalty(self) -> float: ...


def rewards_used(reward: RewardSettings) -> set[str]:
    """The names of the rewards that are optimised."""
    return {reward.name} if reward.name else set(reward.weights or ())


def rewards_placed(recipe: Recipe) -> set[str]:
    """The names that `reward.source` may give a place: of rewards that are optimised or judge the result."""
    used = rewards_used(recipe.reward)
    bases = set(rewards.HELD_OUT_CANDIDATES) if stands_on_tower(recipe) else set()
    return used | bases | {heldout_of(recipe) or ""}


def stands_on_tower(recipe: Recipe) -> bool:
    """Whether what is optimised may stand on the image tower of a reward that is not: a taste, or a head that learns a
    black-box reward, which for the embedded model stands on its own."""
    head = isinstance(recipe.algorithm, AsksBlackBox) and recipe.algorithm.head_queries > 0
    return (head and recipe.model.name != "emoji") or "taste" in rewards_used(recipe.reward)


def heldout_of(recipe: Recipe) -> str | None:
    """The reward that judges the recipe's results and is not optimised; None where the recipe optimises them all."""
    if recipe.model.name == "emoji":
        return "emoji-heldout"
    used = rewards_used(recipe.reward)
    if recipe.evaluate.heldout is None and "taste" in used:
        used = used | _bases_of_taste(recipe)
    return recipe.evaluate.heldout or next((name for name in rewards.HELD_OUT_CANDIDATES if name not in used), None)


def _bases_of_taste(recipe: Recipe) -> set[str]:
    """The rewards on whose features the recipe's taste stands, as far as it is there to be read."""
    with contextlib.suppress(InputError):
        return {source_of(folder) for folder, _ in parts_of(recipe.reward.source.get("taste"))}
    return set()


def judge_guards(recipe: Recipe) -> bool:
    """Whether the embedded model's judge, which has names for what it sees, measures for the run's guard."""
    return recipe.model.name == "emoji" and recipe.trainer.guard.measures != "images"


def trained_names(algorithm: str) -> tuple[str, ...]:
    """The named weights that an algorithm trains."""
    return algorithms.find(algorithm).load_class().trains


def check_together(recipe: Recipe, mistakes: list[str]) -> None:
    """Add to `mistakes` what does not fit together."""
    check_model(recipe.model, mistakes)
    check_prompts(recipe.prompts, mistakes)
    _check_rewards(recipe, mistakes)
    if recipe.optimize is not None:
        _check_oracle(recipe, mistakes)
    if recipe.algorithm.name:
        _check_algorithm(recipe, mistakes)
        _check_sizes(recipe, mistakes)


def check_effects(recipe: Recipe, mistakes: list[str]) -> None:
    """Add to `mistakes` what would have no effect, or not the one that is meant. Of recipes that begin a run alone: one
    that is stored may be older than such a rule, and its run went well without."""
    check_lora_read(recipe.model, mistakes)
    if recipe.optimize is not None and recipe.prompts.images is not None:
        mistakes.append("prompts.images: optimize draws its own images; give prompts.file or prompts.list")
    if recipe.optimize is not None and recipe.prompts.sizes is not None:
        mistakes.append("prompts.sizes: optimize draws one size; set model.image_size")
    if recipe.algorithm.name:
        kind = algorithms.find(recipe.algorithm.name).load_class()
        check_images_read(recipe.prompts, recipe.algorithm, kind, mistakes)
        _check_told(recipe, kind, mistakes)
        _check_pairs_of_words(recipe.algorithm, mistakes)
        _check_words_read(recipe.reward, recipe.algorithm, mistakes)
    if problem := average_stays(recipe.trainer):
        mistakes.append(problem)
    labels = sorted(map(short_name, rewards_used(recipe.reward)))
    if alike := [label for label, following in pairwise(labels) if label == following]:
        mistakes.append(
            f"reward.weights: {alike[0]} is in two folders, and metrics and evaluations show both by that name; rename "
            "a file or its function"
        )


def _check_told(recipe: Recipe, kind: Any, mistakes: list[str]) -> None:
    """Whether the network is told one guidance wherever the algorithm compares what it says."""
    drawn, settings = recipe.model.rollout_distilled_guidance, recipe.algorithm
    if drawn is None or drawn == recipe.model.distilled_guidance:
        return
    pulled = isinstance(settings, PullsToReference) and settings.reference_penalty > 0
    if pulled or (isinstance(kind, ComparesCalls) and kind.compares_calls):
        what = "algorithm.reference_penalty" if pulled else settings.name
        mistakes.append(
            f"model.rollout_distilled_guidance: {what} compares what is trained with calls without a gradient, which "
            "would be told another guidance; leave it out, or give model.distilled_guidance the same value"
        )


def _check_pairs_of_words(settings: Any, mistakes: list[str]) -> None:
    """Whether every pair of the rotation prefers something: one word on both sides makes an update of nothing."""
    if not isinstance(settings, PrefersWords) or settings.preference != "relative":
        return
    wanted, unwanted = settings.positive, settings.negative
    pairs = [
        (wanted[i % len(wanted)], unwanted[i % len(unwanted)]) for i in range(math.lcm(len(wanted), len(unwanted)))
    ]
    alike = next((word for word, other in pairs if word == other), None)
    if alike is not None and set(wanted) != set(unwanted):  # of which all is said elsewhere
        mistakes.append(
            f"algorithm.positive, algorithm.negative: the rotation compares {alike} with itself, and such an update "
            "has no preference; keep it on one side"
        )


def _check_words_read(reward: RewardSettings, settings: Any, mistakes: list[str]) -> None:
    """Whether a reward reads the control words: what none of them reads cancels in the difference."""
    words = isinstance(settings, ControlWords) and any((*settings.positive, *settings.negative))
    words = words and not (isinstance(settings, PrefersWords) and settings.preference == "absolute")
    used = rewards_used(reward)
    if not words or not used or any(rewards.find(name).reads_prompt for name in used):
        return
    without = "algorithm.preference=absolute" if isinstance(settings, PrefersWords) else "no words"
    mistakes.append(
        f"algorithm.positive, algorithm.negative: {', '.join(sorted(used))} reads no prompt, so no word changes it; "
        f"use another reward, for example emoji or hpsv2, or {without}"
    )


def average_stays(trainer: TrainerSettings) -> str:
    """A sentence where the running average, which is the result, would end as it begins; else ""."""
    if not trainer.ema_decay or trainer.ema_every <= trainer.steps:
        return ""
    return (
        f"trainer.ema_every: the average, which is the result, first moves at step {trainer.ema_every}, and the run "
        f"ends at trainer.steps={trainer.steps}; set trainer.ema_every=1, or more steps"
    )


def _check_sizes(recipe: Recipe, mistakes: list[str]) -> None:
    """prompts.sizes and sample.image_size: what the model, the algorithm and its pictures allow."""
    asked = {"prompts.sizes": recipe.prompts.sizes, "sample.image_size": recipe.sample.image_size}
    given = [key for key, value in asked.items() if value is not None]
    with contextlib.suppress(InputError):  # of a family that is not there, which is said above
        if given and not isinstance(families.find(recipe.model.name).load_class(), DrawsOtherSizes):
            mistakes.extend(f"{key}: {recipe.model.name} draws one size only; leave it out" for key in given)
            return
    if recipe.prompts.sizes is None:
        return
    name = recipe.algorithm.name
    kind = algorithms.find(name).load_class()
    if not (isinstance(kind, TakesAnySize) and kind.any_size):
        mistakes.append(f"prompts.sizes: {name} trains on one size; set model.image_size")


def _check_rewards(recipe: Recipe, mistakes: list[str]) -> None:
    reward = recipe.reward
    used = rewards_used(reward)
    if reward.name is not None and reward.weights:
        mistakes.append("reward: got reward.name and reward.weights; take one away, as reward.name=null")
    elif recipe.optimize is None and reward.name is None and not reward.weights:
        mistakes.append("reward: give reward.name, or reward.weights with at least one name and its weight")
    if recipe.evaluate.heldout is not None:
        if recipe.model.name == "emoji":
            mistakes.append("evaluate.heldout: the embedded model has a judge and a held-out reward of its own")
        if recipe.evaluate.heldout in used:
            mistakes.append(
                f"evaluate.heldout: {recipe.evaluate.heldout} is what is optimised; give another of "
                f"{', '.join(rewards.HELD_OUT_CANDIDATES)}"
            )
    if "taste" in used:
        if "taste" not in reward.source:
            mistakes.append("reward.source.taste: name the folder of a taste, for example tastes/mine")
    elif reward.taste is not None:
        mistakes.append("reward.taste: the reward taste is in neither reward.name nor reward.weights")
    for key, names, known in (
        ("source", reward.source, rewards_placed(recipe)),
        ("scale", reward.scale, used),
        ("noised", reward.noised, used),
    ):
        if idle := sorted(set(names) - known):
            mistakes.append(f"reward.{key}.{idle[0]}: {idle[0]} is in neither reward.name nor reward.weights")
    for name in sorted(used):
        entry = rewards.find(name)
        if names_a_file(name):
            key = "reward.name" if reward.name else "reward.weights"
            try:
                found = load_object(name, key=key)
            except InputError as error:
                mistakes.append(str(error))
            else:
                problem = "" if inspect.isclass(found) or not callable(found) else refused_call(found, None, [])
                if problem:
                    mistakes.append(f"{key}: {short_name(name)} is called as (images, prompts): {problem}")
        if entry.kind == "service" and name not in reward.source:
            mistakes.append(f"reward.source.{name}: give the server's URL, for example {entry.example}")


def _check_algorithm(recipe: Recipe, mistakes: list[str]) -> None:
    settings = recipe.algorithm
    name, kind = settings.name, algorithms.find(settings.name).load_class()
    _check_reward_use(recipe.reward, settings, kind, mistakes)
    if isinstance(settings, ChecksBatch):
        try:
            settings.check_batch(recipe.trainer.batch_size // recipe.trainer.micro_batches)
        except ValueError as error:
            mistakes.append(str(error))
    check_pictures(recipe.prompts, settings, kind, mistakes)
    if (
        isinstance(settings, ControlWords)
        and any(settings.positive)
        and set(settings.positive) == set(settings.negative)
    ):
        mistakes.append(
            f"algorithm.positive, algorithm.negative: both are {', '.join(settings.positive)}, so neither is "
            "preferred; give different words"
        )
    if recipe.trainer.optimizer == "adamw8bit" and recipe.trainer.sharding != "none":
        mistakes.append("trainer.optimizer: adamw8bit keeps its moments whole on each rank; set trainer.sharding=none")
    if (
        recipe.trainer.sharding != "none"
        and isinstance(settings, ComparesErrors)
        and settings.safeguard == "parameters"
    ):
        mistakes.append(
            "algorithm.safeguard: parameters compares gradients of whole networks, and trainer.sharding cuts them; "
            "set it to output, or trainer.sharding=none"
        )
    trained = trained_names(name)
    for key in sorted(set(recipe.trainer.lrs or ()) - set(trained)):
        mistakes.append(f"trainer.lrs.{key}: {name} trains {', '.join(trained)}{near(key, trained, 'trainer.lrs.')}")


def _check_reward_use(reward: RewardSettings, settings: Any, kind: Any, mistakes: list[str]) -> None:
    """Whether the algorithm can use the reward; what would otherwise show once it is first asked, or never."""
    used = rewards_used(reward)
    entries, name = [rewards.find(each) for each in used], settings.name
    names, key = ", ".join(sorted(used)), "reward.name" if reward.name else "reward.weights"
    if used and len(without_effect(reward, settings, kind)) == len(used):
        alone = ", or algorithm.reward_scale=0" if isinstance(settings, ScalesReward) else ""
        if isinstance(settings, AsksBlackBox):
            alone = ", algorithm.head_queries=16 (a head that learns it)" + alone
        mistakes.append(
            f"{key}: {name} needs the reward's gradient, and {names} gives none; use a differentiable "
            f"reward, algorithm.name=ddpo, flow_grpo or nft, or an oracle and palate optimize{alone}"
        )
    parts = reward.weights is not None and reward.relative is None
    if isinstance(settings, ComparesParts) and settings.per_reward and not parts:
        mistakes.append(
            "algorithm.per_reward: it compares the parts of reward.weights, without reward.relative; give two or more, "
            "or set algorithm.per_reward=false"
        )
    if reward.relative is None:
        return
    if isinstance(settings, ControlWords):
        mistakes.append(f"reward.relative: {name} has words of its own; set algorithm.positive and algorithm.negative")
    if reward.relative.positive == reward.relative.negative:
        mistakes.append("reward.relative: give positive, negative, or both, and not the same word twice")
    if used and not any(entry.reads_prompt for entry in entries):
        mistakes.append(
            f"reward.relative: {names} reads no prompt, so no word changes it; use another reward, "
            "for example emoji or hpsv2, or leave reward.relative out"
        )


def without_effect(reward: RewardSettings, settings: Any, kind: Any) -> list[str]:
    """The rewards that are optimised and give no gradient, where the algorithm moves by gradients alone."""
    idle = isinstance(settings, ScalesReward) and settings.reward_scale == 0
    idle = idle or (isinstance(settings, AsksBlackBox) and settings.head_queries > 0)
    if idle or not (isinstance(kind, NeedsRewardGradient) and kind.needs_reward_gradient):
        return []
    return sorted(name for name in rewards_used(reward) if not rewards.find(name).gradient)


def _check_oracle(recipe: Recipe, mistakes: list[str]) -> None:
    assert recipe.optimize is not None, "asked of a recipe with that section"
    oracle = recipe.optimize.oracle
    keys = ("name", "function", "command", "url", "checklist")
    ways = {key: value for key, value in vars(oracle).items() if key in keys}
    given = [f"optimize.oracle.{key}" for key, value in ways.items() if value is not None]
    if len(given) != 1:
        mistakes.append(
            f"optimize.oracle: give exactly one of its keys {', '.join(keys)}; got {' and '.join(given) or 'none'}"
        )
    if oracle.noise and oracle.name is None:
        mistakes.append("optimize.oracle.noise: only a built-in oracle (optimize.oracle.name) takes noise")
    if recipe.reward.name or recipe.reward.weights or recipe.reward.relative:
        mistakes.append("reward: leave it out with optimize, where the surrogate of the oracle is the reward")
    if recipe.trainer.guard.every:
        mistakes.append(
            "trainer.guard.every: set 0 with optimize, where a guard would compare each round with its own "
            "start; evaluate the result with palate evaluate"
        )

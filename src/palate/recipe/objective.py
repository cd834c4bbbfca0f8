"""What a run optimises, built here only: for training as one reward, for evaluation as rewards by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from palate.core import EmbedsImages, Reward
from palate.recipe.cross_checks import ControlWords
from palate.recipe.identity import weights_digest
from palate.recipe.reader import content_digest
from palate.recipe.settings import Recipe, RewardSettings, TasteSettings
from palate.rewards.combine import noised_relative, normalised, semantic_relative, weighted
from palate.rewards.load import load_reward
from palate.rewards.oracles import exact_reward
from palate.rewards.table import find
from palate.runtime.code import code_digest, names_a_file, short_name
from palate.runtime.errors import InputError
from palate.runtime.files import json_digest
from palate.taste import card as cards
from palate.taste.reward import TasteReward
from palate.taste.saved import about, parts_of, source_of
from palate.taste.taste import load_objective

ORACLE = "oracle-"  # begins the name under which a built-in oracle is a reward of an evaluation


@dataclass(frozen=True)
class Term:
    """One reward of the objective. scale: (mean, std), of which (R - mean) / std is weighed; noised: see
    `rewards.combine.noised_relative`."""

    name: str
    weight: float = 1.0
    source: str | None = None
    dtype: str | None = None
    scale: tuple[float, float] | None = None
    noised: float | None = None
    taste: TasteSettings | None = None  # of the reward "taste", and where the weights of the one that it stands on are
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in metrics: that of a file without its folder."""
        return short_name(self.name)

    def load(self) -> Reward:
        """The reward by itself."""
        if self.name.startswith(ORACLE):
            return exact_reward(self.name.removeprefix(ORACLE))
        if self.name == "taste":
            how = self.taste or TasteSettings()
            return load_objective(
                self.source, absolute=how.absolute, confidence=how.confidence,
                base=lambda name: load_reward(name, self.sources.get(name), self.dtype),
            )  # fmt: skip
        return load_reward(self.name, self.source, self.dtype)

    def digest(self) -> str | None:
        """What tells its reward from another of that label: a digest of a file's code, of a taste, of a checklist and
        its judge's name; the address of a service. None where the name says it all, wherever the weights lie."""
        if self.name == "taste":
            how = self.taste or TasteSettings()
            tastes = [[weights_digest(folder), weight] for folder, weight in parts_of(self.source)]
            return json_digest([tastes, how.absolute, how.confidence])
        if names_a_file(self.name):
            return code_digest(self.name)
        if self.name == "checklist" and self.source:
            questions, _, judge = self.source.rpartition(" ")
            return json_digest([content_digest(questions), judge.partition("#")[2]])
        return self.source if not self.name.startswith(ORACLE) and find(self.name).kind == "service" else None

    def part(self, reward: Reward) -> Reward:
        """The reward as it is weighed."""
        if self.noised is not None:
            reward = noised_relative(reward, self.noised)
        return normalised(reward, *self.scale) if self.scale is not None else reward


@dataclass(frozen=True)
class Objective:
    """Terms, summed by their weights; with pairs of control words (positive, negative) the mean over the pairs of
    (1 + k) R(x, "positive. prompt") - R(x, "negative. prompt")."""

    terms: tuple[Term, ...]
    summed: bool = False  # whether the recipe gives weights
    pairs: tuple[tuple[str, str], ...] = ()
    k: float = 0.0

    def terms_loaded(self) -> dict[str, Reward]:
        """The reward of each term by itself, by name."""
        return {term.name: term.load() for term in self.terms}

    def reward(self, loaded: Mapping[str, Reward] | None = None) -> Reward:
        """What is handed to the loop. loaded: what `terms_loaded` gave, if somebody asked for it before."""
        loaded = self.terms_loaded() if loaded is None else loaded
        parts = {term.name: (term.weight, term.part(loaded[term.name])) for term in self.terms}
        reward = weighted(parts) if self.summed else parts[self.terms[0].name][1]
        return self._relative(reward) if self.pairs else reward

    def load(self, have: Mapping[str, Reward]) -> dict[str, Reward]:
        """The rewards in `have` and those of the terms, by label."""
        return {**have, **{term.label: term.load() for term in self.terms if term.label not in have}}

    def rewards(self, have: Mapping[str, Reward], heldout: str) -> tuple[dict[str, Reward], list[str]]:
        """What an evaluation asks, by name, and the names of what is optimised, the objective itself first: "weighted"
        is a sum, also of one reward with a weight below 0, "NAME-relative" what control words make of NAME. The
        held-out reward is asked for the same words."""
        rewards = self.load(have)
        optimised = [term.label for term in self.terms]
        if not optimised:
            return rewards, []
        parts = {term.label: (term.weight, term.part(rewards[term.label])) for term in self.terms}
        label = optimised[0]
        objective = parts[label][1]
        if len(self.terms) > 1 or self.terms[0].weight < 0:  # of a single reward that is to fall, the sum is to rise
            objective, label = weighted(parts), "weighted"
            rewards[label] = objective
            optimised.insert(0, label)
        if self.pairs:
            label = f"{label}-relative"
            rewards[label] = self._relative(objective)
            rewards[f"{heldout}-relative"] = self._relative(rewards[heldout])
            optimised.insert(0, label)
        return rewards, optimised

    def with_words(self, positive: Sequence[str], negative: Sequence[str]) -> Objective:
        """The same for other control words; a side without words leaves the prompt as it is."""
        if not (positive or negative):
            return replace(self, pairs=())
        return replace(self, pairs=tuple((p, n) for p in positive or [""] for n in negative or [""]))

    def description(self) -> dict[str, Any]:
        """What tells one weighted or relative reward from another of that name, as JSON values."""
        found: dict[str, Any] = {"weights": {term.label: term.weight for term in self.terms}}
        if scale := {term.label: list(term.scale) for term in self.terms if term.scale is not None}:
            found["scale"] = scale
        if noised := {term.label: term.noised for term in self.terms if term.noised is not None}:
            found["noised"] = noised
        return found

    def _relative(self, reward: Reward) -> Reward:
        if len(self.pairs) == 1:
            return semantic_relative(reward, *self.pairs[0], self.k)
        share = 1 / len(self.pairs)
        return weighted({f"{p}|{n}": (share, semantic_relative(reward, p, n, self.k)) for p, n in self.pairs})


def objective_of(recipe: Recipe) -> Objective:
    """What the recipe optimises: its rewards, or its built-in oracle. An algorithm with control words of its own is
    handed the rewards without them."""
    if recipe.optimize is not None:
        oracle = recipe.optimize.oracle.name
        return Objective((Term(f"{ORACLE}{oracle}"),) if oracle else ())
    return reward_objective(recipe.reward)


def reward_objective(settings: RewardSettings) -> Objective:
    """What a recipe's `reward` section says."""
    weights = settings.weights or ({settings.name: 1.0} if settings.name else {})
    terms = tuple(
        Term(
            name,
            weight,
            settings.source.get(name),
            settings.dtype,
            settings.scale.get(name),
            settings.noised.get(name),
            settings.taste if name == "taste" else None,
            settings.source,
        )
        for name, weight in weights.items()
    )
    relative = settings.relative
    pairs = ((relative.positive, relative.negative),) if relative is not None else ()
    return Objective(terms, settings.name is None, pairs, relative.k if relative is not None else 0.0)


def check_taste(settings: RewardSettings, model: str) -> None:
    """InputError: the recipe aligns to a taste that is not learnt, and does not say that it wants to, or to a taste of
    other pictures than the model of that name draws."""
    if settings.name != "taste" and "taste" not in (settings.weights or ()):
        return
    unlearnt = settings.taste is not None and settings.taste.allow_unlearnt
    for folder, _ in parts_of(settings.source.get("taste")):
        if model != "emoji" and source_of(folder) == "emoji":
            raise InputError(
                f"reward.source.taste: {folder} stands on the embedded model's reward, which knows no other pictures: "
                "palate taste fit VOTES --features clip-score"
            )
        if unlearnt:
            continue
        card = about(folder)["card"]
        if not cards.learnt(card):
            why = "A sum of tastes, of which one is not learnt." if "mixed" in card else cards.verdict(card)
            raise InputError(
                f"reward.source.taste: {folder}: {why} To train towards it all the same, set "
                "reward.taste.allow_unlearnt=true."
            )


def image_tower(rewards: Iterable[Reward]) -> EmbedsImages | None:
    """The first of the rewards that has an image tower of its own; a taste has that of the reward that it stands on."""
    for reward in rewards:
        own = reward.features.tower if isinstance(reward, TasteReward) else reward
        if isinstance(own, EmbedsImages):
            return own
    return None


def control_words(recipe: Recipe) -> dict[str, list[str]]:
    """{"positive": [...], "negative": [...]} of the recipe: those of reward.relative, else the algorithm's."""
    if (relative := recipe.reward.relative) is not None:
        return {
            "positive": [relative.positive] if relative.positive else [],
            "negative": [relative.negative] if relative.negative else [],
        }
    settings = recipe.algorithm
    if isinstance(settings, ControlWords):
        return {"positive": list(settings.positive), "negative": list(settings.negative)}
    return {"positive": [], "negative": []}

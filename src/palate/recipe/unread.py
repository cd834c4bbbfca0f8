"""Settings that nothing reads beside other settings of the recipe, so that an override of them does nothing.

A recipe may hold them, as those do that a run writes; whoever asks for one on the command line is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from palate.recipe.cross_checks import judge_guards
from palate.recipe.guard import GuardSettings
from palate.recipe.settings import Recipe


class Unread(NamedTuple):
    """Keys that are not read where `holds`; `why` says so, and by it what to change."""

    keys: tuple[str, ...]
    holds: Callable[[Any, Recipe], bool]
    why: str


def drawn_by_others(recipe: Recipe) -> bool:
    """Whether pairs of pictures or likes are given."""
    return bool(recipe.prompts.pairs or recipe.prompts.likes)


RELEASED = ("timestep_length", "groundtruth_ratio", "train_timestep", "vis_sampling_step")
ROLLOUT = ("rollout_steps", "rollout_guidance", "rollout_weights", "shared_noise", "noise")
DRAWING = ("pairs_from", "candidates", "steps", "guidance", "shift", "tie_margin")
BY_JUDGE = ("heldout_drop", "concept_drop", "background_drop", "diversity_ratio")  # limits of the guard
BY_IMAGES = (
    "steps", "cast_shift", "saturation_shift", "detail_shift", "drift", "latent_drift", "variety_ratio", "fit_ratio",
    "duplicates_rise", "heldout_fall",
)  # fmt: skip
TABLE: dict[str, tuple[Unread, ...]] = {
    "srpo": (
        Unread(RELEASED, lambda a, r: a.levels == "window", "algorithm.levels=window"),
        Unread(("window", "step"), lambda a, r: a.levels == "released", "algorithm.levels=released"),
        Unread(("k_denoise",), lambda a, r: "denoise" not in a.branches, "algorithm.branches without denoise"),
        Unread(("k_inversion",), lambda a, r: "inversion" not in a.branches, "algorithm.branches without inversion"),
        Unread(ROLLOUT, lambda a, r: r.prompts.images is not None, "prompts.images, which take the rollout's place"),
        Unread(
            ("shift",),
            lambda a, r: r.prompts.images is not None and a.levels == "window",
            "prompts.images, which take the rollout's place, and algorithm.levels=window",
        ),
    ),
    "flow_grpo": (
        Unread(("clip",), lambda a, r: a.trust == "kl", "algorithm.trust=kl"),
        Unread(("kl_limit",), lambda a, r: a.trust == "clip", "algorithm.trust=clip"),
        Unread(("window_every",), lambda a, r: a.window is None, "no algorithm.window"),
        Unread(("fraction_rounding",), lambda a, r: a.fraction == 1, "algorithm.fraction=1"),
        Unread(("kl_unit",), lambda a, r: a.beta == 0, "algorithm.beta=0"),
        Unread(("baseline",), lambda a, r: a.per_reward, "algorithm.per_reward=true"),
    ),
    "distar": (
        Unread(("c",), lambda a, r: a.distance == "l2", "algorithm.distance=l2"),
        Unread(("cfg",), lambda a, r: a.alpha_cfg == 0, "algorithm.alpha_cfg=0"),
        Unread(
            ("reward_cap", "reward_start_step", "head_queries"),
            lambda a, r: a.reward_scale == 0,
            "algorithm.reward_scale=0",
        ),
        Unread(
            ("head_memory", "head_first"),
            lambda a, r: a.head_queries == 0 or a.reward_scale == 0,
            "algorithm.head_queries=0 or algorithm.reward_scale=0",
        ),
    ),
    "sqdf": (Unread(("buffer_size", "buffer_memory"), lambda a, r: a.buffer == "none", "algorithm.buffer=none"),),
    "dpo": (
        Unread(DRAWING, lambda a, r: drawn_by_others(r), "pictures that are given, so that none are drawn"),
        Unread(("posterior",), lambda a, r: not drawn_by_others(r), "pictures that are drawn, not encoded"),
        Unread(("mu",), lambda a, r: a.safeguard == "off", "algorithm.safeguard=off"),
        Unread(("desirable_weight", "undesirable_weight"), lambda a, r: a.loss != "kto", "an algorithm.loss but kto"),
    ),
    "nft": (Unread(("old_most", "old_from"), lambda a, r: a.old_rate == 0, "algorithm.old_rate=0"),),
    "dgpo": (
        Unread(("kl_guidance",), lambda a, r: a.kl == 0, "algorithm.kl=0"),
        Unread(
            ("old_rate", "old_most"),
            lambda a, r: a.clip is None and a.reference == "frozen" and a.kl_old == 0,
            "no algorithm.clip, algorithm.reference=frozen and algorithm.kl_old=0, without old weights",
        ),
    ),
    "direct": (Unread(("context_steps",), lambda a, r: not a.context, "no algorithm.context"),),
    "ddpo": (Unread(("enough",), lambda a, r: a.history == 0, "algorithm.history=0"),),
    "leap_align": (
        Unread(("nested",), lambda a, r: a.leaps == 1, "algorithm.leaps=1"),
        Unread(("tau",), lambda a, r: not a.weighted, "algorithm.weighted=false"),
    ),
    "opd": (Unread(("target",), lambda a, r: a.eta > 0, "algorithm.eta above 0, where the KL is what is trained"),),
}


SECTIONS: dict[str, tuple[Unread, ...]] = {  # likewise, of the other sections
    "model": (
        Unread(("lora_rank", "lora_alpha", "lora_targets"), lambda a, r: a.weights == "full", "model.weights=full"),
        Unread(
            ("lora_targets",),
            lambda a, r: a.weights == "lora" and a.start is not None,
            "model.start, whose layers the LoRA has",
        ),
    ),
    "trainer": (
        Unread(("ema_every",), lambda a, r: a.ema_decay == 0, "trainer.ema_decay=0"),
        Unread(("reduce_gradients",), lambda a, r: a.sharding == "none", "trainer.sharding=none"),
    ),
    "trainer.guard": (
        Unread(("rollbacks",), lambda a, r: a.action != "rollback", "no trainer.guard.action=rollback"),
        Unread(
            tuple(field.name for field in dataclasses.fields(GuardSettings) if field.name != "every"),
            lambda a, r: a.every == 0,
            "trainer.guard.every=0",
        ),
        Unread(
            BY_IMAGES, lambda a, r: judge_guards(r), "the embedded model's judge, not trainer.guard.measures=images"
        ),
        Unread(BY_JUDGE, lambda a, r: not judge_guards(r), "image measures and no judge, which the embedded model has"),
    ),
    "optimize": (
        Unread(("heads",), lambda a, r: a.surrogate != "bootstrap", "no optimize.surrogate=bootstrap"),
        Unread(("exploration",), lambda a, r: a.surrogate != "ucb", "no optimize.surrogate=ucb"),
    ),
}


def unread_overrides(recipe: Recipe, overrides: Sequence[str]) -> Iterator[str]:
    """A sentence for each override of a setting that nothing reads beside the recipe's others; one that asks for the
    default asks for nothing."""
    given = {override.partition("=")[0] for override in overrides}
    rules = {**SECTIONS, "algorithm": TABLE.get(recipe.algorithm.name, ())}
    sections: dict[str, Any] = {
        "algorithm": recipe.algorithm, "model": recipe.model, "trainer": recipe.trainer,
        "trainer.guard": recipe.trainer.guard, "optimize": recipe.optimize,
    }  # fmt: skip
    for section, settings in sections.items():
        for rule in rules[section] if settings is not None else ():
            if rule.holds(settings, recipe):
                for key in rule.keys:
                    if f"{section}.{key}" in given and vars(settings)[key] != default_of(settings, key):
                        yield f"{section}.{key}: nothing reads it with {rule.why}; leave it out, or change that"


def default_of(settings: Any, key: str) -> Any:
    """What the setting is where a recipe does not name it."""
    kind: type = type(settings)
    return next(field.default for field in dataclasses.fields(kind) if field.name == key)

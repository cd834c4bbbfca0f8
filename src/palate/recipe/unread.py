"""Settings that nothing reads beside other settings of the recipe, so that an override of them does nothing.

A recipe may hold them, as those do that a run writes; whoever asks for one on the command line is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from palate.recipe.settings import PromptSettings, Recipe


class Unread(NamedTuple):
    """Keys that are not read where `holds`; `why` says so, and by it what to change."""

    keys: tuple[str, ...]
    holds: Callable[[Any, PromptSettings], bool]
    why: str


RELEASED = ("timestep_length", "groundtruth_ratio", "train_timestep", "vis_sampling_step")
ROLLOUT = ("rollout_steps", "rollout_guidance", "rollout_weights", "shared_noise", "noise")
DRAWING = ("pairs_from", "candidates", "steps", "guidance", "shift", "tie_margin")
TABLE: dict[str, tuple[Unread, ...]] = {
    "srpo": (
        Unread(RELEASED, lambda a, p: a.levels == "window", "algorithm.levels=window"),
        Unread(("window", "step"), lambda a, p: a.levels == "released", "algorithm.levels=released"),
        Unread(("k_denoise",), lambda a, p: "denoise" not in a.branches, "algorithm.branches without denoise"),
        Unread(("k_inversion",), lambda a, p: "inversion" not in a.branches, "algorithm.branches without inversion"),
        Unread(ROLLOUT, lambda a, p: p.images is not None, "prompts.images, which take the rollout's place"),
        Unread(
            ("shift",),
            lambda a, p: p.images is not None and a.levels == "window",
            "prompts.images, which take the rollout's place, and algorithm.levels=window",
        ),
    ),
    "flow_grpo": (
        Unread(("clip",), lambda a, p: a.trust == "kl", "algorithm.trust=kl"),
        Unread(("kl_limit",), lambda a, p: a.trust == "clip", "algorithm.trust=clip"),
        Unread(("window_every",), lambda a, p: a.window is None, "no algorithm.window"),
        Unread(("fraction_rounding",), lambda a, p: a.fraction == 1, "algorithm.fraction=1"),
        Unread(("kl_unit",), lambda a, p: a.beta == 0, "algorithm.beta=0"),
        Unread(("baseline",), lambda a, p: a.per_reward, "algorithm.per_reward=true"),
    ),
    "distar": (
        Unread(("c",), lambda a, p: a.distance == "l2", "algorithm.distance=l2"),
        Unread(("cfg",), lambda a, p: a.alpha_cfg == 0, "algorithm.alpha_cfg=0"),
        Unread(
            ("reward_cap", "reward_start_step", "head_queries"),
            lambda a, p: a.reward_scale == 0,
            "algorithm.reward_scale=0",
        ),
        Unread(
            ("head_memory", "head_first"),
            lambda a, p: a.head_queries == 0 or a.reward_scale == 0,
            "algorithm.head_queries=0 or algorithm.reward_scale=0",
        ),
    ),
    "sqdf": (Unread(("buffer_size", "buffer_memory"), lambda a, p: a.buffer == "none", "algorithm.buffer=none"),),
    "dpo": (
        Unread(DRAWING, lambda a, p: bool(p.pairs or p.likes), "pictures that are given, so that none are drawn"),
        Unread(("posterior",), lambda a, p: not (p.pairs or p.likes), "pictures that are drawn, not encoded"),
        Unread(("mu",), lambda a, p: a.safeguard == "off", "algorithm.safeguard=off"),
        Unread(("desirable_weight", "undesirable_weight"), lambda a, p: a.loss != "kto", "an algorithm.loss but kto"),
    ),
    "nft": (Unread(("old_most", "old_from"), lambda a, p: a.old_rate == 0, "algorithm.old_rate=0"),),
    "dgpo": (
        Unread(("kl_guidance",), lambda a, p: a.kl == 0, "algorithm.kl=0"),
        Unread(
            ("old_rate", "old_most"),
            lambda a, p: a.clip is None and a.reference == "frozen" and a.kl_old == 0,
            "no algorithm.clip, algorithm.reference=frozen and algorithm.kl_old=0, without old weights",
        ),
    ),
    "direct": (Unread(("context_steps",), lambda a, p: not a.context, "no algorithm.context"),),
    "ddpo": (Unread(("enough",), lambda a, p: a.history == 0, "algorithm.history=0"),),
    "leap_align": (
        Unread(("nested",), lambda a, p: a.leaps == 1, "algorithm.leaps=1"),
        Unread(("tau",), lambda a, p: not a.weighted, "algorithm.weighted=false"),
    ),
    "opd": (Unread(("target",), lambda a, p: a.eta > 0, "algorithm.eta above 0, where the KL is what is trained"),),
}


SECTIONS: dict[str, tuple[Unread, ...]] = {  # likewise, of the other sections
    "model": (
        Unread(("lora_rank", "lora_alpha", "lora_targets"), lambda a, p: a.weights == "full", "model.weights=full"),
        Unread(
            ("lora_targets",),
            lambda a, p: a.weights == "lora" and a.start is not None,
            "model.start, whose layers the LoRA has",
        ),
    ),
    "trainer": (Unread(("ema_every",), lambda a, p: a.ema_decay == 0, "trainer.ema_decay=0"),),
    "trainer.guard": (
        Unread(("rollbacks",), lambda a, p: a.action != "rollback", "no trainer.guard.action=rollback"),
        Unread(("after",), lambda a, p: a.every == 0, "trainer.guard.every=0"),
    ),
    "optimize": (
        Unread(("heads",), lambda a, p: a.surrogate != "bootstrap", "no optimize.surrogate=bootstrap"),
        Unread(("exploration",), lambda a, p: a.surrogate != "ucb", "no optimize.surrogate=ucb"),
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
            if rule.holds(settings, recipe.prompts):
                for key in rule.keys:
                    if f"{section}.{key}" in given and vars(settings)[key] != default_of(settings, key):
                        yield f"{section}.{key}: nothing reads it with {rule.why}; leave it out, or change that"


def default_of(settings: Any, key: str) -> Any:
    """What the setting is where a recipe does not name it."""
    kind: type = type(settings)
    return next(field.default for field in dataclasses.fields(kind) if field.name == key)

"""Recipes: YAML read into typed dataclasses; every mistake is reported at once, before any weight loads.

`read` gives a checked `Recipe`; `build` turns it into the objects that `palate.train` takes. A published recipe is
named without its folder or ending (`srpo-emoji`), any other by its path; overrides are `trainer.steps=40`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from palate.data import RecipeError, captioned_images, evenly_spaced, read_prompts
from palate.recipe.checks import SECTIONS, algorithm_settings, check_trainer, homes_of
from palate.recipe.cross_checks import heldout_of, trained_names
from palate.recipe.reader import YAML_LIMIT, as_tree, begun, dump, fingerprint, parse, published, read, text_of
from palate.recipe.settings import (
    RESUMABLE_FIELDS,
    AlgorithmSettings,
    EvaluateSettings,
    GuardSettings,
    ModelSettings,
    OptimizeSettings,
    OracleSettings,
    PromptSettings,
    Recipe,
    RelativeSettings,
    RewardSettings,
    RunSettings,
    SampleSettings,
    TrainerSettings,
)
from palate.runtime.code import imported
from palate.runtime.deprecated import old_names

if TYPE_CHECKING:
    from palate.recipe.algorithm import build_algorithm
    from palate.recipe.builder import (
        Parts,
        as_asked,
        build,
        build_model,
        build_reward,
        build_whole_model,
        sampler_of,
    )
    from palate.recipe.evaluators import guard_measure, panel_of
    from palate.recipe.identity import check_identity, identity_text, run_identity
    from palate.recipe.objective import Objective, control_words, objective_of
    from palate.recipe.prompts import check_words, prompts_of
    from palate.recipe.start import (
        check_folder,
        check_named_files,
        check_start,
        load_consistency,
        reference_of,
        warn_of_noise,
    )
    from palate.rewards.load import load_reward

# These need torch, transformers and diffusers; a recipe is read and checked without them.
_LATER = {
    "Objective": "palate.recipe.objective",
    "Parts": "palate.recipe.builder",
    "as_asked": "palate.recipe.builder",
    "build": "palate.recipe.builder",
    "build_algorithm": "palate.recipe.algorithm",
    "build_model": "palate.recipe.builder",
    "build_reward": "palate.recipe.builder",
    "build_whole_model": "palate.recipe.builder",
    "check_identity": "palate.recipe.identity",
    "check_folder": "palate.recipe.start",
    "check_named_files": "palate.recipe.start",
    "check_start": "palate.recipe.start",
    "check_words": "palate.recipe.prompts",
    "control_words": "palate.recipe.objective",
    "guard_measure": "palate.recipe.evaluators",
    "load_consistency": "palate.recipe.start",
    "load_reward": "palate.rewards.load",
    "objective_of": "palate.recipe.objective",
    "panel_of": "palate.recipe.evaluators",
    "prompts_of": "palate.recipe.prompts",
    "reference_of": "palate.recipe.start",
    "run_identity": "palate.recipe.identity",
    "sampler_of": "palate.recipe.builder",
    "identity_text": "palate.recipe.identity",
    "warn_of_noise": "palate.recipe.start",
}
__all__ = [
    "RESUMABLE_FIELDS",
    "SECTIONS",
    "YAML_LIMIT",
    "AlgorithmSettings",
    "EvaluateSettings",
    "GuardSettings",
    "ModelSettings",
    "Objective",
    "OptimizeSettings",
    "OracleSettings",
    "Parts",
    "PromptSettings",
    "Recipe",
    "RecipeError",
    "RelativeSettings",
    "RewardSettings",
    "RunSettings",
    "SampleSettings",
    "TrainerSettings",
    "algorithm_settings",
    "as_asked",
    "as_tree",
    "begun",
    "build",
    "build_algorithm",
    "build_model",
    "build_reward",
    "build_whole_model",
    "captioned_images",
    "check_folder",
    "check_identity",
    "check_named_files",
    "check_start",
    "check_trainer",
    "check_words",
    "control_words",
    "dump",
    "evenly_spaced",
    "fingerprint",
    "guard_measure",
    "heldout_of",
    "homes_of",
    "identity_text",
    "load_consistency",
    "load_reward",
    "objective_of",
    "panel_of",
    "parse",
    "prompts_of",
    "published",
    "read",
    "read_prompts",
    "reference_of",
    "run_identity",
    "sampler_of",
    "text_of",
    "trained_names",
    "warn_of_noise",
]  # fmt: skip

_renamed = old_names(__name__, {"spread": evenly_spaced})


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return imported(_LATER[name], name)
    if name in ("HARMLESS", "guard_check", "referee_of"):  # old names, for one release
        now = {"HARMLESS": "RESUMABLE_FIELDS", "guard_check": "guard_measure", "referee_of": "panel_of"}[name]
        return globals()[now] if now in globals() else __getattr__(now)
    return _renamed(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

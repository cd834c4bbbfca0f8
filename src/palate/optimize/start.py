"""`palate optimize`: what a checked recipe becomes, and what may change when it is continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from palate.core import Sampleable, TextCached, TwoTower
from palate.optimize.loop import Search, optimize, round_sizes
from palate.optimize.oracles import load_oracle
from palate.optimize.surrogate import reward_features
from palate.recipe import builder, reader
from palate.recipe.algorithm import build_algorithm
from palate.recipe.identity import FILE, changes, identity_text
from palate.recipe.prompts import prompts_of
from palate.recipe.relocation import Moves, stored_moves, with_first_texts
from palate.recipe.settings import Recipe
from palate.recipe.start import check_folder, check_start, load_consistency
from palate.rewards.load import load_reward
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.files import json_digest, write_atomically
from palate.train import Outcome


def from_recipe(recipe: Recipe, *, progress: bool = True, say: Callable[[str], None] = print) -> Outcome:
    """What `palate optimize` does with a checked recipe that has an `optimize` section. progress: of each round's
    training; `say` gets a sentence for each round."""
    folder, settings = Path(recipe.run.folder), recipe.optimize
    assert settings is not None, "asked of a recipe with that section"
    checkpoint.check_space(folder, need=1 << 20)
    oracle = load_oracle(settings.oracle, seed=recipe.trainer.seed)  # the cheap things that can be wrong come first
    round_sizes(settings.budget, settings.rounds)
    stored = folder / "recipe.yaml"
    begun = reader.read(str(stored), stored=True) if stored.is_file() else reader.begun(recipe)
    if begun.optimize is None:
        raise InputError(f"{folder} holds a run of palate train; choose another run.folder, or replace it with --fresh")
    moves = stored_moves(folder)
    if identity_of(begun, moves) != identity_of(recipe, moves):
        recipe = reader.begun(recipe)  # a search of before has kept its paths as they were written
    if identity_of(begun, moves) != identity_of(recipe, moves) or besides(begun) != besides(recipe):
        raise InputError(
            f"{folder} was begun with other settings (its recipe.yaml); only how the oracle is reached "
            "may change. Choose another run.folder, or replace it with --fresh, answers included"
        )
    if stored.is_file() and (changed := changes(folder, recipe)):
        raise InputError(
            "\n".join([*changed, f"restore it, choose another run.folder, or delete {folder / FILE} to go "
                                 "on with the answers that are there"])
        )  # fmt: skip
    prompts, preview = prompts_of(recipe)
    check_folder(recipe)
    check_start(recipe)
    torch.manual_seed(recipe.trainer.seed)  # the LoRA's first weights
    model = builder.build_model(recipe)
    load_consistency(recipe, model)
    if isinstance(model, TextCached):
        model.cache_prompts([*prompts, *preview])
    if not stored.is_file() or not (folder / FILE).is_file():
        write_atomically(folder / FILE, identity_text(recipe).encode())
    write_atomically(stored, reader.dump(recipe).encode())
    tower = load_reward(settings.features, settings.features_source)
    assert isinstance(tower, TwoTower), "optimize.features names two-tower rewards only"
    assert isinstance(model, Sampleable), "every family can be sampled"
    search = Search(
        model,
        lambda: build_algorithm(recipe),
        oracle,
        reward_features(tower, prompts),
        prompts,
        folder,
        settings,
        recipe.trainer,
        sample=recipe.sample,
        preview=preview,
        identity=identity_of(recipe, moves),
    )
    return optimize(search, progress=progress, say=say)


def besides(recipe: Recipe) -> tuple[int | None, float | None, str]:
    """What decides the queries besides: how pictures are drawn, and the model of a judge. Not in `identity_of`, which
    the rounds of older searches have kept."""
    judge = ((recipe.optimize and recipe.optimize.oracle.checklist) or "").rpartition(" ")[2]
    return recipe.sample.steps, recipe.sample.guidance, judge.partition("#")[2]


def identity_of(recipe: Recipe, moves: Moves | None = None) -> str:
    """Hash of what decides the queries and the updates: not how the oracle is reached, nor how long one waits. moves:
    as of `reader.fingerprint`."""
    tree = with_first_texts(reader.as_tree(recipe), moves or {})
    ways = tree["optimize"]["oracle"]
    oracle = {key: value for key, value in ways.items() if key in ("name", "function", "noise")}
    kind = next((key for key in ("command", "url", "checklist") if ways[key] is not None), None)
    if kind == "checklist":  # the questions decide the score; the judge's address is only how it is reached
        oracle["questions"] = reader.content_digest(ways["checklist"].rpartition(" ")[0])
    return json_digest(
        [reader.fingerprint(recipe, moves), recipe.trainer.steps, {**tree["optimize"], "oracle": [kind, oracle]}]
    )

"""Sample folders and run folders: what lies on disk, judged by `palate.evaluate` and written beside it.

A sample folder holds 0000.png ... and index.jsonl, a row an image. `palate evaluate` leaves two of them in a run,
evaluation/base and evaluation/result, with evaluation.json: the same prompts and noise before and after.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from palate.core import Model, Reward
from palate.evaluate import (
    EvaluationPanel,
    Sampler,
    check_same,
    embedded_panel,
    evaluate_samples,
    generate,
    mean_and_interval,
    pairs,
    read_index,
    read_samples,
    round_floats,
    to_json,
    verdict,
    write_samples,
)
from palate.runtime.errors import InputError

__all__ = [
    "between", "check_same", "control_words", "evaluate_run", "evaluate_runs", "evaluate_samples", "read_index",
    "read_recipe", "read_samples", "run_names", "trained_model", "words_in_force", "write_samples",
]  # fmt: skip
ORACLE = "oracle-"  # begins the name under which a built-in oracle is a reward of an evaluation

# --- run folders ----------------------------------------------------------------------------------------------------


def control_words(recipe: dict[str, Any]) -> dict[str, list[str]]:
    """{"positive": [...], "negative": [...]} of the recipe: those of reward.relative, else the algorithm's."""
    if relative := (recipe.get("reward") or {}).get("relative"):
        return {side: [relative[side]] if relative.get(side) else [] for side in ("positive", "negative")}
    return {side: list((recipe.get("algorithm") or {}).get(side) or ()) for side in ("positive", "negative")}


def words_in_force(run_folder: str | Path, recipe: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The (positive, negative) control words at the end of the run: the recipe's, changed by the steering events."""
    words = control_words(recipe)
    log = Path(run_folder) / "metrics.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        row = json.loads(line)
        if row.get("event") == "steer":
            words |= {side: list(row[side]) for side in words if row.get(side) is not None}
    return words["positive"], words["negative"]


def _absolute(recipe: dict[str, Any]) -> float:
    """k of reward.relative, the weight of the absolute reward; 0 without it."""
    return ((recipe.get("reward") or {}).get("relative") or {}).get("k", 0.0)


def _shares(recipe: dict[str, Any]) -> dict[str, float]:
    """The named rewards that the run optimised, each with its weight; of an oracle that is built in, "oracle-NAME"."""
    settings = recipe.get("reward") or {}
    if oracle := ((recipe.get("optimize") or {}).get("oracle") or {}).get("name"):
        return {f"{ORACLE}{oracle}": 1.0}
    return settings.get("weights") or ({settings["name"]: 1.0} if settings.get("name") else {})


def _objective(recipe: dict[str, Any]) -> dict[str, Any]:
    """What tells one weighted or relative reward from another of that name."""
    settings = recipe.get("reward") or {}
    return {"weights": _shares(recipe)} | {key: settings[key] for key in ("scale", "noised") if settings.get(key)}


def _with_named(rewards: dict[str, Reward], recipe: dict[str, Any]) -> dict[str, Reward]:
    """The rewards and those that the recipe names."""
    from palate.optimize import exact_reward
    from palate.recipe import load_reward

    settings = recipe.get("reward") or {}
    source, dtype = settings.get("source") or {}, settings.get("dtype")

    def load(name: str) -> Reward:
        if name.startswith(ORACLE):
            return exact_reward(name.removeprefix(ORACLE))
        return load_reward(name, source.get(name), dtype)

    return rewards | {n: load(n) for n in _shares(recipe) if n not in rewards}


def _with_optimised(
    rewards: dict[str, Reward], heldout: str, recipe: dict[str, Any], words: tuple[list[str], list[str]]
) -> tuple[dict[str, Reward], list[str]]:
    """The rewards with what the run optimised among them, and its names, the objective itself first: a weighted sum
    for reward.weights, the mean relative reward over the pairs of control words when there are any (with the k of
    reward.relative). The held-out reward is asked for the same preference."""
    from palate.rewards.combine import noised_relative, normalised, semantic_relative, weighted

    settings = recipe.get("reward") or {}
    shares = _shares(recipe)
    rewards = _with_named(rewards, recipe)
    optimised = list(shares)
    if not optimised:
        return rewards, []

    def part(name: str) -> Reward:
        reward = rewards[name]
        if std := (settings.get("noised") or {}).get(name):
            reward = noised_relative(reward, std)
        scale = (settings.get("scale") or {}).get(name)
        return normalised(reward, *scale) if scale else reward

    objective, label = part(optimised[0]), optimised[0]
    if len(shares) > 1:
        objective, label = weighted({name: (share, part(name)) for name, share in shares.items()}), "weighted"
        rewards[label] = objective
        optimised.insert(0, label)
    positive, negative = words
    if positive or negative:
        chosen = [(p, n) for p in positive or [""] for n in negative or [""]]

        def relative(reward: Reward) -> Reward:
            k = _absolute(recipe)
            return weighted({f"{p}|{n}": (1 / len(chosen), semantic_relative(reward, p, n, k)) for p, n in chosen})

        label = f"{label}-relative"
        rewards[label] = relative(objective)
        rewards[f"{heldout}-relative"] = relative(rewards[heldout])
        optimised.insert(0, label)
    return rewards, optimised


def evaluate_run(
    run_folder: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    model: Model | None = None,
    panel: EvaluationPanel | None = None,
    sampler: Sampler | None = None,
    stored: bool = False,
) -> dict[str, Any]:
    """Base model against the run's result on prompts x seeds from the same noise: every reward with the optimised one
    marked, a verdict, the images. Writes evaluation/{base,result}/ and evaluation.json into the run folder and returns
    the latter. None = what the recipe's evaluate section says. `stored`: judge the images that lie there already."""
    run_folder = Path(run_folder)
    recipe = read_recipe(run_folder)
    panel = panel or _panel(run_folder, recipe)
    words = words_in_force(run_folder, recipe)
    rewards, optimised = _with_optimised(panel.rewards, panel.heldout, recipe, words)
    folders = {side: run_folder / "evaluation" / side for side in ("base", "result")}
    if stored:
        _check_stored(run_folder)
    else:
        prompts = _prompts(recipe) if prompts is None else list(prompts)
        seeds = _seeds(recipe) if seeds is None else list(seeds)
        if model is None:
            model, sampler = trained_model(run_folder)
        how = recipe.get("sample") or {}
        steps = how.get("steps") or model.default_steps
        guidance = model.default_guidance if how.get("guidance") is None else how["guidance"]
        columns = pairs(prompts, seeds)
        for side, weights in (("base", "reference"), ("result", "policy")):
            own = sampler if side == "result" else None  # a generator is judged beside its teacher, drawn in many steps
            images = generate(model, prompts, seeds, steps=steps, guidance=guidance, weights=weights, sampler=own)
            write_samples(
                folders[side], images, *columns, guidance=1.0 if own else guidance, steps=own.steps if own else steps
            )
    result = evaluate_samples(folders["result"], base_folder=folders["base"], panel=panel._replace(rewards=rewards))
    result |= {
        "optimised": optimised,
        "heldout": panel.heldout,
        "objective": _objective(recipe),
        "words": {"positive": words[0], "negative": words[1]} | ({"k": k} if (k := _absolute(recipe)) else {}),
        "verdict": verdict(
            result["metrics"], optimised, panel.heldout, result["failed"], num_prompts=result["prompts"]
        ),
    }
    if f"{ORACLE}hidden-judge" in optimised:
        result["verdict"]["warnings"].append(
            "the oracle was the judge itself: concepts, diversity and drift are not "
            "independent of what was optimised; the held-out reward is"
        )
    _write(run_folder / "evaluation.json", to_json(result))
    return result


def evaluate_runs(
    run_folders: Sequence[str | Path],
    *,
    prompts: Sequence[str] | None = None,
    count: int | None = None,
    seeds: Sequence[int] | None = None,
    stored: bool = False,
    panel: EvaluationPanel | None = None,
    load: Callable[[Path], tuple[Model, Sampler | None]] | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, Any]:
    """`evaluate_run` for each, on the same prompts and seeds and by the same rewards: those that any of the runs
    optimised are asked of all. Returns {"first": name, "runs": {name: evaluation}, "between": {name: {metric: ...}}},
    the last as `between` gives it against the first run.

    prompts, count (at most so many), seeds: None = each recipe's own, which must then agree. ValueError before any
    image is drawn where they do not. `load`: folder -> model, sampler; None = `trained_model`. `warn` hears of runs
    whose base model was drawn in other steps or with other guidance.
    """
    folders = [Path(folder) for folder in run_folders]
    names = run_names(folders)
    recipes = [read_recipe(folder) for folder in folders]
    asked = []
    for folder, recipe in zip(folders, recipes, strict=True):
        if stored:
            _check_stored(folder)
            asked.append(read_index(folder / "evaluation" / "result"))
        else:
            words = _prompts(recipe, prompts, count)
            drawn = pairs(words, _seeds(recipe) if seeds is None else seeds)
            asked.append([{"prompt": p, "seed": s} for p, s in zip(*drawn, strict=True)])
        check_same(asked[0], asked[-1], names[0], names[len(asked) - 1])
    if panel is None:
        judges = [_judged_by(folder, recipe) for folder, recipe in zip(folders, recipes, strict=True)]
        for name, judge in zip(names, judges, strict=True):
            if judge != judges[0]:
                raise InputError(
                    f"{names[0]} is judged by {judges[0]}, {name} by {judge}; set evaluate.heldout in the "
                    "recipe.yaml of both to one that neither optimised"
                )
        panel = _panel(folders[0], recipes[0])
    for recipe in recipes:
        panel = panel._replace(rewards=_with_named(panel.rewards, recipe))
    found = {}
    for name, folder, recipe in zip(names, folders, recipes, strict=True):
        model, sampler = (None, None) if stored else (load or trained_model)(folder)
        drawn = {} if stored else {"prompts": _prompts(recipe, prompts, count), "seeds": seeds}
        found[name] = evaluate_run(folder, model=model, sampler=sampler, panel=panel, stored=stored, **drawn)
    first, ways = names[0], [_drawn(folder) for folder in folders]
    for name, way in zip(names, ways, strict=True):
        if way != ways[0]:
            warn(
                f"{first} is drawn with {ways[0]}, {name} with {way}: more than the training differs between them; "
                "give both the same sample.guidance and sample.steps"
            )
    return {"first": first, "runs": found, "between": {name: between(found[first], found[name]) for name in names[1:]}}


def run_names(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, or its path where two are alike. ValueError when one occurs twice."""
    whole = [str(folder.resolve()) for folder in folders]
    for i, path in enumerate(whole):
        if path in whole[:i]:
            raise InputError(f"run {folders[i]} is given twice; name each run once")
    short = [folder.resolve().name for folder in folders]
    return [path if short.count(name) > 1 else name for path, name in zip(whole, short, strict=True)]


def between(first: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How the results of two evaluations differ, metric by metric: {"value" of the other, "base" = value of the first,
    "change" other - first, each with its interval}, in pairs of the same prompt and seed. Means of relative rewards are
    left out where the control words differ, and of sums where their parts do: they are other questions."""
    check_same(first["rows"], other["rows"], "the first run", "the other")
    prompts = [row["prompt"] for row in first["rows"]]
    found = {}
    for key in first["metrics"]:
        if key not in other["metrics"] or _asked(first, key) != _asked(other, key):
            continue
        of_prompts = key in first["by_prompt"][0]
        values = [_column(evaluation, key, of_prompts) for evaluation in (other, first)]
        gap = values[0].isnan() | values[1].isnan()
        if not bool(gap.all()):
            found[key] = mean_and_interval(
                *(value.masked_fill(gap, math.nan) for value in values), None if of_prompts else prompts
            )
    return round_floats(found)


def _asked(evaluation: dict[str, Any], key: str) -> Any:
    """What a metric of this name asks in this evaluation; None where the name says it all."""
    if key == f"reward/{evaluation.get('heldout')}-relative":
        return evaluation.get("words")
    if key == "reward/weighted" or key.endswith("-relative"):
        return [evaluation.get("words"), evaluation.get("objective")]
    return None


def _column(evaluation: dict[str, Any], key: str, of_prompts: bool) -> Tensor:
    """One metric's values by image, or by prompt; NaN where there is none."""
    if key.startswith("style/"):  # a share of the images whose prompt leaves the style open
        values = [None if "style_named" in row else float(row["style"] == key[6:]) for row in evaluation["rows"]]
    else:
        values = [row.get(key) for row in evaluation["by_prompt" if of_prompts else "rows"]]
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _embedded(recipe: dict[str, Any]) -> bool:
    return (recipe.get("model") or {}).get("name", "emoji") == "emoji"


def _judged_by(run_folder: Path, recipe: dict[str, Any]) -> str | None:
    """The name of the held-out reward, without loading it."""
    from palate import recipe as recipes

    return "emoji-heldout" if _embedded(recipe) else recipes.heldout_of(recipes.read(str(run_folder / "recipe.yaml")))


def _panel(run_folder: Path, recipe: dict[str, Any]) -> EvaluationPanel:
    """The package's own for the embedded model, else one around the recipe's held-out reward."""
    from palate import recipe as recipes

    return embedded_panel() if _embedded(recipe) else recipes.panel_of(recipes.read(str(run_folder / "recipe.yaml")))


def _check_stored(run_folder: Path) -> None:
    for side in ("base", "result"):
        if not (run_folder / "evaluation" / side / "index.jsonl").is_file():
            raise InputError(
                f"{run_folder} has no stored images of the {side}; run palate evaluate on it without --stored"
            )


def _drawn(run_folder: Path) -> str:
    """How the base images of an evaluation were drawn."""
    row = read_index(run_folder / "evaluation" / "base")[0]
    return ", ".join(f"{key} {row[key]:g}" for key in ("guidance", "steps") if key in row)


def _seeds(recipe: dict[str, Any]) -> list[int]:
    return list(range((recipe.get("evaluate") or {}).get("seeds", 4)))


def _prompts(recipe: dict[str, Any], prompts: Sequence[str] | None = None, count: int | None = None) -> list[str]:
    """Those given, else evaluate.prompts of the recipe's: of evaluate.file, the preview's, the training prompts.
    `count` of either, spread evenly."""
    from palate.data import evenly_spaced, read_prompts

    settings, training = recipe.get("evaluate") or {}, recipe.get("prompts") or {}
    if prompts is None:
        file = settings.get("file") or training.get("preview") or training.get("file")
        prompts = read_prompts(file) if file else training.get("list")
        count = count or settings.get("prompts", 64)
    if not prompts:
        raise InputError(
            "the recipe names no prompts to evaluate on; set evaluate.file to a text file, one prompt a line"
        )
    return evenly_spaced(prompts, count or len(prompts))


def read_recipe(run_folder: Path) -> dict[str, Any]:
    """The run's recipe as plain values. Raises ValueError when the folder is not a run."""
    path = run_folder / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{path} is missing; expected a run folder such as runs/NAME")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{path} holds {type(recipe).__name__}; expected a mapping")
    return recipe


def trained_model(
    run_folder: str | Path, *, warn: Callable[[str], None] = warnings.warn
) -> tuple[Model, Sampler | None]:
    """The recipe's model with the weights of the run's newest good checkpoint (of `palate optimize`: its newest
    round's), and how the algorithm draws from it (None = as the model does). `warn` hears of damaged checkpoints that
    were passed over."""
    from palate import recipe as recipes
    from palate.optimize import newest_round
    from palate.train import restore_result

    run_folder = Path(run_folder)
    read_recipe(run_folder)
    plan = recipes.read(str(run_folder / "recipe.yaml"))
    model = recipes.build_model(plan)
    restore_result(model, run_folder if plan.optimize is None else newest_round(run_folder), warn=warn)
    return model, getattr(recipes.build_algorithm(plan), "sampler", None)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)

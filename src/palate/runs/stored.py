"""What lies in a run's folder, as plain values: nothing of it needs a network or its libraries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from palate.recipe import SECTIONS, reader
from palate.runtime.errors import InputError
from palate.runtime.runlog import words_after

RECIPE = "recipe.yaml"
SHAPES: dict[tuple[str, ...], type] = {  # of a run's recipe: what lists and reports read, the outer ones first
    **{(section,): dict for section in ("algorithm", *SECTIONS)},
    ("reward", "relative"): dict, ("trainer", "steps"): int, ("optimize", "budget"): int,
}  # fmt: skip
KINDS = {dict: "a mapping", int: "a whole number"}


def require_run(folder: Path) -> None:
    """InputError: the folder is not a run."""
    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder} is not a run (it holds no {RECIPE}); give a run, for example runs/NAME")


def read_recipe(run_folder: str | Path) -> dict[str, Any]:
    """The run's recipe as plain values, unchecked: of a run that an older or a newer version wrote, too. InputError:
    the folder is not a run, or its recipe is damaged."""
    require_run(Path(run_folder))
    file = Path(run_folder) / RECIPE
    try:
        tree = reader.Loader(reader.text_of(str(file))).get_single_data()
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file} holds {type(tree).__name__}; expected a mapping")
    if wrong := misshapen(tree):
        raise InputError(f"{file}: {wrong}; restore the file")
    return tree


def misshapen(tree: Mapping[str, Any]) -> str:
    """What of a run's recipe is not of the kind that lists and reports read, in words; "" where all of it is."""
    for keys, kind in SHAPES.items():
        value: Any = tree
        for key in keys:
            value = (value or {}).get(key)
        if value is not None and not isinstance(value, kind):
            return f"{'.'.join(keys)} is {type(value).__name__}, where {KINDS[kind]} is expected"
    return ""


def trained_to(rows: Sequence[dict[str, Any]], step: int) -> int:
    """The last update that is in the weights of `step`: an earlier one where the guard went back to it there."""
    for row in rows:
        if row.get("event") == "guard" and row["step"] == step and row.get("action") in ("rollback", "stop"):
            return int(row.get("best_step", step))
    return step


def ended_by_guard(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the guard's last look at the run made it end before its last step."""
    return [row.get("action") for row in rows if row.get("event") == "guard"][-1:] == ["stop"]


def steered(
    words: dict[str, list[str]], rows: Sequence[dict[str, Any]], step: int | None
) -> tuple[list[str], list[str]]:
    """The (positive, negative) words after those steering events among the rows of metrics.jsonl that the weights of
    `step` have seen; None = after all."""
    last = math.inf if step is None else trained_to(rows, step)
    for row in rows:
        if row.get("event") == "steer" and row["step"] <= last:
            words = words_after(words, row)
    return words["positive"], words["negative"]


def run_names(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, or its path where two are alike. InputError when one occurs twice."""
    whole = [str(folder.resolve()) for folder in folders]
    for i, path in enumerate(whole):
        if path in whole[:i]:
            raise InputError(f"run {folders[i]} is given twice; name each run once")
    short = [folder.resolve().name for folder in folders]
    return [path if short.count(name) > 1 else name for path, name in zip(whole, short, strict=True)]


def tree_words(tree: dict[str, Any]) -> dict[str, list[str]]:
    """`recipe.objective.control_words` of a recipe as plain values."""
    if relative := (tree.get("reward") or {}).get("relative"):
        return {side: [relative[side]] if relative.get(side) else [] for side in ("positive", "negative")}
    own = {side: (tree.get("algorithm") or {}).get(side) for side in ("positive", "negative")}
    return {side: list(given) if isinstance(given, list) else [] for side, given in own.items()}  # else no words

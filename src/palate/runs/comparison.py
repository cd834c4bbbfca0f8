"""Two evaluations compared, in pairs of the same prompt and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from palate.evaluate.measurement import mean_and_interval, round_floats
from palate.runtime.errors import InputError

BOTH = "evaluate all on the same ones"


def common_rows(first: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(i, j) of the rows of both that have the same prompt and seed, in the first one's order."""
    places = {(row["prompt"], row["seed"]): j for j, row in enumerate(other)}
    pairs = ((i, places.get((row["prompt"], row["seed"]))) for i, row in enumerate(first))
    return [(i, j) for i, j in pairs if j is not None]


def common_to_all(several: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]) -> list[tuple[int, ...]]:
    """(i, j, ...) of the rows that all have, in the first one's order. InputError: one shares none with the first."""
    found: list[tuple[int, ...]] = [(i,) for i in range(len(several[0]))]
    for rows, name in zip(several[1:], names[1:], strict=True):
        places = dict(common_rows(several[0], rows))
        if not places:
            raise InputError(f"{names[0]} and {name} have no prompt and seed in common; {BOTH}")
        found = [(*each, places[each[0]]) for each in found if each[0] in places]
    if not found:
        raise InputError(f"{', '.join(names)} have no prompt and seed that is in all of them; {BOTH}")
    return found


def on_common_rows(evaluations: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The evaluations on the prompts and seeds that all have. Where they do not have the same, metrics are those of
    single pictures, computed anew; what is measured inside a prompt is left out."""
    rows = common_to_all([evaluation["rows"] for evaluation in evaluations], names)
    if all(len(evaluation["rows"]) == len(rows) for evaluation in evaluations):
        return list(evaluations)
    return [_restricted(evaluation, [each[place] for each in rows]) for place, evaluation in enumerate(evaluations)]


def _restricted(evaluation: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    rows = [evaluation["rows"][i] for i in kept]
    metrics = {}
    for key in evaluation["metrics"]:
        if key in evaluation["by_prompt"][0]:
            continue
        now, base = column({"rows": rows}, key), column({"rows": rows}, key, base=True)
        if measured := _in_pairs(now, base, [row["prompt"] for row in rows]):
            metrics[key] = measured
    return {**evaluation, "rows": rows, "metrics": round_floats(metrics)}


def _in_pairs(now: Tensor, before: Tensor, prompts: Sequence[str] | None) -> dict[str, float]:
    """`mean_and_interval` where both were measured; empty where no pair was."""
    gap = now.isnan() | before.isnan()
    if bool(gap.all()):
        return {}
    return mean_and_interval(now.masked_fill(gap, math.nan), before.masked_fill(gap, math.nan), prompts)


def between(first: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How the results of two evaluations differ, metric by metric: {"value" of the other, "base" = value of the first,
    "change" other - first, each with its interval}, in pairs of the prompts and seeds that both have. Means of relative
    rewards are left out where the control words differ, and of sums where their parts do: they are other questions; so
    is what is measured inside a prompt where the prompts or the seeds differ. InputError: they have no row in common.
    """
    rows = common_rows(first["rows"], other["rows"])
    if not rows:
        raise InputError(f"the evaluations have no prompt and seed in common; {BOTH}")
    same = len(rows) == len(first["rows"]) == len(other["rows"]) and all(i == j for i, j in rows)
    prompts = [first["rows"][i]["prompt"] for i, _ in rows]
    found = {}
    for key in first["metrics"]:
        if key not in other["metrics"] or not same_meaning([first, other], key):
            continue
        of_prompts = key in first["by_prompt"][0]
        if of_prompts and not same:
            continue
        now, before = column(other, key, of_prompts), column(first, key, of_prompts)
        if not of_prompts:
            now, before = now[[j for _, j in rows]], before[[i for i, _ in rows]]
        if measured := _in_pairs(now, before, None if of_prompts else prompts):
            found[key] = measured
    return round_floats(found)


def same_meaning(evaluations: Sequence[dict[str, Any]], key: str) -> bool:
    """Whether a metric of this name measures the same in all of them: relative rewards depend on the control words, and
    two tastes have one name."""
    return all(_meaning(evaluation, key) == _meaning(evaluations[0], key) for evaluation in evaluations)


def _meaning(evaluation: dict[str, Any], key: str) -> Any:
    """What a metric of this name measures in this evaluation; None where the name says it all."""
    if key == f"reward/{evaluation.get('heldout')}-relative":
        return evaluation.get("words")
    digests = evaluation.get("digests", {})
    if key == "reward/weighted" or key.endswith("-relative"):
        parts = evaluation.get("objective", {}).get("weights", {})
        return [evaluation.get("words"), evaluation.get("objective"), {part: digests.get(part) for part in parts}]
    return digests.get(key.removeprefix("reward/"))


def column(evaluation: dict[str, Any], key: str, of_prompts: bool = False, *, base: bool = False) -> Tensor:
    """One metric's values by image, or by prompt, of the result or of its base; NaN where there is none."""
    if base:
        rows = ({**row.get("base", {}), "prompt": row["prompt"]} for row in evaluation["rows"])
        return column({"rows": list(rows)}, key)
    if key.startswith("style/"):  # a fraction of the images whose prompt leaves the style open
        values = [None if "style_named" in row else float(row.get("style") == key[6:]) for row in evaluation["rows"]]
    else:
        values = [row.get(key) for row in evaluation["by_prompt" if of_prompts else "rows"]]
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)

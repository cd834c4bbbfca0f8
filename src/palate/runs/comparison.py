"""Two evaluations compared, in pairs of the same prompt and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from palate.evaluate.measurement import mean_and_interval, round_floats
from palate.runtime.errors import InputError


def common_rows(first: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(i, j) of the rows of both that have the same prompt and seed, in the first one's order."""
    places = {(row["prompt"], row["seed"]): j for j, row in enumerate(other)}
    pairs = ((i, places.get((row["prompt"], row["seed"]))) for i, row in enumerate(first))
    return [(i, j) for i, j in pairs if j is not None]


def between(first: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How the results of two evaluations differ, metric by metric: {"value" of the other, "base" = value of the first,
    "change" other - first, each with its interval}, in pairs of the prompts and seeds that both have. Means of relative
    rewards are left out where the control words differ, and of sums where their parts do: they are other questions; so
    is what is measured inside a prompt where the prompts or the seeds differ. InputError: they have no row in common.
    """
    rows = common_rows(first["rows"], other["rows"])
    if not rows:
        raise InputError("the evaluations have no prompt and seed in common; evaluate both on the same ones")
    same = len(rows) == len(first["rows"]) == len(other["rows"]) and all(i == j for i, j in rows)
    prompts = [first["rows"][i]["prompt"] for i, _ in rows]
    found = {}
    for key in first["metrics"]:
        if key not in other["metrics"] or _question(first, key) != _question(other, key):
            continue
        of_prompts = key in first["by_prompt"][0]
        if of_prompts and not same:
            continue
        now, before = column(other, key, of_prompts), column(first, key, of_prompts)
        if not of_prompts:
            now, before = now[[j for _, j in rows]], before[[i for i, _ in rows]]
        gap = now.isnan() | before.isnan()
        if not bool(gap.all()):
            values = now.masked_fill(gap, math.nan), before.masked_fill(gap, math.nan)
            found[key] = mean_and_interval(*values, None if of_prompts else prompts)
    return round_floats(found)


def _question(evaluation: dict[str, Any], key: str) -> Any:
    """What a metric of this name asks in this evaluation; None where the name says it all."""
    if key == f"reward/{evaluation.get('heldout')}-relative":
        return evaluation.get("words")
    if key == "reward/weighted" or key.endswith("-relative"):
        return [evaluation.get("words"), evaluation.get("objective")]
    return None


def column(evaluation: dict[str, Any], key: str, of_prompts: bool = False, *, base: bool = False) -> Tensor:
    """One metric's values by image, or by prompt, of the result or of its base; NaN where there is none."""
    if base:
        rows = ({**row.get("base", {}), "prompt": row["prompt"]} for row in evaluation["rows"])
        return column({"rows": list(rows)}, key)
    if key.startswith("style/"):  # a fraction of the images whose prompt leaves the style open
        values = [None if "style_named" in row else float(row["style"] == key[6:]) for row in evaluation["rows"]]
    else:
        values = [row.get(key) for row in evaluation["by_prompt" if of_prompts else "rows"]]
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)

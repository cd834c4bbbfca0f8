"""The numbers of an evaluation as tables: names and order as page, command line and JSON share them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from palate.report.html import number
from palate.report.words import spell
from palate.runs.comparison import same_meaning

NAMES = {
    "concept": "right object",
    "background": "right background colour",
    "position": "right position",
    "style_named": "right style where one is named",
    "correct": "everything named is right",
    "diversity": "diversity per prompt",
    "diversity_same_style": "diversity per prompt, within a style",
    "vendi": "Vendi score per prompt",
    "copy": "cross-prompt duplicates",
    "high_frequency": "high-frequency energy",
    "jpeg_size": "JPEG size, bytes",
}
NAMED = ("concept", "style_named", "background", "position", "correct")  # what a prompt can ask for
DIVERSITY_METRICS = ("diversity", "diversity_same_style", "vendi", "copy")
MAIN = NAMED + DIVERSITY_METRICS
DRIFT = {
    "feature_distance": ("feature distance", "cosine, 0 = unchanged"),
    "saturation_ratio": ("saturation", "1 = unchanged"),
    "colour_cast": ("colour cast", "shift of the mean colour, 0 = none"),
    "red_ratio": ("mean red", "1 = unchanged"),
    "green_ratio": ("mean green", "1 = unchanged"),
    "blue_ratio": ("mean blue", "1 = unchanged"),
    "high_frequency_ratio": ("high frequencies", "1 = unchanged"),
}
GROUPS = {
    "Rewards": lambda key: key.startswith("reward/"),
    "What the prompt names": lambda key: key in NAMED,
    "Style, where the prompt leaves it open": lambda key: key.startswith("style/"),
    "Diversity": lambda key: key in DIVERSITY_METRICS,
    "The pictures themselves": lambda key: True,
}
HEADLINES = 6


def metric_name(key: str) -> str:
    """A metric's name in words; of a reward its own name."""
    name = key.removeprefix("reward/")
    return f"fraction {key[6:]}" if key.startswith("style/") else NAMES.get(name, name.replace("_", " "))


def metric_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """[{"name", "key", "tag", value, low, high, ...}]: optimised rewards, the held-out reward, other rewards, the rest.
    `tag` is "optimised", "held out" or ""."""
    optimised, heldout = evaluation.get("optimised", []), evaluation.get("heldout")

    def order(key: str, tag: str) -> float:
        if tag == "optimised":
            return optimised.index(key.removeprefix("reward/")) - len(optimised)
        if tag:
            return 1
        if key.startswith("reward/"):
            return 2
        return 3 + MAIN.index(key) / len(MAIN) if key in MAIN else 4

    rows = []
    for key, metric in evaluation["metrics"].items():
        name, is_reward = key.removeprefix("reward/"), key.startswith("reward/")
        tag = "optimised" if is_reward and name in optimised else "held out" if is_reward and name == heldout else ""
        rows.append((order(key, tag), key, {"name": metric_name(key), "key": key, "tag": tag, **metric}))
    return [row for _, _, row in sorted(rows, key=lambda item: item[:2])]


def headline_keys(evaluation: dict[str, Any], styles: Sequence[str]) -> list[str]:
    """The at most six metrics that tell the story: the wanted style, the objective, the held-out reward and its
    preference, what stayed right, diversity."""
    optimised, heldout = evaluation.get("optimised", []), evaluation.get("heldout")
    wanted = [
        *(f"style/{style}" for style in styles[:1]),
        *(f"reward/{name}" for name in optimised[:1]),
        f"reward/{heldout}-relative",
        f"reward/{heldout}",
        "concept",
        "diversity",
        "correct",
        "feature_distance",
    ]
    return [key for key in dict.fromkeys(wanted) if key in evaluation["metrics"]][:HEADLINES]


def metric_tables(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """[{"name", "rows"}], a row per metric with a cell per run (None where it was not measured), in the order of
    `metric_rows`. Relative rewards are distinguished by their control words where the runs' words differ."""
    several = len({json.dumps(evaluation.get("words"), sort_keys=True) for evaluation in evaluations.values()}) > 1
    rows: dict[str, dict[str, Any]] = {}
    for i, evaluation in enumerate(evaluations.values()):
        rewards = {key.removeprefix("reward/") for key in evaluation["metrics"] if key.startswith("reward/")}
        for row in metric_rows(evaluation):
            key, label = row["key"], row["name"]
            if several and key.endswith("-relative") and row["name"] in rewards:
                label = f"{label} ({spell(evaluation['words'])})"
            entry = rows.setdefault(label, {"name": label, "key": key, "cells": [None] * len(evaluations)})
            entry["cells"][i] = row
    left = list(rows.values())
    tables = []
    for name, belongs in GROUPS.items():
        chosen = [row for row in left if belongs(row["key"])]
        left = [row for row in left if row not in chosen]
        if chosen:
            tables.append({"name": name, "rows": chosen})
    return tables


def between_table(found: dict[str, Any]) -> dict[str, Any] | None:
    """Every further run against the first, where there are several."""
    if not found["between"]:
        return None
    rows = [
        {"name": row["name"], "cells": [changes.get(row["key"]) for changes in found["between"].values()]}
        for row in metric_rows(found["runs"][found["first"]])
    ]
    return {
        "first": found["first"],
        "others": list(found["between"]),
        "rows": [row for row in rows if any(row["cells"])],
    }


def drift_rows(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the drift table, a value per run; duplicates as a fraction."""
    rows = [
        {"name": name, "what": what, "cells": [evaluation.get("drift", {}).get(key) for evaluation in evaluations]}
        for key, (name, what) in DRIFT.items()
    ]
    copied = [evaluation["metrics"].get("copy") for evaluation in evaluations]
    if any(copied):
        before = ", ".join(number(metric["base"]) if metric else "–" for metric in copied)
        what = f"fraction of pictures that another prompt has too; base {before}"
        rows.append({"name": NAMES["copy"], "what": what, "cells": [m and m["value"] for m in copied]})
    return rows


def change(row: dict[str, Any], key: str | None) -> float | None:
    """A row's change of a measurement from the base's picture; None where one of the two is missing."""
    if key is None:
        return None
    now, before = row.get(key), row.get("base", {}).get(key)
    return None if now is None or before is None else now - before


def prompt_table(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row per prompt: the mean change over its seeds of the first optimised reward, the held-out reward and the
    object, run by run. {"heads": [(run index, name)], "rows": [{"prompt", "changes"}]}, None in `changes` for
    what was not measured."""
    heads, columns = [], []
    prompts = list(dict.fromkeys(row["prompt"] for row in evaluations[0]["rows"]))
    for i, evaluation in enumerate(evaluations):
        optimised = [(f"reward/{name}", "optimised") for name in (evaluation.get("optimised") or [])[:1]]
        for key, name in [*optimised, (f"reward/{evaluation['heldout']}", "held out"), ("concept", "right object")]:
            changes: dict[str, list[float]] = {}
            for row in evaluation["rows"]:
                if (found := change(row, key)) is not None:
                    changes.setdefault(row["prompt"], []).append(found)
            if changes:
                heads.append((i, name))
                columns.append([sum(c) / len(c) if (c := changes.get(p)) else None for p in prompts])
    rows = [{"prompt": prompt, "changes": [column[i] for column in columns]} for i, prompt in enumerate(prompts)]
    return {"heads": heads, "rows": rows}


def compare_table(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Base and every run's value of each metric that all have, with the same meaning, the headlines first; empty for no
    evaluations."""
    found = [{row["key"]: row for row in metric_rows(evaluation)} for evaluation in measured]
    if not found:
        return []
    first = [key for evaluation in measured[:1] for key in headline_keys(evaluation, ())]
    keys = [key for key in (*first, *(key for key in found[0] if key not in first)) if all(key in r for r in found)]
    keys = [key for key in keys if same_meaning(measured, key)]
    return [
        {"name": found[0][key]["name"], "base": found[0][key].get("base"), "cells": [rows[key] for rows in found]}
        for key in keys
    ]

"""The part of a report that shows a black-box optimisation: its queries, their scores, what the surrogate explained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from palate.report.chart import Line, Mark, chart
from palate.report.curves import read_metrics
from palate.report.pictures import COLUMNS, picture
from palate.runtime.code import imported
from palate.runtime.errors import InputError
from palate.runtime.files import parse_json, read_json_lines
from palate.runtime.images import UNREADABLE, from_pixels, read_pixels

WAYS = ("name", "function", "command", "url", "checklist")  # to reach an objective, keys of optimize.oracle


def read_rounds(run_folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run; of a black-box optimisation those of its rounds, one after the other."""
    rounds = sorted(run_folder.glob("round-*"))
    if not rounds:
        return read_metrics(run_folder)
    rows: list[dict[str, Any]] = []
    for folder in rounds:
        done = max((row["step"] for row in rows), default=0)
        rows += [{**row, "step": row["step"] + done} for row in read_metrics(folder)]
    return rows


def read_queries(run_folder: Path) -> list[dict[str, Any]]:
    """The queries in order: {"query", "round", "prompt", "file", "score" or "failed"}; none for other runs. Nothing is
    written: the run may be going on."""
    path = run_folder / "queries.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text("utf-8").split("\n") if path.is_file() else (), 1):
        try:
            row = parse_json(line)
            found.setdefault(row["query"], {}).update(row)
            file = found[row["query"]]["file"]
        except (ValueError, KeyError, TypeError):
            break  # the line that a crash cut short is the last
        if Path(file).parts != ("queries", Path(file).name):
            raise InputError(f"{path} line {number}: expected a file in queries/, got {file[:60]!r}")
    return [found[k] for k in sorted(found) if "file" in found[k]]


def query_curves(
    run_folder: Path, queries: Sequence[dict[str, Any]], recipe: dict[str, Any]
) -> list[tuple[str, str, Markup]]:
    """Charts over the number of queries: the scores, without their noise where the objective is built in, and how much
    of them the surrogate explained before the policy maximised it."""
    evaluated = [row for row in queries if "score" in row]
    if not evaluated:
        return []
    size = max(1, len(evaluated) // 40)
    ends = [min(k + size, len(evaluated)) for k in range(0, len(evaluated), size)]
    true = noiseless_scores(run_folder, evaluated, recipe)
    best = np.maximum.accumulate([row["score"] for row in evaluated])

    def line(name: str, values: Sequence[float], accent: bool = False) -> Line:
        parts = [float(np.mean(values[max(0, end - size) : end])) for end in ends]
        return Line(name, [(evaluated[end - 1]["query"] + 1, y) for end, y in zip(ends, parts, strict=True)], accent)

    lines = [
        line("scores", [row["score"] for row in evaluated], True),
        Line("best so far", [(evaluated[end - 1]["query"] + 1, float(best[end - 1])) for end in ends]),
    ]
    if true is not None:
        lines.append(line("without noise", true))
    rounds = [row for row in _rounds(run_folder) if "explained" in row]
    fit = [Line("explained", [(row["spent"], float(row["explained"])) for row in rounds], True)]
    marks = [Mark(row["spent"], f"round {row['round']}", "steer") for row in rounds]
    found = [
        ("Scores of the queries", f"over queries, means of {size}", chart("Scores of the queries", lines, marks)),
        (
            "The surrogate",
            "fraction of the scores' variance that it explains, leave-one-out, after each round",
            chart("The surrogate", fit, unit_range=True),
        ),
    ]
    return [item for item in found if item[2]]


def noiseless_scores(
    run_folder: Path, evaluated: Sequence[dict[str, Any]], recipe: dict[str, Any]
) -> list[float] | None:
    """What a built-in objective with noise would have said without it; None for any other."""
    oracle = recipe["optimize"]["oracle"]
    if not oracle.get("name") or not oracle.get("noise"):
        return None
    reward, scores = imported("palate.rewards.oracles", "exact_reward")(oracle["name"]), []  # loads transformers
    for start in range(0, len(evaluated), 64):
        part = evaluated[start : start + 64]
        pixels = []
        for row in part:
            try:
                pixels.append(read_pixels(run_folder / row["file"]))
            except UNREADABLE as error:
                raise InputError(f"image {run_folder / row['file']} cannot be read ({error})") from error
        scores += reward(from_pixels(pixels), [row["prompt"] for row in part]).tolist()
    return scores


def _rounds(run_folder: Path) -> list[dict[str, Any]]:
    path = run_folder / "rounds.jsonl"
    return [row for _, row in read_json_lines(path)] if path.is_file() else []


def query_grid(run_folder: Path, queries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best pictures of each round, one row per round."""
    rows = []
    for number in sorted({row["round"] for row in queries}):
        own = [row for row in queries if row["round"] == number and "score" in row]
        own.sort(key=lambda row: -row["score"])
        cells = [
            {"src": picture(run_folder / row["file"]), "alt": f"{row['prompt']}, score {row['score']:.4g}"}
            for row in own[:COLUMNS]
        ]
        mean = f", mean score {np.mean([row['score'] for row in own]):.4g}" if own else ""
        rows.append({"prompt": f"round {number}: {len(own)} evaluated{mean}", "seed": None, "cells": cells})
    heads = [{"name": "Best" if k == 0 else f"{k + 1}.", "step": "", "words": ""} for k in range(COLUMNS)]
    return {"heads": heads, "rows": rows} if any(row["cells"] for row in rows) else None


def query_summary(run_folder: Path, queries: Sequence[dict[str, Any]], recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Which objective, how many queries, and how far the surrogate could follow."""
    settings = recipe.get("optimize") or {}
    oracle = settings.get("oracle") or {}
    who = next((f"{key} {oracle[key]}" for key in WAYS if oracle.get(key)), "unknown")
    num_failed, num_answered = (sum(key in row for row in queries) for key in ("failed", "score"))
    pairs = [
        ("Objective", who.removeprefix("name ")),
        ("Queries", f"{len(queries)} of {settings.get('budget')}: {num_answered} answered, {num_failed} failed"),
    ]
    if rounds := _rounds(run_folder):
        explained = f"explains {rounds[-1]['explained']:.0%} of the scores"
        pairs.append(("Surrogate", f"{settings.get('surrogate')}, {explained}"))
    return pairs

"""`palate report`: one self-contained page per run, or several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate.recipe.paths import without_folders
from palate.report.blackbox import query_curves, query_grid, query_summary, read_queries, read_rounds
from palate.report.curves import curves, event_marks, read_json
from palate.report.html import flatten, render, write_page
from palate.report.pictures import (
    clearest_pairs,
    compare_grid,
    grid,
    preview_folders,
    preview_pairs,
    ranked_pairs,
    step_of,
)
from palate.report.story import gauges, sentence, wanted_styles
from palate.report.tables import DRIFT, HEADLINES, compare_table, headline_keys, metric_rows
from palate.report.words import WordChange, history, word_changes, words_at
from palate.runs.comparison import on_common_rows
from palate.runs.stored import read_recipe
from palate.runtime.files import in_shell
from palate.runtime.progress import counted
from palate.runtime.result import whole_evaluation_of
from palate.runtime.runlock import status


def write_report(run_folder: str | Path, *, compare: Sequence[str | Path] = (), out: str | Path | None = None) -> Path:
    """Write report.html into the run folder, or with other runs in `compare`, compare.html; return its path. out: the
    page's own path, of a run whose folder cannot be written to.

    Raises InputError when a folder is not a run, a picture cannot be read, or compared runs share no prompt and seed.
    """
    runs = [Path(run_folder), *map(Path, compare)]
    pages = [run_page(run) for run in runs]
    title = " · ".join(page["name"] for page in pages)
    if not compare:
        return write_page(Path(out or runs[0] / "report.html"), render("report.html", title=title, run=pages[0]))
    evaluations = [page["evaluation"] for page in pages if page["evaluation"]]
    measured = on_common_rows(evaluations, list(map(str, runs))) if len(evaluations) == len(runs) else []
    text = render(
        "compare.html",
        title=title,
        pages=pages,
        grid=compare_grid(runs, [page["words"] for page in pages]),
        table=compare_table(measured),
        headlines=HEADLINES,
        pictures=len(measured[0]["rows"]) if measured else 0,
    )
    return write_page(Path(out or runs[0] / "compare.html"), text)


def run_page(run: Path) -> dict[str, Any]:
    """Everything that the page of a run shows, as plain values for the template."""
    recipe, rows, evaluation = read_recipe(run), read_rounds(run), whole_evaluation_of(run)
    queries = read_queries(run) if recipe.get("optimize") else []
    changes = word_changes(recipe, rows)
    drift = (evaluation or {}).get("drift") or {}
    last = max((row["step"] for row in rows), default=0)
    shown = max(map(step_of, preview_folders(run)), default=last)
    styles = wanted_styles(evaluation) if evaluation else []
    wanted = styles or [word for change in changes for word in change.positive]
    table = metric_rows(evaluation) if evaluation else []
    headline = headline_keys(evaluation, styles) if evaluation else []
    pairs = clearest_pairs(run, evaluation, styles) if evaluation else preview_pairs(run)
    return {
        "name": run.resolve().name,
        "words": words_at(changes, rows, shown) if changes else "",
        "lede": f"{sentence(evaluation)} {evaluation['outdated']}".strip()
        if evaluation
        else unjudged(recipe, changes, last) + (" The pairs below changed most." if pairs else ""),
        "gauges": gauges(evaluation) if evaluation else [],
        "summary": summary(recipe, changes) + (query_summary(run, queries, recipe) if recipe.get("optimize") else []),
        "queries": query_grid(run, queries),
        "last_step": last,
        "evaluation": evaluation,
        "verdict": (evaluation or {}).get("verdict") or {},
        "pairs": pairs,
        "grid": grid(run, changes, rows),
        "charts": (query_curves(run, queries, recipe) if queries else []) + curves(rows, wanted),
        "notes": [
            *_still_running(run, last),
            *(
                f"step {mark.step}: {'words ' if mark.kind == 'steer' else 'guard '}{mark.text}"
                for mark in event_marks(rows)
            ),
        ],
        "headline": sorted((row for row in table if row["key"] in headline), key=lambda r: headline.index(r["key"])),
        "table": [row for row in table if row["key"] not in headline],
        "drift": [(*DRIFT[key], drift[key]) for key in DRIFT if key in drift],
        "ranked": ranked_pairs(run, evaluation) if evaluation else [],
        "environment": flatten(read_json(run / "environment.json") or {}),
        "recipe": flatten(without_folders(recipe)),
        "command": command(run, recipe),
    }


def _still_running(run: Path, last: int) -> list[str]:
    """A sentence for a run that a process trains now."""
    found = status(run)
    if found.state != "running" or found.owner is None:
        return []
    return [f"step {last}: this run is being trained by {found.owner.text()}; the page shows it as it was then"]


def run_words(recipe: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The control words of a run and what they became by steering; "" for a run without."""
    return history(word_changes(recipe, rows))


def unjudged(recipe: dict[str, Any], changes: Sequence[WordChange], last_step: int) -> str:
    """The first sentence for a run that palate evaluate has not seen yet."""
    words = f" towards {history(changes)}" if changes else ""
    steps = (recipe.get("trainer") or {}).get("steps")
    whole = steps if recipe.get("optimize") is None else None
    progress = f"{last_step} of {counted(whole, 'step')}" if whole else counted(last_step, "step")
    return f"Trained for {progress}{words}. Not measured yet: palate evaluate does that."


def summary(recipe: dict[str, Any], changes: Sequence[WordChange]) -> list[tuple[str, str]]:
    """What was asked for, in a few (name, value) pairs."""

    def get(section: str) -> dict[str, Any]:
        return recipe.get(section) or {}

    algorithm, reward, trainer = get("algorithm"), get("reward"), get("trainer")
    weighted = ", ".join(f"{weight:g} × {name}" for name, weight in (reward.get("weights") or {}).items())
    k = (reward.get("relative") or {}).get("k")
    pairs = [
        ("Algorithm", algorithm.get("name")),
        ("Model", get("model").get("name")),
        ("Reward", reward.get("name") or weighted),
        ("Words", history(changes) + (f" k {k:g}" if k else "") if changes else None),
        ("Steps", trainer.get("steps")),
        ("Batch", trainer.get("batch_size")),
        ("Learning rate", trainer.get("lr")),
        ("Seed", trainer.get("seed")),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def command(run_folder: Path, recipe: dict[str, Any]) -> str:
    """The command that repeats the run, from its own recipe into a new folder: as it was named, or, where that would
    show a place on this disk, in the folder that it lies in."""
    place = Path(run_folder.name) if run_folder.is_absolute() else run_folder
    again = Path((recipe.get("run") or {}).get("folder") or place)
    again = Path(again.name) if again.is_absolute() else again
    verb = "train" if recipe.get("optimize") is None else "optimize"
    return f"palate {verb} {in_shell(place / 'recipe.yaml')} {in_shell(f'run.folder={again}-again')}"

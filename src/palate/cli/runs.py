"""`palate runs`: every run below a folder with its state, step, words, headline and size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from palate.report.blackbox import read_queries
from palate.report.curves import read_metrics
from palate.report.page import run_words
from palate.report.story import wanted_styles
from palate.runs.stored import ended_by_guard, read_recipe
from palate.runtime.errors import InputError, PalateError
from palate.runtime.files import folder_size
from palate.runtime.progress import printable
from palate.runtime.result import evaluation_of
from palate.runtime.runlock import status


class RunRow(NamedTuple):
    """What the list says of one run. state: running, stopped, died, finished or broken.

    step and steps count updates; those of `palate optimize` count queries.
    """

    name: str
    folder: str
    state: str
    step: int
    steps: int | None
    words: str
    headline: str
    megabytes: float
    owner: str


def find_runs(root: Path) -> list[Path]:
    """The run folders directly in `root`, or `root` itself."""
    if (root / "recipe.yaml").is_file():
        return [root]
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}; give the folder that holds the runs, for example runs")
    return sorted(path for path in root.iterdir() if path.is_dir() and _may_be_a_run(path))


def _may_be_a_run(folder: Path) -> bool:
    """Whether a recipe lies there, or nobody but another user can tell."""
    try:
        (folder / "recipe.yaml").stat()
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def describe(folder: Path) -> RunRow:
    """One row; a folder that cannot be read is `broken`, with the reason as its headline."""
    size = folder_size(folder) / 1e6
    try:
        recipe = read_recipe(folder)
        rows = read_metrics(folder)
        evaluation = evaluation_of(folder)
        queries = read_queries(folder)
    except (PalateError, OSError) as error:
        return RunRow(folder.name, str(folder), "broken", 0, None, "", str(error).splitlines()[0], round(size, 3), "")
    if (optimize := recipe.get("optimize")) is None:
        step, steps = max((row["step"] for row in rows), default=0), (recipe.get("trainer") or {}).get("steps")
    else:
        step, steps = len(queries), optimize.get("budget")
    state, owner = state_of(folder, step, steps)
    words, said = run_words(recipe, rows), headline(evaluation)
    if state == "stopped" and ended_by_guard(rows):
        state, said = "finished", f"{said} (ended by its guard)"
    return RunRow(folder.name, str(folder), state, step, steps, words, said, round(size, 3), owner)


def state_of(folder: Path, step: int, steps: int | None) -> tuple[str, str]:
    """(state, owner) of a run, by its owner's lock and its files. A black-box run ends with its newest round."""
    found = status(folder)
    if found.owner:
        return found.state, found.owner.text()
    ended = all(status(newest).state == "finished" for newest in sorted(folder.glob("round-*"))[-1:])
    return ("finished" if steps is not None and step >= steps and ended else "stopped"), ""


def headline(evaluation: dict[str, Any] | None) -> str:
    """The one number that a list has room for: the wanted style's fraction, else the optimised reward."""
    if not evaluation:
        return "not measured"
    metrics = evaluation["metrics"]
    optimised = evaluation.get("optimised") or []
    keys = [*(f"style/{style}" for style in wanted_styles(evaluation)), *(f"reward/{name}" for name in optimised)]
    key = next((key for key in keys if {"base", "value"} <= metrics.get(key, {}).keys()), None)
    if key is None:
        return "measured"
    metric = metrics[key]
    name = key.removeprefix("style/").removeprefix("reward/")
    marks = " (warnings)" if (evaluation.get("verdict") or {}).get("warnings") else ""
    marks += " (of an earlier step)" if evaluation.get("outdated") else ""
    if key.startswith("style/"):
        return f"{name} {metric['base']:.0%} to {metric['value']:.0%}{marks}"
    return f"{name} {metric['base']:.3g} to {metric['value']:.3g}{marks}"


def print_runs(root: Path, as_json: bool) -> None:
    """Print a line of each run in `root`, and its words below; or a JSON list of objects."""
    rows = [describe(run) for run in find_runs(root)]
    if as_json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
        return
    if not rows:
        print(f"no runs in {printable(str(root))}; begin one with palate train srpo-emoji")
        return
    width = max(len("run"), *(len(row.folder) for row in rows))
    print(f"{'run':{width}}  {'state':8}  {'step':>9}  {'size':>11}  what was measured")
    for row in rows:
        step = f"{row.step}/{row.steps}" if row.steps else str(row.step)
        size = f"{row.megabytes:.1f} MB"
        print(printable(f"{row.folder:{width}}  {row.state:8}  {step:>9}  {size:>11}  {row.headline}"))
        if row.words:
            print(printable(f"{'':{width}}  {row.words}"))

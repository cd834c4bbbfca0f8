"""`palate evaluate`: the page of one or more evaluations, the pictures first and every number after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate.evaluate import read_index, to_json
from palate.report.html import render, write_page
from palate.report.pictures import clearest_pairs, picture, ranked_pairs
from palate.report.story import gauges, sentence, wanted_styles
from palate.report.tables import between_table, drift_rows, headline_keys, metric_tables, prompt_table
from palate.report.words import spell
from palate.runs.stored import run_names
from palate.runtime.files import in_shell
from palate.runtime.progress import counted

CARDS, CARD_PIXELS = 120, 192  # prompts shown with pictures, and the size at which they are embedded


def write_evaluation(run_folders: Sequence[str | Path], found: dict[str, Any], path: str | Path | None = None) -> Path:
    """One page of what `runs.evaluate_runs` found, with the pictures that lie in the run folders; returns its path
    (None = evaluation.html in the first run). Of several runs the numbers are written too: beside a given path as
    .json, else evaluations.json in the first run. InputError names a picture that cannot be read."""
    runs = [Path(folder) for folder in run_folders]
    evaluations = list(found["runs"].values())
    styles = wanted_styles(evaluations[0])
    headline = headline_keys(evaluations[0], styles)
    tables = metric_tables(found["runs"])
    rows = [row for table in tables for row in table["rows"]]
    text = render(
        "evaluation.html",
        title=" · ".join(found["runs"]),
        runs=[judged_run(run, name, found["runs"][name]) for run, name in zip(runs, run_names(runs), strict=True)],
        prompts=evaluations[0]["prompts"],
        seeds=evaluations[0]["seeds"],
        headline=sorted((row for row in rows if row["key"] in headline), key=lambda row: headline.index(row["key"])),
        num_metrics=len(rows),
        tables=tables,
        between=between_table(found),
        drift=drift_rows(evaluations),
        cards=prompt_cards(runs, evaluations),
        command="palate evaluate " + " ".join(map(in_shell, runs)) + " --stored",
    )
    page = runs[0] / "evaluation.html" if path is None else Path(path)
    write_page(page, text)
    if len(runs) > 1:
        write_page(runs[0] / "evaluations.json" if path is None else page.with_suffix(".json"), to_json(found))
    return page


def judged_run(run: Path, name: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The story of one run: sentence, gauges, pictures, warnings, facts."""
    how = read_index(run / "evaluation" / "result")[0]
    words = evaluation.get("words") or {}
    facts = [
        ("Optimised", ", ".join(evaluation.get("optimised") or ["nothing"])),
        ("Held out", evaluation.get("heldout")),
        ("Words", spell(words) if words.get("positive") or words.get("negative") else None),
        ("Sampling", f"{counted(how['steps'], 'step')}, guidance {how['guidance']}" if "steps" in how else None),
    ]
    return {
        "name": name,
        "lede": sentence(evaluation),
        "gauges": gauges(evaluation),
        "pairs": clearest_pairs(run, evaluation, wanted_styles(evaluation)),
        "summary": [(key, value) for key, value in facts if value],
        "verdict": evaluation["verdict"],
        "failed": evaluation["failed"],
        "ranked": ranked_pairs(run, evaluation),
    }


def prompt_cards(runs: Sequence[Path], evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A card per prompt, the largest change first: the base's picture of the first seed that all runs have beside each
    run's, and the mean changes; a run without the prompt shows none. {"heads": [name], "cards", "num_hidden"}: of more
    than CARDS prompts those in the middle are left out."""
    table = prompt_table(evaluations)
    several = len(evaluations) > 1
    heads = [f"{runs[run].resolve().name}: {name}" if several else name for run, name in table["heads"]]
    files = [_files(evaluation) for evaluation in evaluations]
    rows = sorted(table["rows"], key=_fall)
    half = CARDS // 2
    shown = rows if len(rows) <= CARDS else rows[:half] + rows[-half:]
    cards = []
    for row in shown:
        pictures = []
        own = [key for key in files[0] if key[0] == row["prompt"]]
        shared = [key for key in own if all(key in each for each in files)]
        for key in (shared or own)[:1]:
            if not (before := runs[0] / "evaluation/base" / files[0][key]).is_file():
                continue
            sides = [("before", before)]
            sides += [
                (run.resolve().name if several else "after", run / "evaluation/result" / each[key])
                for run, each in zip(runs, files, strict=True)
                if key in each  # stored evaluations may be of other prompts, or of the same in another order
            ]
            pictures = [{"src": picture(path, CARD_PIXELS), "alt": f"{row['prompt']}, {name}"} for name, path in sides]
        cards.append({**row, "pictures": pictures})
    return {"heads": heads, "cards": cards, "num_hidden": len(rows) - len(shown)}


def _fall(row: dict[str, Any]) -> tuple[bool, float]:
    """A row's first change, the largest first; what was not measured comes last."""
    first = (row["changes"] or [0.0])[0]
    return first is None, -(first or 0.0)


def _files(evaluation: dict[str, Any]) -> dict[tuple[str, Any], str]:
    """(prompt, seed) -> the name of the picture's file."""
    return {(row["prompt"], row["seed"]): Path(row["file"]).name for row in evaluation["rows"] if "file" in row}

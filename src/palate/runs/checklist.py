"""A run judged by questions about its pictures: base model against result on the same noise, into checklist.json.

The judge's answers lie beside it in answers.jsonl, by picture, question and judge: a run that is judged again, after
more training or after a crash, asks only what it has not asked before.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate.core import Model, Sampler
from palate.data.checklists import Checklist
from palate.evaluate.checklists import evaluate_checklists
from palate.evaluate.measurement import to_json
from palate.evaluate.samples import check_same, pairs, read_index
from palate.rewards.answers import Answers
from palate.rewards.checklist import QuestionJudge
from palate.runs.comparison import between
from palate.runs.evaluation import Load, check_stored, draw_sides, evaluating, evaluation_key, seeds_of
from palate.runs.folder import RunFolder, open_runs
from palate.runs.stored import run_names
from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically

ANSWERS, RESULT = "answers.jsonl", "checklist.json"
INDEX = "evaluation/result/index.jsonl"


def evaluate_runs_by_questions(
    run_folders: Sequence[str | Path],
    checklists: Sequence[Checklist],
    judge: QuestionJudge,
    *,
    seeds: Sequence[int] | None = None,
    stored: bool = False,
    load: Load | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Each run's result and base on the checklists' prompts x seeds (None = the recipe's): {"first", "runs": {name:
    what `evaluate_checklists` returns}, "between": {name: {metric: ...}}} as `evaluate_runs`. Writes checklist.json and
    answers.jsonl into each run, and the pictures into evaluations/KEY, so that its evaluation stays. `stored`: judge
    the pictures that lie there, those whose prompts have questions.

    RemoteError: the judge failed; what it has answered is kept, and the same call goes on from there."""
    names = run_names([Path(folder) for folder in run_folders])
    runs = open_runs(run_folders, overrides)
    kept = [run.path / ANSWERS for run in runs]
    prompts = [item.prompt for item in checklists]
    found = {}
    for name, run in zip(names, runs, strict=True):
        with evaluating(run):
            if stored:
                place = _stored(run, prompts)
            else:
                own = seeds or seeds_of(run.recipe)
                place = run.path / "evaluations" / evaluation_key(*pairs(prompts, own))
                draw_sides(run, place, *_loaded(run, load), prompts, own)
            judge.answers = Answers(run.path / ANSWERS, also=kept)
            found[name] = _judged(place, checklists, judge)
            write_atomically(run.path / RESULT, to_json(found[name]).encode())
    first = names[0]
    return {"first": first, "runs": found, "between": {name: between(found[first], found[name]) for name in names[1:]}}


def _loaded(run: RunFolder, load: Load | None) -> tuple[Model, Sampler | None]:
    return run.model(logging.getLogger("palate").warning) if load is None else load(run.path)


def _stored(run: RunFolder, prompts: Sequence[str]) -> Path:
    """The folder whose evaluation/ holds the most pictures of the prompts, the newest of equal ones. InputError: there
    is none."""
    found = []
    for index in (*run.path.glob(INDEX), *run.path.glob(f"evaluations/*/{INDEX}")):
        there = {row["prompt"] for row in read_index(index.parent)}
        found.append((len(there.intersection(prompts)), index.stat().st_mtime_ns, index.parents[2]))
    if not found:
        check_stored(run)
    if not max(found)[0]:
        raise InputError(f"{run.path}: no stored picture is of a prompt of the file; evaluate without --stored")
    return max(found)[2]


def _judged(place: Path, checklists: Sequence[Checklist], judge: QuestionJudge) -> dict[str, Any]:
    folders = {side: place / "evaluation" / side for side in ("base", "result")}
    rows, base_rows = read_index(folders["result"]), read_index(folders["base"])
    check_same(rows, base_rows, "the result", "the base")
    known = {item.prompt for item in checklists}
    there = [i for i, row in enumerate(rows) if row["prompt"] in known]
    prompts, seeds = [rows[i]["prompt"] for i in there], [rows[i]["seed"] for i in there]
    images = [folders["result"] / rows[i]["file"] for i in there]
    base = [folders["base"] / base_rows[i]["file"] for i in there]
    found = evaluate_checklists(images, prompts, seeds, checklists, judge, base=base)
    for row, i in zip(found["rows"], there, strict=True):
        row["file"] = rows[i]["file"]
    return found

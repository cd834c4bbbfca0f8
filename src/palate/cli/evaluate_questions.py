"""`palate evaluate RUN --questions FILE`: a vision-language model answers questions about the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palate.cli.evaluate_options import EvaluateOptions
from palate.cli.phases import show_phases
from palate.cli.result_tables import print_changes
from palate.data.checklists import read_checklists
from palate.evaluate import to_json
from palate.rewards.checklist import connect
from palate.runs.checklist import evaluate_runs_by_questions
from palate.runs.evaluation import Load
from palate.runtime.errors import InputError
from palate.runtime.progress import counted, printable

EXAMPLE = "http://127.0.0.1:8000/v1/chat/completions#MODEL"


def evaluate_with_questions(runs: Sequence[Path], options: EvaluateOptions, *, load: Load | None = None) -> None:
    """Write each run's checklist.json and print a table of it, or all as JSON. InputError: no judge is named."""
    assert options.questions is not None, "called for a file of questions"
    if options.judge is None:
        raise InputError(f"--questions: name the judge that answers them, --judge {EXAMPLE}")
    checklists, judge = read_checklists(options.questions), connect(options.judge, key="--judge")
    with show_phases(options.quiet):
        found = evaluate_runs_by_questions(
            runs,
            checklists,
            judge,
            seeds=options.seed_range,
            stored=options.stored,
            load=load,
            overrides=options.overrides,
        )
    if options.as_json:
        print(to_json(found), end="")
        return
    asked = counted(judge.asked, "question")
    print(printable(f"asked now: {asked}; the others were answered before; judge {judge.chat.model}"))
    for name, result in found["runs"].items():
        counts = {"prompt": result["prompts"], "picture": result["images"], "question": 2 * result["questions"]}
        print(printable(f"{name}: " + ", ".join(counted(number, thing) for thing, number in counts.items())))
        if unclear := sum(result["unclear"].values()):
            print(f"not readable, so counted as wrong: {counted(unclear, 'answer')}")
        print_changes(name, result["metrics"])
    for name, metrics in found["between"].items():
        print_changes(f"{name} against {found['first']}", metrics)

"""`palate evaluate RUN --tasks`: things, numbers, colours and places, asked of base model and result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from palate.cli.model_source import load_run
from palate.cli.phases import show_phases
from palate.core import Model, Sampler
from palate.evaluate.tasks import SEEDS, TaskScore, evaluate_tasks, tasks_json
from palate.report.html import number, signed
from palate.rewards.tasks import TaskReward, task_prompts
from palate.runs import run_names
from palate.runtime.progress import printable

Load = Callable[[Path], tuple[Model, Sampler | None]]


def evaluate_with_tasks(
    runs: Sequence[Path],
    seeds: int | None,
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    load: Load = load_run,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write each run's tasks.json and print a table of it, or all as JSON. prompts: by task; None = `task_prompts`."""
    prompts, reward = prompts or task_prompts(), TaskReward(strict=True)
    if not quiet and not as_json:
        print(", ".join(f"{len(told)} of {task}" for task, told in prompts.items()) + " prompts")
    found = {}
    for run, name in zip(runs, run_names(runs), strict=True):
        with show_phases(quiet):
            model, sampler = load(run)
            scores = evaluate_tasks(model, sampler=sampler, seeds=range(seeds or SEEDS), prompts=prompts, reward=reward)
        found[name] = tasks_json(scores)
        (run / "tasks.json").write_text(json.dumps(found[name], indent=1) + "\n")
        if not as_json:
            _print_scores(name, scores)
    if as_json:
        print(json.dumps(found, indent=1))


def _print_scores(name: str, scores: Mapping[str, TaskScore]) -> None:
    table = Table(printable(name), "before", "after", "change", "95 %")
    for task, score in scores.items():
        interval = f"{signed(score.change_low)} to {signed(score.change_high)}"
        table.add_row(task, number(score.base), number(score.value), signed(score.change), interval)
    Console().print(table)

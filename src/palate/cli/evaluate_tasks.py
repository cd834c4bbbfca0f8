"""`palate evaluate RUN --tasks`: things, numbers, colours and places, asked of base model and result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from palate.cli.phases import show_phases
from palate.cli.result_tables import print_changes
from palate.evaluate.tasks import SEEDS, evaluate_tasks, tasks_json
from palate.rewards.tasks import TaskReward, task_prompts
from palate.runs.evaluation import Load, sides
from palate.runs.folder import RunFolder
from palate.runs.stored import run_names
from palate.runtime.files import write_atomically


def evaluate_with_tasks(
    runs: Sequence[Path],
    seeds: int | None,
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    load: Load,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write each run's tasks.json and print a table of it, or all as JSON. prompts: by task; None = `task_prompts`."""
    prompts, reward = prompts or task_prompts(), TaskReward(strict=True)
    if not quiet and not as_json:
        print("prompts: " + ", ".join(f"{len(own)} of {task}" for task, own in prompts.items()))
    found = {}
    for run, name in zip(runs, run_names(runs), strict=True):
        with show_phases(quiet):
            model, sampler = load(run)
            base, result = sides(RunFolder(run), sampler)
            scores = evaluate_tasks(
                model, base=base, result=result, seeds=range(seeds or SEEDS), prompts=prompts, reward=reward
            )
        found[name] = tasks_json(scores)
        write_atomically(run / "tasks.json", (json.dumps(found[name], indent=1) + "\n").encode())
        if not as_json:
            print_changes(name, found[name])
    if as_json:
        print(json.dumps(found, indent=1))

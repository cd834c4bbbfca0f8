"""The names that Palate writes into a run's folder: --fresh removes a folder that holds nothing else."""

from __future__ import annotations

from pathlib import Path

from palate.runtime.runlock import OWNER

OWN_FILES = frozenset({
    "recipe.yaml", "metrics.jsonl", "environment.json", "identity.json", "samples", "checkpoints", "adapter", "export",
    "report.html", "evaluation", "evaluation.json", "evaluation.html", "evaluations.json", "evaluations",
    "control.json", "steering.json", "relocated.json", "failures", "queries", "queries.jsonl", "rounds.jsonl",
    "tasks.json", "checklist.json", "answers.jsonl", "strengths", "strengths.json", "tensorboard", "wandb",
    "tracking.json", OWNER,
})  # fmt: skip
OWN_PREFIXES = (".tmp-", "compare", "round-")


def foreign_files(folder: Path) -> list[str]:
    """What lies in the folder and was not written by a run."""
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name not in OWN_FILES and not name.startswith(OWN_PREFIXES)]

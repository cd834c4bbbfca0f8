"""What `palate evaluate` does once its options are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.cli.phases import shown
from palate.cli.text import print_evaluation
from palate.evaluate import to_json
from palate.report import write_evaluation
from palate.runs import evaluate_runs
from palate.runtime.progress import printable


@dataclass(frozen=True)
class Asked:
    """What is evaluated, as the options say; None = as each recipe says."""

    prompts: Sequence[str] | None = None
    count: int | None = None
    seeds: int | None = None
    stored: bool = False
    overrides: Sequence[str] = ()


def evaluate(runs: Sequence[Path], asked: Asked, out: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Measure the runs, write their page, and print a table of each, or all as JSON."""
    with shown(quiet):
        found: dict[str, Any] = evaluate_runs(
            runs,
            prompts=asked.prompts,
            count=asked.count,
            seeds=None if asked.seeds is None else range(asked.seeds),
            stored=asked.stored,
            warn=logging.getLogger("palate").warning,
            overrides=asked.overrides,
        )
    page = write_evaluation(runs, found, out)
    if as_json:
        print(to_json(found), end="")
        return
    for name, evaluation in found["runs"].items():
        print_evaluation(name, evaluation)
    print(f"report: {printable(str(page))}")

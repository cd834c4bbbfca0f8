"""What `palate compare` does: a page side by side, a blind study, its score, a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palate.cli.compare_table import as_text, compare_runs
from palate.report import study, write_report
from palate.runs.stored import run_names
from palate.runtime.errors import InputError
from palate.runtime.progress import printable


def print_score(choices: Sequence[Path], key: Path | None, run: Path | None) -> None:
    """Print what the choices of a blind study say. key: None = looked for beside the choices and in `run`."""
    result = study.score(study.read_choices(choices), study.find_key(choices, key, run))
    print(printable(study.text_of(result)))


def print_table(runs: Sequence[Path], form: str, group: str | None) -> None:
    """Print the runs' evaluations in one of `compare_table.FORMATS`."""
    print(printable(as_text(form, *compare_runs(runs, group))), end="")


def write_blind_study(runs: Sequence[Path], page: Path | None, count: int, seed: int | None) -> None:
    """Write the page of a blind study of two runs, and its key."""
    if len(runs) != 2:
        raise InputError(f"--blind compares two runs, got {len(runs)}")
    page, secret = study.write_study(*runs, page=page, count=count, seed=seed)
    print(f"page: {printable(str(page))}")
    print(f"key:  {printable(str(secret))} (keep it; whoever chooses must not see it)")


def write_side_by_side(runs: Sequence[Path]) -> None:
    """Write one page of all runs, into the first one's folder."""
    run_names(runs)  # each once
    print(f"side by side: {printable(str(write_report(runs[0], compare=runs[1:])))}")

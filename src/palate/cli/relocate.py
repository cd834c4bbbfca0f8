"""What `palate relocate` does: all runs are checked before the first is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from palate.runs.relocate import relocation
from palate.runs.stored import RECIPE
from palate.runtime.errors import InputError
from palate.runtime.progress import printable


def relocate_runs(runs: Sequence[Path], old: Path, new: Path) -> None:
    """Write the runs' recipes with what lies under `old` under `new`, and print what changed; of several folders those
    that are no runs are passed over. InputError: nothing of any of them lies there."""
    before, after = whole(old), whole(new)
    found = [relocation(run, before, after) for run in runs if len(runs) == 1 or (run / RECIPE).is_file()]
    if not any(each.changed for each in found):
        raise InputError(
            f"--from: nothing of {', '.join(map(str, runs))} lies under {before}; their recipe.yaml names all"
        )
    for each in found:
        if each.changed:
            each.write()
        print(f"{printable(str(each.run))}: {', '.join(each.changed) or 'nothing of it lies there'}")


def whole(path: Path) -> str:
    """The path from the root, as recipes have it: symbolic links stay."""
    return os.path.abspath(path.expanduser())

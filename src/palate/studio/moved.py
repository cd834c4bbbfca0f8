"""A folder of runs that was moved: its runs begin with one another and with tastes in it, by whole paths."""

from __future__ import annotations

import logging
from pathlib import Path

from palate.runs.folder import RunFolder
from palate.runs.relocate import relocation
from palate.runtime.errors import PalateError
from palate.studio.workspace import Workspace

logger = logging.getLogger("palate")


def follow_move(workspace: Workspace) -> None:
    """Where the folder of runs lay elsewhere when its runs began, and lies there no more, tell them where it is."""
    runs = [workspace.runs / name for name in workspace.names()]
    for old in sorted({str(place) for run in runs if (place := _earlier_place(run))}):
        for run in runs:
            try:
                if (found := relocation(run, old, str(workspace.runs))).changed:
                    found.write()
            except (PalateError, OSError) as error:
                logger.warning("%s still looks for its files in %s: %s", run.name, old, error)


def _earlier_place(run: Path) -> Path | None:
    """The folder of runs in which this one began, if it is another and gone."""
    try:
        folder = RunFolder(run)
        if str(run) in folder.text:
            return None
        was = Path(str((folder.tree.get("run") or {}).get("folder") or ""))
    except (PalateError, OSError):
        return None
    moved = was.is_absolute() and was.name == run.name and was != run and not was.parent.exists()
    return was.parent if moved else None

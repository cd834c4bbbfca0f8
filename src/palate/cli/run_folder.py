"""Whether a run folder may be used or replaced, and how an earlier run is removed."""

from __future__ import annotations

from pathlib import Path

from palate.runtime.errors import InputError
from palate.runtime.files import in_shell, remove_folder
from palate.runtime.own_files import foreign_files
from palate.runtime.runlock import OWNER, owned


def check_room(folder: Path, fresh: bool) -> None:
    """InputError where the folder holds a run that nobody asked to replace."""
    if fresh:
        check_removable(folder)
    elif (folder / "metrics.jsonl").exists():
        raise InputError(
            f"{folder} already holds a run: continue it with `palate resume {in_shell(folder)}`, choose another "
            "run.folder, or replace it with --fresh"
        )
    elif (folder / "queries.jsonl").exists():
        raise InputError(
            f"{folder} holds the queries of a black-box objective, by palate optimize; choose another run.folder, or "
            "replace it, scores included, with --fresh"
        )


def remove_run(folder: Path) -> None:
    """Delete an earlier run, as its owner; refuses a folder that is not one, whatever the recipe says."""
    check_removable(folder)
    if folder.exists():
        with owned(folder):
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    remove_folder(path)
                elif path.name != OWNER:
                    path.unlink()


def check_removable(folder: Path) -> None:
    """InputError where the folder holds anything that no run wrote."""
    if not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"run.folder: {folder} is not an ordinary folder")
    if keys := sorted(path.name for path in folder.glob("compare*-key.json")):
        raise InputError(
            f"run.folder: {folder} holds {keys[0]}, without which the choices of its blind study cannot "
            "be read; move it elsewhere, or delete it, and then replace the run with --fresh"
        )
    if foreign := foreign_files(folder):
        raise InputError(f"run.folder: {folder} also holds {foreign[0]}, which no run wrote; --fresh leaves it alone")

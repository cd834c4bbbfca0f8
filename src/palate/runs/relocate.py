"""Tell a run where the files that it stands on lie now: its recipe is written anew, and nothing else of it changes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import NamedTuple

from palate.recipe import reader
from palate.recipe.identity import changes
from palate.recipe.relocation import FILE, gone, relocated, remembering, stored_moves
from palate.runs.folder import RunFolder
from palate.runs.python_run import begun_in_python
from palate.runs.stored import RECIPE
from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically
from palate.runtime.runlock import owned, require_free


class Relocation(NamedTuple):
    """What becomes of one run."""

    run: Path
    recipe: str  # the text of its recipe.yaml
    moves: dict[str, list[str]]  # what its relocated.json holds
    changed: dict[str, str]  # dotted key of the recipe -> the text of before

    def write(self) -> None:
        """The first texts come before the recipe that needs them, so that a crash in between harms nothing."""
        with owned(self.run):
            if self.moves:
                write_atomically(self.run / FILE, (json.dumps(self.moves, indent=1, sort_keys=True) + "\n").encode())
            write_atomically(self.run / RECIPE, self.recipe.encode())


def relocation(run: Path, old: str, new: str) -> Relocation:
    """The run's recipe with every path under `old` under `new`. InputError: nothing lies there, or something else than
    the run began with, or another process trains the run."""
    folder = RunFolder(run)
    require_free(run, "its recipe stays as it is")
    tree, changed = relocated(folder.tree, old, new)
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), folder.text.splitlines(keepends=True)))
    text = head + reader.yaml_of(tree)
    if changed:
        wrong = [f"{key}: nothing lies at {path}" for key, path in gone(tree) if key in changed]
        if not wrong and not begun_in_python(folder):
            wrong = changes(run, reader.parse(text, stored=True))
        if wrong:
            raise InputError("\n".join(f"{run}: {sentence}" for sentence in wrong))
    return Relocation(run, text, remembering(stored_moves(run), changed, tree), changed)

"""Where the studio's things lie: run folders side by side, and in the folder studio/ votes, pictures, tastes, logs."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palate.runtime.errors import InputError
from palate.runtime.exclusive import exclusive
from palate.runtime.files import write_atomically
from palate.taste.votes import VoteStore

HOME = "studio"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MODES = ("fresh", "champion")


class Workspace:
    """The folder of runs that the studio was opened on."""

    def __init__(self, runs: str | Path):
        self.runs = Path(runs).resolve()
        self.home = self.runs / HOME
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--runs: {self.home} cannot be made ({error.strerror or error}); name a folder that can be written to"
            ) from error
        self.store = VoteStore(self.home)
        self.tastes, self.logs, self.recipes = self.home / "tastes", self.home / "logs", self.home / "recipes"

    def names(self) -> list[str]:
        """The runs, newest first: folders that hold a recipe."""
        found: dict[str, float] = {}
        for path in self.runs.iterdir():
            with contextlib.suppress(OSError):  # deleted meanwhile, or not ours to read
                if _NAME.fullmatch(path.name) and (path / "recipe.yaml").is_file():
                    found[path.name] = (path / "recipe.yaml").stat().st_mtime
        return sorted(found, key=lambda name: -found[name])

    def unopenable(self) -> dict[str, str]:
        """Runs of the command line whose names cannot stand in an address, each with the reason."""
        found = []
        for path in self.runs.iterdir():
            with contextlib.suppress(OSError):
                if not _NAME.fullmatch(path.name) and (path / "recipe.yaml").is_file():
                    found.append(os.fsencode(path.name).decode("utf-8", "replace"))  # any bytes can be a name
        why = "rename the folder to open it: at most 64 letters, digits, dots, dashes and underscores"
        return dict.fromkeys(sorted(found), why)

    def run(self, name: str) -> Path:
        """The folder of a run by name. InputError: there is none; a name never leads out of the folder of runs."""
        if not (self.place(name) / "recipe.yaml").is_file():
            raise InputError(f"there is no run named {name[:64]!r} in {self.runs}")
        return self.runs / name

    def place(self, name: str) -> Path:
        """Where a run of that name lies, or would. InputError for what is no plain name."""
        if not _NAME.fullmatch(name) or name == HOME:
            raise InputError(f"there is no run named {name[:64]!r}")
        return self.runs / name

    def new_name(self, stem: str) -> str:
        """stem-1, stem-2, ...: one that is not taken, by a run, a start that waits, or a log."""
        taken = {p.name for p in self.runs.iterdir()} | {p.stem for p in self.logs.glob("*.log")}
        return next(name for k in range(1, 100_000) if (name := f"{stem}-{k}") not in taken)

    def checked_name(self, name: str) -> str:
        """A name for a new run. InputError: it is taken, or no plain name."""
        if not _NAME.fullmatch(name) or name == HOME:
            raise InputError(f"{name[:64]!r} cannot name a run; use letters, digits, dots, dashes, underscores")
        if (self.runs / name).exists():
            raise InputError(f"{name} is there already in {self.runs}; choose another name")
        return name

    def settings(self) -> dict[str, Any]:
        """What the person has set: mode (MODES), prompts of their own, the run whose model draws ("" the plain one)."""
        tree = self.read("settings.json")
        mode, prompts, source = tree.get("mode"), tree.get("prompts"), tree.get("source")
        return {
            "mode": mode if mode in MODES else "fresh",
            "prompts": [p for p in prompts if isinstance(p, str)] if isinstance(prompts, list) else [],
            "source": source if isinstance(source, str) else "",
        }

    def set(self, **changes: Any) -> None:
        with self.turn():
            self.write("settings.json", self.settings() | changes)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, no other thread, window's studio or command is inside: what is read and written back here loses
        nobody's change. Nests within a thread."""
        self.home.mkdir(parents=True, exist_ok=True)
        with exclusive(self.home):
            yield

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object of the studio's own; empty where there is none or it is damaged."""
        try:
            tree = json.loads((self.home / name).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return tree if isinstance(tree, dict) else {}

    def write(self, name: str, tree: dict[str, Any]) -> None:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(tree, ensure_ascii=False).encode())

    def rounds(self) -> list[str]:
        """The runs whose model was drawn from, in order."""
        runs = self.read("rounds.json").get("runs")
        return [run for run in runs if isinstance(run, str)] if isinstance(runs, list) else []

    def begin_round(self, run: str) -> None:
        """Draw with that run's model from now on."""
        with self.turn():
            self.write("rounds.json", {"runs": [*(name for name in self.rounds() if name != run), run]})
            self.set(source=run)

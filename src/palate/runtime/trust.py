"""Which Python files may run: those that this user has run, or has said so of.

A recipe may name code (`my_reward.py:score`), and a recipe, or a run, may come from somebody else. To train by a recipe
runs its code, and it is remembered here. What only looks at a recipe or a run imports no code but what is remembered:
of a run the file as it was, of a recipe, whose code is still being written, the file at that place.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from palate.runtime.errors import InputError
from palate.runtime.files import append, file_digest

ALL = "PALATE_TRUST_CODE"  # set to 1: all code may run, as in a container whose home folder does not last
Looking = Literal["", "recipe", "run"]

_looking: ContextVar[Looking] = ContextVar("looking", default="")


@contextlib.contextmanager
def only_looking(at: Looking) -> Iterator[None]:
    """Inside, a recipe is looked at and not run, or, which is stricter, that of a run."""
    before = _looking.set("run" if "run" in (at, _looking.get()) else at)
    try:
        yield
    finally:
        _looking.reset(before)


def admit(path: Path, key: str) -> None:
    """Remember a file that is about to run. InputError: it is only looked at, and not known; `key` is the recipe's."""
    looking = _looking.get()
    if not looking or os.environ.get(ALL) == "1":
        remember(path)
    elif not any(place == path and (looking == "recipe" or digest == file_digest(path)) for digest, place in known()):
        raise InputError(
            f"{key}: {path} is code that has not run here before"
            + (", or is not what ran" if looking == "run" else "")
            + f"; read it, and if it may run with your rights: palate trust {shlex.quote(str(path))}"
        )


def remember(path: Path) -> None:
    """That this user has run the file as it is. A place that cannot be written to remembers nothing."""
    path = path.resolve()
    row = file_digest(path), path
    if row not in known() and "\n" not in str(path):
        with contextlib.suppress(OSError):
            record().parent.mkdir(parents=True, exist_ok=True)
            append(record(), b"%s %s\n" % (row[0].encode(), os.fsencode(path)))


def known() -> set[tuple[str, Path]]:
    """(SHA-256, path) of all that may run."""
    try:
        lines = record().read_bytes().split(b"\n")
    except OSError:
        return set()
    rows = (line.partition(b" ") for line in lines)
    return {(digest.decode("ascii", "replace"), Path(os.fsdecode(path))) for digest, space, path in rows if space}


def record() -> Path:
    """Where it is remembered."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "palate/code.txt"

"""A run whose files lie elsewhere now: the paths of its recipe are named anew, and it stays the run that it was.

Paths of the model and the algorithm are in a run's fingerprint as they were written when it began. So identity.json
keeps, for each that is named anew, its first text, and the fingerprint goes on with that.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from palate.recipe.paths import TEXTS
from palate.runtime.code import names_a_file, split_name
from palate.runtime.errors import InputError
from palate.runtime.files import in_shell

FIRST = "first "  # before a key of the recipe, in identity.json: what stood there when the run began
IN_FINGERPRINT = ("model", "algorithm", "optimize")  # sections whose paths count as texts; of all others, the content
NO_PATH = (("run",), ("evaluate",), ("sample",))  # sections that name nothing a run goes on from
CACHE = ("model", "text_cache")  # made anew where it is missing

Keys = tuple[str, ...]


def relocated(tree: Mapping[str, Any], old: str, new: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe's tree with every path that begins with `old` beginning with `new`, and of each that changed the
    dotted key and the text of before. Prompts and control words are no paths."""
    pattern = re.compile(rf"(^|,\s*){re.escape(old)}(?=$|[/:]|\s\S+://)")  # alone, among tastes, or before a URL
    changed: dict[str, str] = {}

    def walk(value: Any, keys: Keys) -> Any:
        if isinstance(value, dict):
            return {walk(key, (*keys, "")): below if key in TEXTS else walk(below, (*keys, key))
                    for key, below in value.items()}  # fmt: skip
        if isinstance(value, list):
            return [walk(each, (*keys, str(i))) for i, each in enumerate(value)]
        if not isinstance(value, str):
            return value
        now = pattern.sub(lambda found: found[1] + new, value)
        if now != value:
            changed[".".join(filter(None, keys))] = value
        return now

    return walk(dict(tree), ()), changed


def with_first_texts(tree: Mapping[str, Any], first: Mapping[str, str]) -> dict[str, Any]:
    """The recipe's tree with those texts at their dotted keys, as it was when the run began."""
    begun = copy.deepcopy(dict(tree))
    for key, text in first.items():
        *sections, last = key.split(".")
        below: Any = begun
        for section in sections:
            below = below.get(section) if isinstance(below, dict) else None
        if isinstance(below, dict) and last in below:
            below[last] = text
    return begun


def first_texts(identity: Mapping[str, str]) -> dict[str, str]:
    """Dotted key -> the path that stood there when the run began, of what identity.json holds."""
    return {key.removeprefix(FIRST): text for key, text in identity.items() if key.startswith(FIRST)}


def remembering(identity: Mapping[str, str], changed: Mapping[str, str]) -> dict[str, str]:
    """What identity.json holds after the paths `changed` were named anew."""
    counted = {FIRST + key: text for key, text in changed.items() if key.startswith(IN_FINGERPRINT)}
    return counted | dict(identity)


def gone(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted key and path of what a run goes on from and no longer lies where its recipe says."""

    def walk(value: Any, keys: Keys) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, below in value.items():
                if key not in TEXTS and (*keys, key)[:1] not in NO_PATH and (*keys, key) != CACHE:
                    yield from walk(below, (*keys, key))
        elif isinstance(value, str) and value.startswith("/") and ", " not in value and "://" not in value:
            path = split_name(value)[0] if names_a_file(value) else Path(value)
            if not path.exists():
                yield ".".join(keys), str(path)

    yield from walk(dict(tree), ())


@contextlib.contextmanager
def told_of_moves(folder: Path, tree: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """What fails inside also says how the run in `folder` is told where its files lie now, if any is not in its place;
    `tree` gives the run's recipe."""
    try:
        yield
    except InputError as error:
        missing = next(gone(tree()), None)
        if missing is None:
            raise
        key, path = missing
        raise InputError(
            f"{error}\n{path} ({key}) is not there; if it, or a folder above it, lies elsewhere now: "
            f"palate relocate {in_shell(folder)} --from {in_shell(path)} --to NEW"
        ) from error

"""A run whose files lie elsewhere now: the paths of its recipe are named anew, and it stays the run that it was.

Paths of the model and the algorithm are in a run's fingerprint as they were written when it began. So relocated.json
keeps, for each that is named anew, its first text, and the fingerprint goes on with that.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.recipe.paths import TEXTS
from palate.runtime.code import names_a_file, split_name
from palate.runtime.errors import InputError
from palate.runtime.files import in_shell, parse_json

FILE = "relocated.json"
IN_FINGERPRINT = ("model", "algorithm", "optimize")  # sections whose paths count as texts; of all others, the content
NO_PATH = (("run",), ("evaluate",), ("sample",))  # sections that name nothing a run goes on from
CACHE = ("model", "text_cache")  # made anew where it is missing

Keys = tuple[str, ...]
Moves = Mapping[str, Sequence[str]]  # dotted key of the recipe -> (the text that it began with, the text now)
WEIGHT = re.compile(r":[-+.\deE]+$")  # of a taste, after its folder


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


def with_first_texts(tree: Mapping[str, Any], moves: Moves) -> dict[str, Any]:
    """The recipe's tree with the paths that the run began with, wherever one of them was named anew."""
    begun = copy.deepcopy(dict(tree))
    for key, (first, now) in moves.items():
        *sections, last = key.split(".")
        below: Any = begun
        for section in sections:
            below = below.get(section) if isinstance(below, dict) else None
        if isinstance(below, dict) and below.get(last) == now:
            below[last] = first
    return begun


def remembering(moves: Moves, before: Mapping[str, str], tree: Mapping[str, Any]) -> dict[str, list[str]]:
    """What relocated.json holds after the texts `before` were named anew as `tree` has them. Code counts by its name
    and content wherever it lies."""
    found = {key: list(pair) for key, pair in moves.items()}
    for key, text in before.items():
        if key.startswith(IN_FINGERPRINT) and not names_a_file(text):
            now: Any = tree
            for part in key.split("."):
                now = now[part]
            found[key] = [found[key][0] if key in found else text, now]
    return found


def stored_moves(folder: Path) -> dict[str, list[str]]:
    """What relocated.json of the run in `folder` holds; nothing where it stayed in its place. InputError: damaged."""
    try:
        found = parse_json((folder / FILE).read_bytes())
        if not isinstance(found, dict) or not all(isinstance(pair, list) and len(pair) == 2 for pair in found.values()):
            raise ValueError("expected pairs of texts by name")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{folder / FILE}: not what palate relocate keeps ({error}); restore it") from error
    return found


def gone(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted key and path of what a run goes on from and no longer lies where its recipe says."""

    def walk(value: Any, keys: Keys) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, below in value.items():
                if key not in TEXTS and (*keys, key)[:1] not in NO_PATH and (*keys, key) != CACHE:
                    yield from walk(below, (*keys, key))
        elif isinstance(value, str) and value.startswith("/") and "://" not in value and not Path(value).exists():
            for part in value.split(", "):
                path = split_name(part)[0] if names_a_file(part) else Path(WEIGHT.sub("", part))
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
        missing = None
        with contextlib.suppress(InputError, TypeError):  # a recipe that is none was the error
            missing = next(gone(tree()), None)
        if missing is None:
            raise
        key, path = missing
        raise InputError(
            f"{error}\n{path} ({key}) is not there; if it, or a folder above it, lies elsewhere now: "
            f"palate relocate {in_shell(folder)} --from {in_shell(path)} --to NEW"
        ) from error

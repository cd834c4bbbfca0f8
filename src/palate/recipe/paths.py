"""The paths of a recipe, absolute, so that a run goes on and is judged from any folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palate.runtime.code import names_a_file, split_name

FILES = {  # key -> whether a file is meant; else a file or a folder
    ("model", "start"): False,
    ("model", "folder"): False,
    ("model", "consistency"): False,
    ("model", "file"): True,
    ("prompts", "file"): True,
    ("prompts", "images"): False,
    ("prompts", "pairs"): True,
    ("prompts", "likes"): True,
    ("prompts", "preview"): True,
    ("evaluate", "file"): True,
    ("optimize", "features_source"): False,
}
NAMES = (("model", "name"), ("algorithm", "name"), ("reward", "name"), ("optimize", "oracle", "function"))
TEXTS = ("list", "positive", "negative")  # keys of any section whose values are prompts or words
BY_REWARD = ("weights", "source", "scale", "noised")  # of reward: mappings whose keys are names of rewards


def with_absolute_paths(tree: dict[str, Any], beside: Path | None = None) -> dict[str, Any]:
    """A copy of the recipe's tree with `~` expanded, and every relative path that exists made absolute.

    A path is looked for in the current folder, then in `beside`. One that exists in neither stays as it is: it may be
    the name of something in the package or on the hub, and if it is nothing, the reader of that key says so.
    """
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for (section, key), file in FILES.items():
        _change(tree, (section, key), lambda value, file=file: absolute(value, beside, file=file))
    _change(tree, ("optimize", "oracle", "checklist"), lambda value: absolute(value, beside))
    for where in NAMES:
        _change(tree, where, lambda value: _absolute_name(value, beside))
    for where in (("run", "folder"), ("model", "text_cache")):
        _change(tree, where, expand)
    reward = tree.get("reward")
    if isinstance(reward, dict):
        for key in BY_REWARD:
            if isinstance(reward.get(key), dict):
                reward[key] = {_absolute_name(name, beside): value for name, value in reward[key].items()}
        if isinstance(reward.get("source"), dict):
            reward["source"] = {name: absolute(value, beside) for name, value in reward["source"].items()}
    return tree


def absolute(value: Any, beside: Path | None = None, *, file: bool = False) -> Any:
    """The path made absolute where something lies there; a URL, a hub id or a name in the package as it is. Of "FILE
    URL", the source of a checklist, the file's path."""
    if isinstance(value, str) and (parts := value.rsplit(None, 1))[1:] and "://" in parts[1]:
        return f"{absolute(parts[0], beside, file=True)} {parts[1]}"
    if not isinstance(value, str) or not value or "://" in value:
        return value
    path = Path(expand(value))
    if path.is_absolute():
        return str(path)
    for folder in (Path.cwd(), beside):
        if folder is not None and ((folder / path).is_file() or (not file and (folder / path).exists())):
            return str(folder / path)
    return value


def without_folders(value: Any) -> Any:
    """A copy of the recipe's tree in which a path from the root or the home folder is its last part, which says nothing
    of a disk. Prompts and control words are no paths."""
    if isinstance(value, dict):
        return {without_folders(key): below if key in TEXTS else without_folders(below) for key, below in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    if not isinstance(value, str) or not value.startswith(("/", "~")):
        return value
    path, space, url = value.rpartition(" ")
    return f"{Path(path).name} {url}" if space and "://" in url else Path(value).name


def expand(value: Any) -> Any:
    """The text with a leading `~` or `~user` replaced by that home folder."""
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError:  # no such user
        return value


def _absolute_name(value: Any, beside: Path | None) -> Any:
    """FILE.py:OBJECT with the file absolute; any other name as it is."""
    if not isinstance(value, str) or not names_a_file(value):
        return value
    path, found = split_name(value)
    return f"{absolute(str(path), beside, file=True)}:{found}"


def _change(tree: dict[str, Any], where: tuple[str, ...], change: Any) -> None:
    """Replace the value at a nested key, if it is there; dictionaries on the way are copied."""
    *sections, key = where
    for section in sections:
        below = tree.get(section)
        if not isinstance(below, dict):
            return
        tree[section] = tree = dict(below)
    if key in tree:
        tree[key] = change(tree[key])

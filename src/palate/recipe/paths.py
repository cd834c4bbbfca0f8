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


def with_absolute_paths(tree: dict[str, Any], beside: Path | None = None, *, begins: bool = False) -> dict[str, Any]:
    """A copy of the recipe's tree with `~` expanded, and every relative path that exists made absolute.

    A path is looked for in the current folder, then in `beside`. One that exists in neither stays as it is: it may be
    the name of something in the package or on the hub, and if it is nothing, the reader of that key says so.

    model.training_adapter and a teacher's adapter and file stay as they are written where they lie in the current
    folder, until a run begins: so they are in the fingerprints of recipes, and of runs from before.
    """
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for (section, key), file in FILES.items():
        _change(tree, (section, key), lambda value, file=file: absolute(value, beside, file=file))
    _change(tree, ("optimize", "oracle", "checklist"), lambda value: absolute(value, beside))
    for where in NAMES:
        _change(tree, where, lambda value: _absolute_name(value, beside))
    for where in (("run", "folder"), ("model", "text_cache")):
        _change(tree, where, expand)
    for keys in _written(tree):
        _change(tree, keys, lambda value, file=keys[-1] == "file": _once_begun(value, beside, begins, file=file))
    reward = tree.get("reward")
    if isinstance(reward, dict):
        for key in BY_REWARD:
            if isinstance(reward.get(key), dict):
                reward[key] = {_absolute_name(name, beside): value for name, value in reward[key].items()}
        if isinstance(reward.get("source"), dict):
            reward["source"] = {
                name: _absolute_tastes(value, beside) if name == "taste" else absolute(value, beside)
                for name, value in reward["source"].items()
            }
    return tree


def _absolute_tastes(value: Any, beside: Path | None) -> Any:
    """ "FOLDER", or "FOLDER:WEIGHT, FOLDER:WEIGHT" as `taste.saved.parts_of` reads it, with the folders absolute."""
    whole = absolute(value, beside)
    if whole != value or not isinstance(value, str):
        return whole
    parts = [part.strip().rpartition(":") for part in value.split(",")]
    return ", ".join(f"{absolute(folder, beside)}{colon}{last}" if colon else absolute(last, beside)
                     for folder, colon, last in parts)  # fmt: skip


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
    of a disk, a server is no more than its kind and path, which says nothing of a network, and of a program only its
    name is left. Prompts and control words are no paths."""
    if isinstance(value, dict):
        return {
            without_folders(key): below if key in TEXTS else _program(below) if key == "command" else
            without_folders(below) for key, below in value.items()
        }  # fmt: skip
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    if not isinstance(value, str):
        return value
    path, space, url = value.rpartition(" ")
    if "://" in url:  # alone, or after the file of a checklist's questions
        return f"{without_folders(path)}{space}{_address(url)}"
    return Path(value).name if value.startswith(("/", "~")) else value


def _address(url: str) -> str:
    """The URL without its host and what may be a key; of a file its name, and the hub's as it is. A judge's model,
    which follows the number sign, stays."""
    kind, _, rest = url.partition("://")
    place, mark, model = rest.partition("#")
    if kind == "file":
        return Path(place).name
    host, slash, path = place.partition("?")[0].partition("/")
    return f"{kind}://{host if host == 'huggingface.co' else 'HOST'}{slash}{path}{mark}{model}"


def _program(command: Any) -> Any:
    """A command without its arguments, which may hold keys."""
    if not isinstance(command, list) or not command:
        return command
    return [Path(str(command[0])).name, *(["..."] if command[1:] else [])]


def _written(tree: dict[str, Any]) -> list[tuple[str, ...]]:
    """The keys whose paths become absolute once a run begins."""
    algorithm = tree.get("algorithm")
    teachers = algorithm.get("teachers") if isinstance(algorithm, dict) else None
    names = list(teachers) if isinstance(teachers, dict) else []
    found = [("algorithm", "teachers", name, key) for name in names for key in ("adapter", "file")]
    return [("model", "training_adapter"), *found]


def _once_begun(value: Any, beside: Path | None, begins: bool, *, file: bool) -> Any:
    """The path as it is written where it lies in the current folder and no run begins; else absolute."""
    here = absolute(value, file=file)
    if here != value:
        return here if begins else value
    return absolute(value, beside, file=file)


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

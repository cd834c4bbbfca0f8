"""YAML and overrides in, a checked `Recipe` out, and back to YAML.

A published recipe is named without its folder or ending (`srpo-emoji`), any other by its path; an override is
`trainer.steps=40`. An override's value is taken literally: a number, true, false, null, a quoted text or a list or
mapping in brackets as YAML has them, and every other text as it stands, number signs and colons included.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.resources
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from palate.data import RecipeError, read_text
from palate.recipe.checks import HasLaterKeys, HasOldKeys, validate
from palate.recipe.guard import identifying
from palate.recipe.names import PYTHON, near
from palate.recipe.paths import with_absolute_paths, without_folders
from palate.recipe.relocation import Moves, with_first_texts
from palate.recipe.settings import RESUMABLE_FIELDS, Recipe
from palate.recipe.unread import unread_overrides
from palate.runtime.code import code_digest, names_a_file, short_name
from palate.runtime.files import file_digest, json_digest, own_files
from palate.runtime.trust import only_looking

YAML_LIMIT = 256 * 1024  # bytes; a recipe is a page of text
YAML_DEPTH = 100
CACHES = (".npz", ".npy", ".pt")  # beside a folder's pictures: latents and texts as sd-scripts and others keep them
BOOLEAN = "tag:yaml.org,2002:bool"


class Loader(yaml.SafeLoader):
    """YAML whose booleans are true and false, as in its version 1.2: `off`, `no` and `on` are words."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag != BOOLEAN]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(BOOLEAN, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class Dumper(yaml.SafeDumper):
    """YAML that is read back as it was: a text with U+0085 in it, which is a line end to YAML, stands in quotes."""


def _text_node(dumper: Dumper, text: str) -> yaml.Node:
    style = '"' if "\x85" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _text_node)


def yaml_of(tree: Any) -> str:
    """The YAML text of plain values, their keys in order."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def published() -> dict[str, str]:
    """Name -> first comment line of every recipe in the package."""
    folder = importlib.resources.files("palate") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name[: -len(".yaml")]: f.read_text("utf-8").split("\n", 1)[0].lstrip("# ") for f in files}


def text_of(source: str) -> str:
    """The YAML text of a published recipe or of the file at a path."""
    if source in published():
        return (importlib.resources.files("palate") / "recipes" / f"{source}.yaml").read_text("utf-8")
    path = Path(source).expanduser()
    if not path.is_file():
        if re.match(r"[a-z]+(\.[\w.]+)+=", source):
            raise RecipeError(f"{source!r} is an override; the recipe comes first, its overrides follow")
        if (path / "recipe.yaml").is_file():
            raise RecipeError(
                f"{source!r} is a run, not a recipe: palate resume continues it; its recipe is {path / 'recipe.yaml'}, "
                "for another run.folder"
            )
        if path.is_dir():
            raise RecipeError(f"{source!r} is a folder, not a recipe; name the recipe's file in it")
        if len(path.parts) > 1 or path.suffix:  # meant as a path
            raise RecipeError(f"there is no file {source!r}; `palate recipes` lists the published recipes")
        known = published()
        hint = near(source, known) or f"; published recipes: {', '.join(known)}"
        raise RecipeError(f"no recipe named {source!r} and no such file{hint}")
    state = path.stat()
    return _text_of_file(path.absolute(), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _text_of_file(path: Path, modified: int, size: int) -> str:
    """The file's text, read once however many parts of a command ask for the recipe."""
    return read_text(path, limit=YAML_LIMIT)


def read(source: str, overrides: Sequence[str] = (), *, stored: bool = False) -> Recipe:
    """The checked recipe. Raises RecipeError with every mistake in it, one per line. stored: it is that of a run.

    Relative paths are looked for in the current folder, then beside the recipe's own file, and come out absolute.
    """
    text = text_of(source)
    beside = None if source in published() else Path(source).expanduser().absolute().parent
    return parse(text, overrides, beside=beside, stored=stored)


def parse(text: str, overrides: Sequence[str] = (), *, beside: Path | None = None, stored: bool = False) -> Recipe:
    """The checked recipe of a YAML text; `beside`: a second folder in which relative paths are looked for. stored: it
    is that of a run, perhaps begun before settings without an effect were refused, and read to look at or to go on, so
    that code of its own is imported only where it has run before."""
    if len(text.encode()) > YAML_LIMIT:
        raise RecipeError(f"the recipe is larger than {YAML_LIMIT // 1024} KiB")
    tree = read_yaml(text, "recipe")
    if not isinstance(tree, dict):
        got = "nothing" if tree is None else type(tree).__name__
        raise RecipeError(f"a recipe is a mapping of sections (run, model, algorithm, ...), got {got}")
    objects = [k for k, v in tree.items() if isinstance(v, dict) and str(v.get("name", "")).startswith(PYTHON)]
    if objects:
        raise RecipeError(
            f"this run was begun from Python, and its {', '.join(objects)} cannot be rebuilt from the recipe; go on "
            "with palate.train(..., resume=True), draw with palate.load(folder, model=...).sample(prompts), measure "
            "with palate.evaluate(folder, model=..., reward=...)"
        )
    mistakes: list[str] = []
    for override in overrides:
        _override(tree, override, mistakes)
    with only_looking("run") if stored else contextlib.nullcontext():
        recipe = validate(with_absolute_paths(tree, beside), mistakes, stored=stored)
    if recipe is not None:
        mistakes += unread_overrides(recipe, overrides)
    if mistakes or recipe is None:
        raise RecipeError("\n".join(mistakes))
    return recipe


def begun(recipe: Recipe) -> Recipe:
    """The recipe as a run that begins keeps it: it goes on and is judged from any folder."""
    return validate(with_absolute_paths(as_tree(recipe), begins=True), []) or recipe


def dump(recipe: Recipe) -> str:
    """The complete recipe as YAML, defaults included; `parse` reads it back to an equal one."""
    return yaml_of(as_tree(recipe))


def to_share(recipe: Recipe) -> str:
    """`dump` for others: without the folders of this disk."""
    return yaml_of(without_folders(as_tree(recipe)))


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values, the algorithm's name first in its section."""
    tree = json.loads(json.dumps(dataclasses.asdict(recipe)))
    tree["algorithm"] = {"name": recipe.algorithm.name, **tree["algorithm"]}
    return tree


def fingerprint(recipe: Recipe, moves: Moves | None = None) -> str:
    """Hash of what decides the numbers of a run; its length, folder, previews and checkpoints do not. moves: of a run
    whose paths were named anew (`relocation.stored_moves`)."""
    tree = with_first_texts(as_tree(recipe), moves or {})
    looked_at = tree["sample"]["image_size"]
    for key in ("run", "evaluate", "sample"):
        del tree[key]
    if looked_at is not None and recipe.trainer.guard.every:
        tree["sample"] = {"image_size": looked_at}  # the guard decides by what it sees at that size
    for key in ("device", "text_cache"):
        del tree["model"][key]
    for key in RESUMABLE_FIELDS:
        del tree["trainer"][key]
    for section, key in (
        (tree["reward"], "relative"), (tree["reward"], "taste"), (tree["model"], "reference"),
        (tree["model"], "quantize"), (tree["prompts"], "sizes"), (tree["prompts"], "likes"),
    ):  # fmt: skip
        if section[key] is None:
            del section[key]  # so that runs from before this key can be resumed
    tree["trainer"]["guard"] = identifying(tree["trainer"]["guard"])
    if tree["trainer"]["ema_every"] == 1:
        del tree["trainer"]["ema_every"]
    if "taste" in tree["reward"]:
        del tree["reward"]["taste"]["allow_unlearnt"]  # whether it may begin, not what it does
    tree["optimize"] = None  # palate optimize has an identity of its own
    tree["reward"]["source"] = {}  # where weights lie; what they are is in `recipe.identity`
    for key in {"file", "images", "pairs", "likes", "preview"} & tree["prompts"].keys():
        tree["prompts"][key] = content_digest(tree["prompts"][key])
    later = recipe.algorithm.later_keys if isinstance(recipe.algorithm, HasLaterKeys) else {}
    tree["algorithm"] = {k: v for k, v in tree["algorithm"].items() if k not in later or v != later[k]}
    if isinstance(recipe.algorithm, HasOldKeys):  # likewise: a key keeps its first name here
        first = {new: old for old, new in recipe.algorithm.old_keys.items()}
        tree["algorithm"] = {first.get(key, key): value for key, value in tree["algorithm"].items()}
    return json_digest(_with_code(tree))


def content_digest(path: str | None) -> str | None:
    """A file's SHA-256, or that of the names and contents of a folder's files (`own_files`) without what other trainers
    cache there; the name of anything else."""
    if path is None or not Path(path).exists():
        return path
    if Path(path).is_file():
        return file_digest(Path(path))
    files = [each for each in own_files(Path(path)) if each.suffix.lower() not in CACHES]
    return json_digest([[each.name, file_digest(each)] for each in files])


def _with_code(tree: Any) -> Any:
    """The tree with every FILE.py:OBJECT followed by the file's SHA-256, and without its folder."""
    if isinstance(tree, dict):
        return {_with_code(key): _with_code(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_code(value) for value in tree]
    return f"{short_name(tree)} {code_digest(tree)}" if isinstance(tree, str) and names_a_file(tree) else tree


def read_yaml(text: str, what: str) -> Any:
    """The value of a YAML text. RecipeError: it is not YAML, or nests too deep, or uses aliases, or a key twice."""
    return copy.deepcopy(_read_once(text, what))


@lru_cache(maxsize=64)
def _read_once(text: str, what: str) -> Any:
    """The value of a text that is read for the first time; whoever gets it must not change it."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):  # the scanner's time is quadratic in the depth
        depth += 1 if bracket in "[{" else -1
        if depth > YAML_DEPTH:
            raise RecipeError(f"the {what} is YAML nested deeper than {YAML_DEPTH} levels; a recipe has three")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=Loader)):
            raise RecipeError(
                f"the {what} uses YAML aliases (*name), which can grow without limit; write the values out"
            )
        if twice := _repeated_key(yaml.compose(text, Loader=Loader)):
            raise RecipeError(f"{twice.value}: given twice (line {twice.start_mark.line + 1} of the {what}); keep one")
        return Loader(text).get_single_data()
    except RecipeError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
        where = f" at line {mark.line + 1}" if mark else ""
        raise RecipeError(f"the {what} is not valid YAML{where}: {problem or str(error).splitlines()[0]}") from error


def _repeated_key(node: yaml.Node | None) -> yaml.Node | None:
    """The first key that a mapping holds twice, where YAML would silently keep the last."""
    seen: set[str] = set()
    below: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                return key
            seen.add(str(key.value))
            below = [*below, value]
    return next((found for child in below if (found := _repeated_key(child))), None)


def _override(tree: dict[str, Any], override: str, mistakes: list[str]) -> None:
    key, equals, value = override.partition("=")
    names = list(_names(key))
    if not equals or not all(names):
        mistakes.append(f"{override}: an override is written section.key=value, for example trainer.steps=40")
        return
    for position, part in enumerate(names[:-1]):
        below = tree.setdefault(part, {})
        if below is None:
            below = tree[part] = {}
        if not isinstance(below, dict):
            mistakes.append(f"{key}: {'.'.join(names[: position + 1])} is a value, not a section")
            return
        tree = below
    try:
        tree[names[-1]] = literal(value, f"value of {key}")
    except RecipeError as error:
        mistakes.append(str(error))


def _names(key: str) -> Iterator[str]:
    """The names of a dotted key; a part that is a file, as reward.source.my_reward.py:Mine, is the last of them."""
    section, dot, rest = key.partition(".")
    if ".py:" in key and dot:
        yield section
        name, dot, rest = rest.partition(".")
        yield name
        if dot:
            yield rest
        return
    yield from key.split(".")


def literal(text: str, what: str) -> Any:
    """The value that an override's text stands for: see the head of this file."""
    text = text.strip()
    if text.startswith(("[", "{")):
        return read_yaml(text, what)
    if text[:1] in ("'", '"') and len(text) > 1 and text[-1] == text[0]:
        try:
            return read_yaml(text, what)
        except RecipeError:
            return text  # quotation marks inside a sentence
    loader = Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    plain = ":" not in text and tag.rpartition(":")[2] in ("null", "bool", "int", "float")  # no dates, no 12:30
    return loader.construct_object(yaml.ScalarNode(tag, text)) if plain else text

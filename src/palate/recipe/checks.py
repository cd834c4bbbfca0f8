"""Every check of a recipe that needs no weights: types and limits of each key, and what must fit together.

All mistakes are reported at once, each as a sentence that names its key and the remedy.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import types
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

from pydantic import ConfigDict, TypeAdapter, ValidationError

from palate.algorithms import table as algorithms
from palate.data import RecipeError
from palate.recipe.cross_checks import check_effects, check_together
from palate.recipe.names import near
from palate.recipe.settings import (
    AlgorithmSettings,
    EvaluateSettings,
    ModelSettings,
    NoAlgorithm,
    OptimizeSettings,
    PromptSettings,
    Recipe,
    RewardSettings,
    RunSettings,
    SampleSettings,
    TrainerSettings,
)

SECTIONS: dict[str, type] = {
    "run": RunSettings,
    "model": ModelSettings,
    "reward": RewardSettings,
    "prompts": PromptSettings,
    "trainer": TrainerSettings,
    "sample": SampleSettings,
    "evaluate": EvaluateSettings,
    "optimize": OptimizeSettings,
}


@runtime_checkable
class HasOldKeys(Protocol):
    """Settings of which keys were renamed: old name -> new name, for one release."""

    old_keys: Mapping[str, str]


@runtime_checkable
class HasLaterKeys(Protocol):
    """Settings with keys that came after the first runs: key -> the value that those runs have."""

    later_keys: Mapping[str, Any]


def validate(tree: Mapping[str, Any], mistakes: list[str], *, stored: bool = False) -> Recipe | None:
    """The recipe of a tree, or None; what is wrong with it is added to `mistakes`. stored: it is a run's own, which
    may have settings without an effect."""
    rest = {key: value for key, value in tree.items() if not (value is None and key in SECTIONS)}
    section = rest.pop("algorithm", None)
    algorithm = _algorithm(section, mistakes)
    if "algorithm_name" in rest:
        mistakes.append("algorithm_name: unknown key; did you mean algorithm.name?")
        del rest["algorithm_name"]
    for key in [key for key in rest if key not in SECTIONS]:
        if homes := homes_of(str(key), None if algorithm is None else type(algorithm)):
            value = rest.pop(key)
            shown = f"={value}" if isinstance(value, (str, int, float)) else ""
            mistakes.append(f"{key}: unknown key; did you mean {' or '.join(f'{home}{shown}' for home in homes)}?")
    recipe = checked(Recipe, {**rest, "algorithm": algorithm or NoAlgorithm()}, "", mistakes)
    if recipe is None:
        return None
    check_together(recipe, mistakes)
    if not stored:
        check_effects(recipe, mistakes)
    return recipe if algorithm is not None else None


def check_trainer(values: Mapping[str, Any]) -> TrainerSettings:
    """The same checks for settings that come from Python. Raises RecipeError with every mistake."""
    mistakes: list[str] = []
    settings = checked(TrainerSettings, values, "", mistakes)
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return settings


@cache
def algorithm_settings(name: str) -> type:
    """The dataclass of an algorithm's hyperparameters; its objects carry `name`."""
    kind = algorithms.find(name).settings_class()
    if "name" in {field.name for field in dataclasses.fields(kind)}:
        raise RecipeError(f"algorithm.name {name}: its settings have a field `name`; call it something else")
    body = {
        "__pydantic_config__": ConfigDict(extra="forbid", allow_inf_nan=False),
        "__module__": kind.__module__,
        "name": name,
    }
    return type(kind.__name__, (kind,), {"__doc__": kind.__doc__, **body})


def homes_of(leaf: str, algorithm: type | None = None) -> list[str]:
    """Where a key of that name stands in a recipe: steps -> trainer.steps, sample.steps. algorithm: its settings."""
    found = []
    sections = SECTIONS if algorithm is None else {"algorithm": algorithm, **SECTIONS}
    for section, kind in sections.items():
        for field in dataclasses.fields(kind):
            if field.name == leaf:
                found.append(f"{section}.{leaf}")
            inner = _dataclass_in(get_type_hints(kind)[field.name])
            if inner is not None and leaf in {below.name for below in dataclasses.fields(inner)}:
                found.append(f"{section}.{field.name}.{leaf}")
    return sorted(found, key=lambda home: (not home.startswith("trainer."), home.count("."), home))[:2]


def _algorithm(section: Any, mistakes: list[str]) -> AlgorithmSettings | None:
    known = algorithms.names()
    if not isinstance(section, dict):
        mistakes.append(f"algorithm: expected a mapping with a name, one of {', '.join(known)}")
        return None
    name = section.get("name")
    try:
        kind = algorithm_settings(algorithms.find(str(name)).name)
    except ValueError as error:
        if isinstance(name, str) and ".py:" in name:
            mistakes.append(str(error))
        else:
            got = "none given" if name is None else f"got {name!r}{near(str(name), known)}"
            mistakes.append(f"algorithm.name: {got}; one of {', '.join(known)}, or FILE.py:CLASS")
        return None
    return checked(kind, {key: value for key, value in section.items() if key != "name"}, "algorithm.", mistakes)


@lru_cache(maxsize=128)
def _adapter(kind: type) -> TypeAdapter:
    """What checks values against a dataclass: its schema takes longer to make than a recipe to read."""
    return TypeAdapter(kind)


def checked(kind: type, values: Mapping[str, Any], prefix: str, mistakes: list[str]) -> Any:
    """An object of the dataclass `kind`, or None; what is wrong is added to `mistakes`, `prefix` before its key."""
    try:
        return _adapter(kind).validate_python(_as_meant(kind, values, prefix))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        unknown = [problem for problem in problems if problem["type"] == "unexpected_keyword_argument"]
        mistakes += [_sentence(kind, dict(problem), prefix) for problem in unknown or problems]
        left = values
        for problem in unknown:  # they hide what else is wrong
            left = _without(left, problem["loc"])
        return checked(kind, left, prefix, mistakes) if unknown else None
    except RecipeError as error:  # names its key
        mistakes.append(str(error))
        return None
    except ValueError as error:
        mistakes.append(f"{prefix.rstrip('.') or 'recipe'}: {error}")
        return None


def _as_meant(kind: type, values: Any, prefix: str) -> Any:
    """The values with keys under their new names, "a, b" made a list where a list of words is expected, and a command
    cut as a shell cuts it. Sections inside are treated alike."""
    if not isinstance(values, Mapping):
        return values
    values = _with_new_names(kind, values, prefix)
    hints = get_type_hints(kind)
    meant: dict[str, Any] = {}
    for key, value in values.items():
        hint = hints.get(key, Any)
        inner = _dataclass_in(hint)
        if value is None and inner is hint:  # a section without a key in it has its defaults
            continue
        if inner is not None:
            value = _as_meant(inner, value, f"{prefix}{key}.")
        elif isinstance(value, str) and _is_list_of_words(hint):
            if key == "command":
                try:
                    value = shlex.split(value)
                except ValueError as error:  # a quote without its end, for one
                    told = f"{error}"
                    raise RecipeError(
                        f"{prefix}{key}: {told[:1].lower()}{told[1:]} in {value!r}; write it as a shell reads it, or "
                        "as a list of words"
                    ) from error
            else:  # a prompt may hold commas, a word may not
                value = [value] if key == "list" else [word.strip() for word in value.split(",") if word.strip()]
        meant[key] = value
    return meant


def _with_new_names(kind: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values under the keys of today; of an old and a new one together, the last, which is an override."""
    old: Mapping[str, str] = kind.old_keys if isinstance(kind, HasOldKeys) else {}
    for key in old.keys() & values.keys():
        warnings.warn(
            f"{prefix}{key} is now {prefix}{old[key]}; the old name ends with the next release",
            UserWarning,
            stacklevel=2,
        )
    return {old.get(key, key): value for key, value in values.items()}


def _is_list_of_words(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_list_of_words(each) for each in get_args(hint))
    arguments = [each for each in get_args(hint) if each is not Ellipsis]
    if get_origin(hint) not in (list, tuple) or len(arguments) != 1:
        return False
    return arguments[0] is str or get_origin(arguments[0]) is Literal


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass of a hint such as `Settings | None`."""
    for each in (hint, *get_args(hint)):
        if isinstance(each, type) and dataclasses.is_dataclass(each):
            return each
    return None


def _without(tree: Mapping[str, Any], where: Sequence[str | int]) -> dict[str, Any]:
    """A copy that lacks the key at the end of `where`."""
    head, *rest = where
    left = {key: value for key, value in tree.items() if key != head}
    return {**left, str(head): _without(tree[str(head)], rest)} if rest else left


def _sentence(kind: type, problem: dict[str, Any], prefix: str) -> str:
    where = [str(part) for part in problem["loc"] if part != "[key]"]
    key = prefix + ".".join(where)
    if problem["type"] == "unexpected_keyword_argument":
        valid = [field.name for field in dataclasses.fields(_at(kind, where[:-1]))]
        inside = prefix + "".join(f"{part}." for part in where[:-1])
        hint = near(where[-1], valid, inside) or f"; valid keys: {', '.join(valid)}"
        return f"{key}: unknown key{hint}"
    key = key.rstrip(".") or "recipe"
    if problem["type"] == "value_error":  # the settings' own check, which says what it got
        return f"{key}: {problem['msg'].removeprefix('Value error, ')}"
    got = repr(problem.get("input"))
    got = got if len(got) <= 60 else got[:57] + "..."
    message = re.sub(r"dictionary or an instance of \w+|valid dictionary", "mapping of keys", problem["msg"])
    message = message.replace("valid tuple", "list").replace("tuple", "list").replace("Tuple", "List")
    hint = ""
    if problem["type"] == "literal_error" and isinstance(problem.get("input"), str):
        choices = problem["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        hint = near(problem["input"], choices)
    return f"{key}: {message[0].lower()}{message[1:]}, got {got}{hint}"


def _at(kind: type, where: list[str]) -> type:
    for part in where:
        inside = None if kind is Recipe else _dataclass_in(get_type_hints(kind).get(part))  # trainer.guard
        kind = SECTIONS.get(part, Recipe) if kind is Recipe else inside or kind
    return kind

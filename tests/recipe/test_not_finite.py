"""No number that is not finite gets in: every float of every section and algorithm, every option of every command."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest

from palate import recipe
from palate.algorithms import table
from palate.cli.app import app
from palate.models.merge import merge_adapters
from palate.recipe import settings

BASE = (
    "model: {{name: emoji}}\nalgorithm: {{name: {name}{more}}}\nreward: {{name: emoji}}\nprompts: {{list: [a dog]}}\n"
)
SECTIONS = {
    "run": settings.RunSettings, "model": settings.ModelSettings, "trainer": settings.TrainerSettings,
    "trainer.guard": settings.GuardSettings, "sample": settings.SampleSettings, "evaluate": settings.EvaluateSettings,
    "optimize": settings.OptimizeSettings, "optimize.oracle": settings.OracleSettings,
    "reward.relative": settings.RelativeSettings, "reward.taste": settings.TasteSettings,
}  # fmt: skip
NEEDED = {"opd": ", teachers: {a: {adapter: x}}"}


def is_float(hint: Any) -> bool:
    return hint is float or any(is_float(each) for each in get_args(hint) if not isinstance(each, (str, int, float)))


def floats(kind: type) -> dict[str, str]:
    """Field -> its hint as text, of the fields that hold a float."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: str(hints[field.name]) for field in dataclasses.fields(kind) if is_float(hints[field.name])}


def written(hint: str, value: str) -> str:
    return f"[{value}, {value}]" if "tuple" in hint else f"{{policy: {value}}}" if "dict" in hint else value


@pytest.mark.parametrize("section", [*SECTIONS, *(f"algorithm {name}" for name in table.names())])
def test_every_float_of_a_recipe_is_a_number(section):
    name = section.removeprefix("algorithm ") if section.startswith("algorithm ") else "srpo"
    kind = SECTIONS.get(section) or table.find(name).settings_class()
    text = BASE.format(name=name, more=NEEDED.get(name, ""))
    for key, hint in floats(kind).items():
        for value in (".nan", ".inf", "-.inf"):
            place = f"{section if section in SECTIONS else 'algorithm'}.{key}"
            with pytest.raises(recipe.RecipeError) as refused:
                recipe.parse(text, [f"{place}={written(hint, value)}"])
            assert place in str(refused.value) or f"{key}" in str(refused.value), place


def commands() -> list[tuple[str, str]]:
    """(command, option) of every option that takes a float."""
    found = []
    for info in app.registered_commands:
        assert info.callback is not None
        for name, hint in get_type_hints(info.callback).items():
            if is_float(hint):
                found.append((info.name or info.callback.__name__, f"--{name.replace('_', '-')}"))
    return found


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_every_float_of_a_command_is_a_number(value, palate):
    found = commands()
    assert {"sample", "plan"} <= {name for name, _ in found}
    for name, option in found:
        code, _, error = palate(name, "x", option, value)
        assert code == 2 and f"Invalid value for '{option}'" in error, (name, option, error)


def test_weights_of_a_merge_are_numbers(palate):
    for value in ("nan,1", "inf,1"):
        code, _, error = palate("merge", "a", "b", "--out", "c", "--weights", value)
        assert code == 2 and "--weights" in error and "does not exist" not in error
    with pytest.raises(ValueError, match="finite"):
        merge_adapters(["a"], [float("nan")], "c")

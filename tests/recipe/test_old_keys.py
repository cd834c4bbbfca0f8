"""Keys of recipes that were renamed keep working for one release, with a warning that names the new one."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

from palate import recipe
from palate.algorithms import table

RENAMED = [
    (name, old, new)
    for name in table.names()
    for old, new in vars(table.find(name).settings_class()).get("old_keys", {}).items()
]
BASE = {"srpo": "srpo-emoji", "distar": "distar-emoji-quick"}


def test_the_table_has_renamed_keys():
    assert {("srpo", "anchor", "reference_penalty"), ("distar", "distil_steps", "reward_start_step")} <= set(RENAMED)


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_an_old_key_is_the_new_one_and_says_so(name, old, new, tmp_path):
    value = 2
    with pytest.warns(UserWarning, match=rf"algorithm\.{old} is now algorithm\.{new}; the old name ends"):
        found = recipe.read(BASE[name], [f"algorithm.{old}={value}"])
    assert vars(found.algorithm)[new] == value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        today = recipe.read(BASE[name], [f"algorithm.{new}={value}"])
    assert found == today and recipe.fingerprint(found) == recipe.fingerprint(today)
    file = tmp_path / "old.yaml"
    file.write_text(recipe.dump(today).replace(f"  {new}:", f"  {old}:"))
    with pytest.warns(UserWarning, match=f"is now algorithm.{new}"):
        again = recipe.read(str(file), [f"algorithm.{old}=3"])
    assert vars(again.algorithm)[new] == 3


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_runs_from_before_the_new_name_can_be_resumed(name, old, new, monkeypatch):
    """The fingerprint has the key's first name, as it had then."""
    seen = []
    monkeypatch.setattr("palate.recipe.reader.json_digest", lambda tree: seen.append(tree) or "digest")
    recipe.fingerprint(recipe.read(BASE[name]))
    assert old in seen[-1]["algorithm"] and new not in seen[-1]["algorithm"]
    fields = {field.name for field in dataclasses.fields(table.find(name).settings_class())}
    assert new in fields and old not in fields

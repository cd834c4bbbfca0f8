"""A new family is one file, found by its FAMILY line; docs/adding.md shows one whole."""

from __future__ import annotations

import re
from pathlib import Path

from palate import models, recipe

PACKAGE = Path(models.__file__).parent.parent
SHOWN = PACKAGE / "models" / "aura_flow.py"


def test_the_page_shows_a_family_that_is_tested_and_named_nowhere_else():
    """aura-flow passes the contract and the parity of tests/tiny_families.py; no other file of the package knows it."""
    page = (Path(__file__).parent.parent / "docs" / "adding.md").read_text()
    shown = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "FAMILY" in block]
    assert shown == [SHOWN.read_text()]
    others = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".yaml") and path != SHOWN]
    assert len(others) > 50
    assert not [path for path in others if re.search("aura.?flow", path.read_text("utf-8"), re.IGNORECASE)]


def test_a_file_beside_the_others_is_a_family_that_recipes_can_name(tmp_path, monkeypatch):
    text = SHOWN.read_text().replace('"aura-flow"', '"own-flow"')
    text = text.replace("text_tokens: int = 256", "file_size: int = 1")
    (tmp_path / "own_flow.py").write_text(text)
    (tmp_path / "helper.py").write_text("class NoFamily:\n    pass\n")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    found = recipe._families()
    assert found.keys() - recipe.MODELS.keys() == {"own-flow"}
    module, kind, keys = found["own-flow"]
    assert (module, kind) == ("palate.models.own_flow", "AuraFlow")
    assert keys[-1] == "file_size" and "image_size" in keys and not {"folder", "training", "lora_rank"} & set(keys)

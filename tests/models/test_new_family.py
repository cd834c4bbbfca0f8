"""A new family is one file, found by its name; docs/adding.md shows one whole."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from palate import models
from palate.models import families
from palate.runtime.errors import InputError

PACKAGE = Path(models.__file__).parent.parent
SHOWN = PACKAGE / "models" / "aura_flow.py"


def test_the_page_shows_a_family_that_is_tested_and_named_nowhere_else():
    """aura-flow passes the contract and the parity of tiny_families.py; no other file of the package knows it."""
    page = (ROOT / "docs" / "adding.md").read_text()
    shown = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "FAMILY" in block]
    assert shown == [SHOWN.read_text()]
    listed = PACKAGE / "__init__.py"  # the public names; recipes do not need it there
    others = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".yaml") and path not in (SHOWN, listed)]
    assert len(others) > 50
    texts = {path: path.read_text("utf-8").replace("ModelSamplingAuraFlow", "") for path in others}  # a ComfyUI node
    assert not [path for path, text in texts.items() if re.search("aura.?flow", text, re.IGNORECASE)]


def test_a_file_beside_the_others_is_a_family_that_recipes_can_name(tmp_path, monkeypatch):
    text = SHOWN.read_text().replace('"aura-flow"', '"own-flow"')
    text = text.replace("text_tokens: int = 256", "file_size: int = 1")
    (tmp_path / "own_flow.py").write_text(text)
    before = families.names()
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    assert set(families.names()) - set(before) == {"own-flow"}
    found = families.find("own-flow")
    assert (found.module, found.kind) == ("palate.models.own_flow", "AuraFlow")
    assert found.keys[-1] == "file_size" and "image_size" in found.keys
    assert not {"folder", "training", "lora_rank"} & set(found.keys)


def test_a_familys_file_that_changed_is_read_again(tmp_path):
    """Its keys are kept between recipes, and not beyond the file's next version."""
    file = tmp_path / "own.py"
    for key in ("depth", "width_of"):
        file.write_text(f"class Own:\n    @classmethod\n    def load(cls, folder, *, {key}): ...\n")
        assert families.find(f"{file}:Own").keys == families.find(f"{file}:Own").keys == (key,)


def test_every_other_file_of_the_folder_is_a_family_of_its_own_name():
    for name in families.names():
        found = families.find(name)
        assert found.load_class().__name__ == found.kind
        assert name == sys.modules[found.module].FAMILY
    for name in families.MECHANISM:
        assert not hasattr(importlib.import_module(f"palate.models.{name}"), "FAMILY")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with an entry point, as pip leaves one."""
    (tmp_path / "their_package.py").write_text(
        "class Theirs:\n    @classmethod\n    def load(cls, folder, *, depth): ...\n"
    )
    info = tmp_path / "their_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their_package\nVersion: 1\n")
    points = "theirs = their_package:Theirs\ngone = their_package_gone:Lost\nlost = their_package:Lost\n"
    (info / "entry_points.txt").write_text(f"[palate.models]\n{points}")
    monkeypatch.syspath_prepend(str(tmp_path))
    families._installed.cache_clear()
    yield
    families._installed.cache_clear()


def test_an_installed_package_adds_a_family_by_an_entry_point(installed):
    found = families.find("theirs")
    assert found.keys == ("depth",) and found.load_class().__module__ == "their_package"
    for name in ("gone", "lost"):  # a broken package is an error where it is used, and nowhere else
        with pytest.raises(InputError, match=f"model.name {name}: .*reinstall its package"):
            families.find(name).load_class()


def test_an_unknown_family_is_told_which_there_are():
    with pytest.raises(InputError, match=r"got 'fluxx'; expected one of .*flux"):
        families.find("fluxx")


def test_looking_families_up_does_not_import_torch():
    code = "import sys; from palate.models import families as f; [f.find(n) for n in f.names()]"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

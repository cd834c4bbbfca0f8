"""The figures of tools/house.py are at their limits or below, so that the code stays as readable as it is.

A limit goes down when the code allows it, and never up.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from functools import cache

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import house


@cache
def package() -> house.House:
    """Of the package, read when the first test asks: every process collects this file."""
    return house.House(house.read())


def test_no_modules_import_one_another():
    assert package().circles() == []


def test_imports_hide_in_functions_of_the_command_line_only():
    """There they keep `palate --help` quick; elsewhere they would hide an arrow that points upwards."""
    assert package().hidden() == []


def test_a_command_imports_one_module_of_its_own():
    """In cli/: the module that does the work, a few more where one of several is wanted; no list of imports."""
    assert len(package().hidden_in_cli()) <= 38, package().hidden_in_cli()


def test_imports_in_functions_of_the_command_line_find_what_they_name():
    """Importing the package does not run them: a module that was renamed shows when its command is used."""
    for path in sorted((ROOT / "src/palate/cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("palate"):
                module = importlib.import_module(str(node.module))
                for name in (alias.name for alias in node.names):
                    there = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}")
                    assert there, f"{path.name}, line {node.lineno}: {node.module} has no {name}"


def test_classes_and_functions_fit_on_a_few_screens():
    """Classes have at most 200 lines, functions at most 60."""
    assert [found for found in package().classes() if found[0] > 200] == []
    assert [found for found in package().functions() if found[0] > 60] == []


def test_every_constant_is_read():
    """What nobody reads says in its comment what the code does not do. A test may be the only reader."""
    modules = package().modules
    nodes = {name: list(ast.walk(module.tree)) for name, module in modules.items()}
    imports = [node for found in nodes.values() for node in found if isinstance(node, ast.ImportFrom)]
    imported = {(node.module, alias.name) for node in imports for alias in node.names}
    elsewhere = {node.attr for found in nodes.values() for node in found if isinstance(node, ast.Attribute)}
    for path in (ROOT / "tests").rglob("*.py"):
        elsewhere |= set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", path.read_text("utf-8")))
    unread = []
    for name, module in modules.items():
        names = [node for node in nodes[name] if isinstance(node, ast.Name)]
        own = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        for node in module.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            made = [target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper()]
            unread += [f"{name}.{c}" for c in made if c not in own | elsewhere and (name, c) not in imported]
    assert unread == []


def test_few_functions_take_more_than_seven_parameters():
    assert len(package().wide()) <= 8, package().wide()


def test_abilities_are_protocols_and_not_probed_for():
    """What is left asks other people's objects, or fields of dataclasses by name."""
    assert len(package().probes()) <= 25, package().probes()
    own = ("hasattr(model,", "getattr(model,", "hasattr(algorithm,", "getattr(algorithm,", "hasattr(reward,",
           "getattr(reward,", "(self.model,", "(self.algorithm,", "(self.reward,")  # fmt: skip
    assert [probe for probe in package().probes() if any(part in probe for part in own)] == []


def test_pixels_become_bytes_and_back_in_one_file():
    assert {found.split(":")[0] for found in package().conversions()} == {"palate.runtime.images"}


def test_every_public_class_and_function_has_a_docstring():
    assert package().undocumented() == []


SAMPLE = {
    "palate": "",
    "palate.a": "from palate import b\ndef f(x, y, z, p, q, r, s, t):\n    from palate.c import g\n    return g.x\n",
    "palate.b": "import palate.c\nclass Long:\n" + "    x = 1\n" * 9,
    "palate.c": "from palate.a import f\ndef g():\n    '''text'''\n    return hasattr(f, 'x') * 255 .round()\n",
    "palate.d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from palate.e import h\n",
    "palate.e": "from palate.d import x\ndef h(a: int, b: int, c: int, d: int, e: int, f: int, g: int): ...\n",
}


@pytest.fixture
def sample(tmp_path):
    for name, text in SAMPLE.items():
        path = tmp_path / "palate" / ("__init__.py" if name == "palate" else name.split(".")[1] + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return house.House(house.read(tmp_path))


def test_the_counters_count(sample):
    """A circle of three, one hidden import, one wide function, a probe; what stands under TYPE_CHECKING is no arrow."""
    assert sample.circles() == [["palate.a", "palate.b", "palate.c"]]
    assert sample.hidden() == ["palate.a:3 imports palate.c"]
    assert sample.wide() == ["palate.a.f (8)"] and sample.classes()[0] == (10, "palate.b.Long")
    assert [probe.split()[0] for probe in sample.probes()] == ["palate.c:4"]
    assert len(sample.conversions()) == 1
    assert {"palate.a.f", "palate.b.Long", "palate.e.h"} <= set(sample.undocumented())
    assert "palate.c.g" not in sample.undocumented()

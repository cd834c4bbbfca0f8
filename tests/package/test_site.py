"""The documentation site is whole: navigation, links, anchors and made pages, without building it; and it builds."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import house

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)")
MARKER = re.compile(r"^<!-- made: (\S+) ?(.*?) -->$", re.MULTILINE)
UNDOCUMENTED = (  # not for users of the library: the programs, and the shims of moved modules
    "palate.cli", "palate.studio", "palate.__main__", "palate.blind", "palate.checkpoint", "palate.distributed",
    "palate.doctor", "palate.failure", "palate.launch", "palate.progress", "palate.replay", "palate.vocabulary",
)  # fmt: skip


def leaves(nav) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from leaves(part)


def prose(text: str) -> str:
    """The text without what stands in code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """What the headings of a page are reached by."""
    titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", title)).strip().lower() for title in titles)
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


def test_every_page_is_once_in_the_navigation():
    named = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    assert sorted(named) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", [*PAGES, *TOP], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in LINK.findall(prose(page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: there is no {target}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


def test_what_is_made_from_the_code_has_something_to_be_made_from():
    hooks = ast.parse((ROOT / "tools" / "docs_hooks.py").read_text("utf-8"))
    table = next(n.value for n in hooks.body if isinstance(n, ast.AnnAssign) and n.target.id == "MADE")
    kinds, modules = {key.value for key in table.keys}, house.read()
    for page in PAGES:
        for kind, rest in MARKER.findall(page.read_text("utf-8")):
            assert kind in kinds, f"{page}: {kind}"
            for name in rest.split():
                there = {"file": ROOT / name, "program": ROOT / "examples" / f"{name}.py",
                         "notebook": ROOT / "examples" / f"{name}.ipynb"}.get(kind)  # fmt: skip
                assert there.is_file() if there else name in modules, f"{page}: {name}"


def test_every_public_module_is_on_a_page():
    shown = {name for page in PAGES for kind, rest in MARKER.findall(page.read_text("utf-8")) if kind == "modules"
             for name in rest.split()}  # fmt: skip
    covered = tuple(f"{name}." for name in (*shown, *UNDOCUMENTED))
    assert [name for name in house.read() if name != "palate" and not f"{name}.".startswith(covered)] == []


def test_every_program_of_examples_is_on_the_page_of_examples():
    text = (DOCS / "examples.md").read_text("utf-8")
    shown = {rest for kind, rest in MARKER.findall(text) if kind == "program"}
    assert shown == {path.stem for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.soak
def test_the_site_builds_strictly(tmp_path):
    """Continuous integration builds it too (`make docs`)."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    keys = (tmp_path / "site/reference/recipe-keys/index.html").read_text("utf-8")
    assert "<code>anchor</code> is the old name of <code>reference_penalty</code>" in keys and "old_keys" not in keys
    assert "palate votes import" in (tmp_path / "site/reference/command-line/index.html").read_text("utf-8")

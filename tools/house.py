"""The figures that keep the code readable, counted on the syntax trees of src/palate.

    python tools/house.py            # the table
    python tools/house.py --list     # and what each figure is made of

`tests/package/test_house.py` holds the figures at their limits. Nothing here imports the package.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
TO_BYTES = re.compile(r"\* ?255.*(byte|uint8|round)|\bmul_?\(255|\.float\(\) ?/ ?255")


@dataclass(frozen=True)
class Module:
    name: str  # palate.train.loop
    path: Path
    tree: ast.Module
    source: str

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Import:
    source: str
    target: str
    line: int
    hidden: bool  # inside a function


def read(root: Path = ROOT / "src") -> dict[str, Module]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in sorted((root / "palate").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text("utf-8")
        found[name] = Module(name, path, ast.parse(source), source)
    return found


@dataclass(frozen=True)
class House:
    modules: dict[str, Module]

    @cached_property
    def imports(self) -> list[Import]:
        """Imports of palate by palate; those under TYPE_CHECKING do not count."""
        return [found for module in self.modules.values() for found in self._imports(module)]

    def _imports(self, module: Module) -> Iterator[Import]:
        def visit(node: ast.AST, hidden: bool) -> Iterator[Import]:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                for child in node.orelse:
                    yield from visit(child, hidden)
                return
            for target in self._targets(module, node):
                yield Import(module.name, target, node.lineno, hidden)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, hidden or isinstance(node, (*FUNCTION, ast.Lambda)))

        return visit(module.tree, False)

    def _targets(self, module: Module, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.package.split(".")[: len(module.package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            whole = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in self.modules else base for name in whole]
        else:
            return []
        return sorted({name for name in names if name in self.modules})

    def circles(self) -> list[list[str]]:
        """Groups of modules that import one another, directly or not (strongly connected components of two or more).

        An `__init__` that hands on the names of its parts makes no circle: the parts do not count as importing it.
        """
        arrows: dict[str, set[str]] = {name: set() for name in self.modules}
        for found in self.imports:
            if found.source != found.target and not found.source.startswith(found.target + "."):
                arrows[found.source].add(found.target)
        reach = {name: _reachable(arrows, name) for name in arrows}
        groups = {frozenset({name, *(n for n in reach[name] if name in reach[n])}) for name in arrows}
        return sorted(sorted(group) for group in groups if len(group) > 1)

    def hidden(self) -> list[str]:
        """Imports of palate inside functions, outside cli/ and `palate/__init__`."""
        free = ("palate.cli", "palate.__main__")
        return [
            f"{found.source}:{found.line} imports {found.target}"
            for found in self.imports
            if found.hidden and found.source != "palate" and not found.source.startswith(free)
        ]

    def hidden_in_cli(self) -> list[str]:
        return [
            f"{f.source}:{f.line}"
            for f in self.imports
            if f.hidden and f.source.startswith(("palate.cli", "palate.__m"))
        ]

    def classes(self) -> list[tuple[int, str]]:
        """(lines, name) of every class, the longest first."""
        return self._sizes((ast.ClassDef,))

    def functions(self) -> list[tuple[int, str]]:
        """(lines, name) of every function, the longest first."""
        return self._sizes(FUNCTION)

    def files(self) -> list[tuple[int, str]]:
        """(lines, name) of every module outside algorithms/, the longest first."""
        found = [(len(m.source.splitlines()), m.name) for m in self.modules.values() if ".algorithms." not in m.name]
        return sorted(found, reverse=True)

    def wide(self, limit: int = 7) -> list[str]:
        """Functions with more than `limit` parameters; self and cls do not count."""
        found = []
        for module, node in self._nodes(FUNCTION):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [a.arg for a in every if a.arg not in ("self", "cls")]
            if len(names) > limit:
                found.append(f"{module.name}.{node.name} ({len(names)})")
        return found

    def probes(self) -> list[str]:
        """Calls of hasattr and getattr."""
        return [
            f"{module.name}:{node.lineno} {ast.unparse(node)}"
            for module, node in self._nodes((ast.Call,))
            if isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr")
        ]

    def conversions(self) -> list[str]:
        """Lines that turn floats into bytes of pixels or back."""
        return [
            f"{module.name}:{number} {line.strip()}"
            for module in self.modules.values()
            for number, line in enumerate(module.source.splitlines(), 1)
            if TO_BYTES.search(line.partition("#")[0])
        ]

    def undocumented(self) -> list[str]:
        """Public classes and functions of public modules without a docstring; the studio is no library."""
        found = []
        for module in self.modules.values():
            if any(part.startswith("_") or part == "studio" for part in module.name.split(".")):
                continue
            for node in module.tree.body:
                public = isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_")
                if public and not ast.get_docstring(node):
                    found.append(f"{module.name}.{node.name}")
            if not ast.get_docstring(module.tree) and module.source.strip():
                found.append(module.name)
        return found

    def _nodes(self, kinds: tuple[type[ast.AST], ...]) -> Iterator[tuple[Module, ast.AST]]:
        for module in self.modules.values():
            for node in ast.walk(module.tree):
                if isinstance(node, kinds):
                    yield module, node

    def _sizes(self, kinds: tuple[type[ast.AST], ...]) -> list[tuple[int, str]]:
        found = [(n.end_lineno - n.lineno + 1, f"{m.name}.{n.name}") for m, n in self._nodes(kinds)]
        return sorted(found, reverse=True)


def _reachable(arrows: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += arrows[name]
    return found


def table(house: House) -> list[tuple[str, int, list[str]]]:
    """(figure, count, what it is made of)."""
    longest = lambda sizes: [f"{lines} {name}" for lines, name in sizes[:12]]  # noqa: E731
    return [
        ("import circles", len(house.circles()), [", ".join(group) for group in house.circles()]),
        ("palate imports in functions, outside cli and __init__", len(house.hidden()), house.hidden()),
        ("palate imports in functions of cli", len(house.hidden_in_cli()), []),
        ("longest class", house.classes()[0][0], longest(house.classes())),
        ("longest function", house.functions()[0][0], longest(house.functions())),
        ("longest file outside algorithms/", house.files()[0][0], longest(house.files())),
        ("functions with more than 7 parameters", len(house.wide()), house.wide()),
        ("calls of hasattr and getattr", len(house.probes()), house.probes()),
        ("files that turn floats into pixels' bytes or back", len({c.split(":")[0] for c in house.conversions()}),
         house.conversions()),
        ("public names without a docstring", len(house.undocumented()), house.undocumented()),
    ]  # fmt: skip


if __name__ == "__main__":
    for name, count, parts in table(House(read())):
        print(f"{count:6}  {name}")
        if "--list" in sys.argv:
            print("".join(f"        {part}\n" for part in parts), end="")

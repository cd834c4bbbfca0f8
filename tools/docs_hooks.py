"""What `mkdocs.yml` calls while the site is built: pages made from the code, and checks that end the build.

Pages hold a line `<!-- made: NAME ... -->`; `MADE[NAME]` returns the Markdown that takes its place.
"""

from __future__ import annotations

import ast
import itertools
import json
import posixpath
import re
import sys
import tokenize
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from mkdocs.exceptions import PluginError

sys.path.insert(0, str(Path(__file__).parent))

from house import ROOT, House, Module, read

MARKER = re.compile(r"^<!-- made: (\S+) ?(.*?) -->$", re.MULTILINE)
HOST = r"[\"']?(?:https?:)?//"
FOREIGN = re.compile(
    rf"<(?:script|img|iframe|source|video)[^>]+src={HOST}"
    rf"|<link[^>]+rel=[\"']?(?:stylesheet|preconnect|icon|preload)[^>]+href={HOST}"
    r"|@import\s+url\((?:https?:)?//"
)
ABOVE = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")  # a link upwards, perhaps out of docs/


def on_pre_build(config) -> None:
    """A public name without a docstring ends the build."""
    if missing := House(read()).undocumented():
        raise PluginError("public names without a docstring:\n  " + "\n  ".join(missing))


def on_page_markdown(markdown: str, page, **_) -> str:
    """Fill the markers in. A link to a file of the repository that is no page becomes the file's name."""
    made = MARKER.sub(lambda found: MADE[found[1]](*found[2].split()), markdown)
    home = posixpath.dirname(page.file.src_uri)
    return ABOVE.sub(lambda found: _link(found, home), made)


def on_post_page(output: str, page, **_) -> str:
    """A page that would load anything from another host ends the build."""
    if found := FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output


PAGES = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}


def _link(found: re.Match, home: str) -> str:
    text, target, anchor = found[1], posixpath.normpath(posixpath.join("docs", home, found[2])), found[3] or ""
    if target.startswith("docs/"):
        return found[0]
    if target in PAGES:
        return f"[{text}]({posixpath.relpath(PAGES[target], home or '.')}{anchor})"
    if not (ROOT / target).exists():
        raise PluginError(f"a link names {target}, which is not in the repository")
    return f"{text} (`{target}`)"


def _file(name: str) -> str:
    """A Markdown file of the repository, whose links are seen from docs/."""
    text = (ROOT / name).read_text("utf-8")
    text = re.sub(r"\]\(docs/([^)]*)\)", r"](\1)", text)
    return re.sub(r"`docs/([\w/]+)\.md`", r"[\1](\1.md)", text)


def _program(name: str) -> str:
    """A program of examples/, its docstring as text before it."""
    source = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
    head, *rest = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
    body = source.split('"""', 2)[2].strip()
    text = "\n\n".join(part for part in rest if not part.startswith("    python"))
    return f'{head}\n\n{text}\n\n```python title="python examples/{name}.py"\n{body}\n```\n'


def _notebook(name: str) -> str:
    """Cells and stored outputs of a notebook of examples/, its pictures in the page."""
    parts = []
    for cell in json.loads((ROOT / "examples" / f"{name}.ipynb").read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append("```text\n" + "".join(output["text"]) + "```")
            elif picture := output.get("data", {}).get("image/png"):
                png = "".join(picture).replace("\n", "")
                parts.append(f"![what the cell above shows](data:image/png;base64,{png})")
    return "\n\n".join(parts)


def _recipe_keys() -> str:
    """A table for each dataclass of settings, from its fields and the comments beside them."""
    modules = read()
    inside = [m for m in modules.values() if m.name.startswith("palate.recipe")]
    methods = [m for m in modules.values() if m.name.startswith("palate.algorithms.")]
    parts = ["## Sections", *_tables(inside), "## Algorithms", *_tables(methods)]
    return "\n\n".join(parts)


def _tables(modules: list[Module]) -> list[str]:
    parts = []
    for module in modules:
        lines = module.source.splitlines()
        for node in module.tree.body:
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Settings")):
                continue
            fields = [
                n for n in node.body
                if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                and not ast.unparse(n.annotation).startswith("ClassVar")
            ]  # fmt: skip
            if fields:
                parts.append(f"### {node.name}\n\n{ast.get_docstring(node) or ''}")
                rows = [_row(field, lines) for field in fields]
                parts.append("| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows))
            for old, new in _old_keys(node).items():
                parts.append(f"`{old}` is the old name of `{new}`; it ends with the next release.")
    return parts


def _old_keys(settings: ast.ClassDef) -> dict[str, str]:
    for node in settings.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "old_keys" and node.value:
            return ast.literal_eval(node.value)
    return {}


def _row(field: ast.AnnAssign, lines: list[str]) -> str:
    comment = _comment(field, lines)
    default = f"`{ast.unparse(field.value)}`" if field.value else "required"
    cells = (f"`{field.target.id}`", f"`{ast.unparse(field.annotation)}`", default, comment)
    return "| " + " | ".join(cell.replace("|", "&#124;").replace("\n", " ") for cell in cells) + " |"


def _comment(field: ast.AnnAssign, lines: list[str]) -> str:
    """What is said of a field: inside its lines, else in those below that begin with "# ^", else in those above it."""
    own = "\n".join(lines[field.lineno - 1 : field.end_lineno]) + "\n"
    told = [t.string for t in tokenize.generate_tokens(StringIO(own.strip()).readline) if t.type == tokenize.COMMENT]
    if not told:
        below = itertools.takewhile(_is_comment, lines[field.end_lineno :])
        told = [line for k, line in enumerate(below) if k or line.strip().startswith("# ^")]
        told = told if told and "^" in told[0] else []
    if not told:
        above = [*itertools.takewhile(_is_comment, reversed(lines[: field.lineno - 1]))][::-1]
        told = [] if any(line.strip().startswith("# ^") for line in above) else above
    return " ".join(line.strip().removeprefix("#").strip().removeprefix("^").strip() for line in told)


def _is_comment(line: str) -> bool:
    return line.strip().startswith("#")


def _command_line() -> str:
    """What `palate COMMAND --help` says, of every command."""
    from typer.main import get_command

    from palate.cli import app

    return "\n\n".join(_commands("palate", get_command(app)))


def _commands(above: str, group) -> list[str]:
    parts = []
    for name, sub in sorted(group.commands.items()):
        if not sub.hidden:
            parts.append(f"## {above} {name}\n\n{_plain(sub.help)}")
            if rows := [_option(p) for p in sub.params if not p.hidden and p.name != "help"]:
                parts.append("| | |\n|---|---|\n" + "\n".join(rows))
            if hasattr(sub, "commands"):
                parts += _commands(f"{above} {name}", sub)
    return parts


def _option(parameter) -> str:
    names = parameter.opts + parameter.secondary_opts
    if parameter.param_type_name == "argument":
        names = [parameter.name.upper()]
    return f"| {', '.join(f'`{name}`' for name in names)} | {_plain(parameter.help).replace(chr(10), ' ')} |"


def _plain(text: str | None) -> str:
    """Help without rich's markup, and with its examples as code."""
    text = re.sub(r"\[/?[a-z ]+\]", "", (text or "").replace("\b", "")).replace("|", "&#124;")
    return re.sub(r"^ *(palate .*)$", r"    \1", text, flags=re.MULTILINE)


def _submodules(*names: str) -> str:
    """The public modules of packages, each with its public names."""
    found = [n for n in read() if any(n == name or n.startswith(f"{name}.") for name in names)]
    return "\n\n".join(f"::: {name}\n    options:\n      show_submodules: false" for name in found)


def _names() -> str:
    """The public names of the package, and where each is at home."""
    import palate

    homes = {name: palate._HOME.get(name) for name in sorted(palate.__all__)}
    return "\n".join(f"- [`palate.{n}`][{home}]" if home else f"- `palate.{n}`" for n, home in homes.items())


MADE: dict[str, Callable[..., str]] = {
    "file": _file,
    "program": _program,
    "notebook": _notebook,
    "recipe-keys": _recipe_keys,
    "command-line": _command_line,
    "modules": _submodules,
    "names": _names,
}

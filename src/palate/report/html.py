"""HTML from the templates of this folder: everything is escaped, and a page loads nothing.

A page holds its style sheet and at most one script, both its own: the content security policy names their SHA-256, so
nothing that stands in a prompt, a recipe or a log can act, and no address is ever asked.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from palate.runtime.files import write_atomically
from palate.runtime.progress import counted


def number(value: float | None) -> str:
    """Three significant digits or two decimals, with a true minus sign."""
    if value is None:
        return "–"
    size = abs(value)
    places = 0 if size >= 1000 or not size else 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 5e-4 else 5
    return f"{value:,.{places}f}".replace("-", "−")


def signed(value: float | None) -> str:
    """`number` with its sign, + included."""
    return number(value) if value is None or value <= 0 else "+" + number(value)


def direction(metric: Mapping[str, float | None]) -> int:
    """1 or -1 where the interval of a change excludes 0, else 0; also of a change that nothing could be measured of."""
    low, high = metric["change_low"], metric["change_high"]
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def escape_controls(text: Any) -> str:
    """Control characters (NUL, ANSI escapes, bidirectional overrides) as their code points, so that they cannot act."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(text))


def shorten(text: str, length: int) -> str:
    """At most `length` characters, with an ellipsis where something is cut; control characters escaped."""
    text = escape_controls(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def render(
    template: str, *, styles: tuple[str, ...] = ("style.css",), script: str | None = "page.js", **values: Any
) -> str:
    """A page as text. `styles` and `script` are files beside the templates; the page's policy admits these alone."""
    css = "\n".join(_text(name) for name in styles)
    code = _text(script) if script else ""
    return (
        environment()
        .get_template(template)
        .render(
            css=Markup(css),
            css_hash=Markup(_digest(css)),
            script=Markup(code),
            script_hash=Markup(_digest(code)) if code else None,
            **values,
        )
    )


@cache
def environment() -> Environment:
    """Jinja2 as every page uses it: escaping on, an unknown name is an error."""
    made = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize,
        loader=FunctionLoader(_text),
    )  # fmt: skip
    made.filters |= {"number": number, "signed": signed, "counted": counted, "direction": direction}
    return made


def write_page(path: Path, text: str) -> Path:
    """Write the whole file or nothing; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    return path


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted (key, value) pairs."""
    if isinstance(value, dict):
        return [
            pair for key, item in value.items() for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def _text(name: str) -> str:
    return (files("palate.report") / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else escape_controls(value) if isinstance(value, str) else value

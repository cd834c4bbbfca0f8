"""One value of a recipe's text changed, with all that stands around it kept: its comments, its order, its other keys.

For recipes as they are published: sections at the margin, keys indented by two, each value on its own line.
"""

from __future__ import annotations

import json
from typing import Any

from palate.runtime.errors import InputError


def with_value(text: str, key: str, value: Any) -> str:
    """The text with `section.key` set to a JSON value; a key that is not there comes last in its section, a section
    that is not there last of all. A comment behind the old value goes with it. None: the key is taken out.

    A value that goes on over several lines, as a mapping below its key, is replaced whole.
    """
    section, _, name = key.partition(".")
    if not name or "." in name:
        raise InputError(f"{key}: expected section.key")
    lines = text.rstrip("\n").split("\n")
    begin = next((i for i, line in enumerate(lines) if line.split("#")[0].rstrip() == f"{section}:"), None)
    if begin is None:
        return text if value is None else "\n".join([*lines, f"{section}:", f"  {name}: {_written(value)}"]) + "\n"
    end = next((i for i in range(begin + 1, len(lines)) if not lines[i].startswith((" ", "#"))), len(lines))
    first = next((i for i in range(begin + 1, end) if lines[i].startswith(f"  {name}:")), None)
    new = [] if value is None else [f"  {name}: {_written(value)}"]
    if first is None:
        return "\n".join([*lines[:end], *new, *lines[end:]]) + "\n"
    last = next((i for i in range(first + 1, end) if not lines[i].startswith("   ")), end)
    if value is None and end - begin - 1 == last - first:  # nothing else in the section
        return "\n".join([*lines[:begin], *lines[end:]]) + "\n"
    return "\n".join([*lines[:first], *new, *lines[last:]]) + "\n"


def with_values(text: str, values: dict[str, Any]) -> str:
    """`with_value` for each of several keys."""
    for key, value in values.items():
        text = with_value(text, key, value)
    return text


def without_head(text: str) -> str:
    """The text without the comment lines that it begins with."""
    lines = text.split("\n")
    return "\n".join(lines[next(i for i, line in enumerate(lines) if not line.startswith("#")) :])


def _written(value: Any) -> str:
    """A value as YAML of one line: JSON, which YAML reads, with plain words left bare."""
    words = ("true", "false", "null", "yes", "no", "on", "off")
    if (
        isinstance(value, str)
        and value[:1].isalpha()
        and value.replace("-", "").isalnum()
        and value.lower() not in words
    ):
        return value
    return json.dumps(value, ensure_ascii=False)

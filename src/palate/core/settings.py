"""The check that every algorithm's settings go through, with one wording for all of them."""

from __future__ import annotations

import re
from typing import Any

from palate.runtime.errors import InputError


def require(settings: Any, *rules: tuple[str, bool], name: str | None = None) -> None:
    """InputError of the first broken rule. A rule is ("field, other: what they have to be", whether it is broken).

    The message has the fields' values; `name` is what is at fault, the class of the settings if left out.
    """
    for rule, broken in rules:
        if broken:
            fields = re.split(", | and ", rule.split(":")[0])
            got = ", ".join(f"{field} = {vars(settings)[field]!r}" for field in fields if field in vars(settings))
            raise InputError(f"{name or type(settings).__name__} expected {rule}" + (f"; got {got}" if got else ""))

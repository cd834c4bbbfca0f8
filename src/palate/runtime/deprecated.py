"""Names that have changed keep working for one release, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any


def old_names(module: str, renamed: Mapping[str, Any]) -> Callable[[str], Any]:
    """A module's `__getattr__` that hands out objects under their old names; `renamed` holds old name -> object."""

    def __getattr__(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        now = renamed[name]
        warnings.warn(
            f"{module}.{name} is now {now.__module__}.{now.__name__}; the old name ends with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return now

    return __getattr__

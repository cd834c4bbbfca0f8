"""Packages that are functions too: `palate.report` holds the parts of reports, and `palate.report(run)` writes one."""

from __future__ import annotations

import sys
import types
from typing import Any

from palate.runtime.code import imported


def callable_as(package: str, module: str, function: str) -> None:
    """From now on, calling the package `package` calls `function` of `module`, which is imported at the first call.

    The function may be of a layer above the package; nothing of it is loaded before.
    """

    class Callable(types.ModuleType):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return imported(module, function)(*arguments, **options)

    sys.modules[package].__class__ = Callable

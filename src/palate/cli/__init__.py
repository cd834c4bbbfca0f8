"""The `palate` command. `app` holds what all commands share, `options` the options that several have.

A command is declared in `commands`: its options, its help, and the checks that need no library. What it does stands in
a module of this folder (`train`, `evaluate`, `export`, ...; `fit_taste` for `palate taste`, `requirements` for `palate
doctor RECIPE`), which imports what it likes at its top and is itself imported inside the command's function. A new
command takes both, unless what it does is a call of the library.
"""

from palate.cli.app import MAX_LINES, app, exit_code_of, main
from palate.cli.commands import check, look, share, taste, train

__all__ = ["MAX_LINES", "app", "check", "exit_code_of", "look", "main", "share", "taste", "train"]

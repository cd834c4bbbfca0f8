"""The `palate` command. `app` holds what all commands share, `options` the options that several have.

A command is declared in `commands`: its options, its help, and the checks that need no library. What it does stands in
the module of this folder with the command's name (`train`, `evaluate`, `export`, ...), which imports what it likes at
its top and is itself the one import inside the command's function. A new command takes both.
"""

from palate.cli.app import MAX_LINES, app, exit_code_of, main
from palate.cli.commands import check, look, share, taste, train

__all__ = ["MAX_LINES", "app", "check", "exit_code_of", "look", "main", "share", "taste", "train"]

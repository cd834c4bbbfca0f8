"""The `palate` command. `app` holds what all commands share, `options` the options that several have.

A command is declared in `training`, `judging`, `keeping`, `other` or `taste`: its options, its help, and the checks
that need no library, so that --help and a mistake in the options answer at once. What it does stands in a module of
its own (`drawing` of sample, `measuring` of evaluate, ...), which imports what it likes at its top and is itself the
one import inside the command's function. A new command takes both: a declaration, and a module where it is heavy.
"""

from palate.cli import judging, keeping, other, taste, training
from palate.cli.app import MAX_LINES, app, exit_code_of, main

__all__ = ["MAX_LINES", "app", "exit_code_of", "judging", "keeping", "main", "other", "taste", "training"]

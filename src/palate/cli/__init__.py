"""The `palate` command. `app` holds what all commands share, the other files the commands by what they are for.

Everything heavy is imported inside the commands, so that --help answers at once.
"""

from palate.cli import judging, keeping, other, taste, training
from palate.cli.app import MAX_LINES, app, exit_code_of, main

__all__ = ["MAX_LINES", "app", "exit_code_of", "judging", "keeping", "main", "other", "taste", "training"]

"""A command as one of its run's ranks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer

from palate.recipe import Recipe
from palate.runtime.distributed import process_group
from palate.runtime.launch import launch

OnMain = Callable[[Callable[[], Any]], Any]


@contextlib.contextmanager
def ranks(nproc: int, recipe: Recipe) -> Iterator[OnMain]:
    """Inside, this process is one of its run's ranks; gives what lets rank 0 alone act. Launches them if need be."""
    if "RANK" in os.environ:  # started by torchrun, by srun or by the lines below
        with process_group(timeout_seconds=recipe.run.rank_timeout_seconds) as group:
            yield group.on_main
    elif nproc > 1:
        raise typer.Exit(launch([sys.executable, "-m", "palate", *sys.argv[1:]], nproc))
    else:
        yield lambda act: act()

"""The libraries' own bars while weights are read from the disk: a second of reading needs none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from diffusers.utils import logging as of_diffusers
from transformers.utils import logging as of_transformers


@contextlib.contextmanager
def quietly(source: str | Path) -> Iterator[None]:
    """Inside, diffusers and transformers show no bars for what they read from a folder; a download keeps its own."""
    loud = [each for each in (of_diffusers, of_transformers) if each.is_progress_bar_enabled()]
    if not Path(source).expanduser().is_dir():
        loud = []
    for each in loud:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in loud:
            each.enable_progress_bar()

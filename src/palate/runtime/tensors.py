"""Tensors on a disk: what safetensors says of it in words is an error of the disk, as any other file's."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_NUMBER = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def writing_tensors(path: Path) -> Iterator[None]:
    """Inside, a full disk or a place that may not be written to is an OSError that names the path."""
    try:
        yield
    except SafetensorError as error:
        found = _NUMBER.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error

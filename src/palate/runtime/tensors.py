"""Tensors on a disk: what safetensors says of it in words is an error of the disk, as any other file's."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_NUMBER = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def writing_tensors(path: Path) -> Iterator[None]:
    """Inside, a full disk or a place that may not be written to is an OSError that names the path. Afterwards the file
    at the path, or the tensors in that folder, may be read by whom the umask lets: safetensors makes them the writer's
    alone."""
    try:
        yield
        for file in path.glob("*.safetensors") if path.is_dir() else [path]:
            as_umask_says(file)
    except SafetensorError as error:
        found = _NUMBER.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def as_umask_says(file: Path) -> None:
    """Give the file the permissions of any new file beside it."""
    plain = file.with_name(f".tmp-{secrets.token_hex(4)}-mode")
    with contextlib.suppress(OSError):  # a mount without permissions
        plain.touch()
        shutil.copymode(plain, file)
    with contextlib.suppress(OSError):
        plain.unlink(missing_ok=True)

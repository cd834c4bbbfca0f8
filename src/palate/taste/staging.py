"""Pictures that come into a store together with what names them: all of it, or nothing.

Until then they lie in a folder of their own among the store's pictures. Where a process was killed meanwhile, that
folder stays, which nobody reads, and the next who brings pictures takes it away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from palate.runtime.exclusive import exclusive, held_elsewhere
from palate.taste.votes import VoteStore, cannot_write

PREFIX = ".tmp-import-"
T = TypeVar("T")


@contextlib.contextmanager
def staging(store: VoteStore) -> Iterator[VoteStore]:
    """A store for pictures that are to come into `store`; it is gone at the end, whatever happened, and so are the
    folders of `store` that were made for it and hold nothing. CheckpointError: the disk is full, or not ours."""
    missing = [folder for folder in (store.pictures, *store.pictures.parents) if not folder.exists()]
    try:
        try:
            store.pictures.mkdir(parents=True, exist_ok=True)
            with exclusive(store.folder):  # nobody takes the new folder for one that was left behind
                _sweep(store.pictures)
                folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=store.pictures))
                held = contextlib.ExitStack()
                held.enter_context(exclusive(folder))
        except OSError as error:
            raise cannot_write(store.folder, error) from error
        with held:
            try:
                yield VoteStore(folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        for made in missing:
            with contextlib.suppress(OSError):  # it holds something now
                made.rmdir()


def bring_in(staged: VoteStore, store: VoteStore, record: Callable[[], T]) -> T:
    """Move the pictures of `staged` into `store` and call `record`, which writes down what names them; its answer.

    Where one of the two fails, the pictures that the store did not hold before are taken away again; `record` must
    leave nothing of its own then. Nobody else keeps a picture or a vote meanwhile.
    """
    came: list[Path] = []
    with exclusive(store.folder):
        try:
            for picture in staged.pictures.iterdir() if staged.pictures.is_dir() else ():
                target = store.pictures / picture.name
                if not target.is_file():
                    os.replace(picture, target)
                    came.append(target)
            return record()
        except BaseException as error:
            for target in came:
                target.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise cannot_write(store.folder, error) from error
            raise


def _sweep(pictures: Path) -> None:
    """Take away what a killed process left."""
    for left in pictures.glob(f"{PREFIX}*"):
        if not held_elsewhere(left):
            shutil.rmtree(left, ignore_errors=True)

"""One writer at a time: what is read from a folder and written back loses nobody's change, of threads and processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from palate.runtime.errors import InputError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)  # of some network disks

_threads: dict[str, threading.RLock] = {}
_held: set[str] = set()  # folders that a thread of this process holds


@contextlib.contextmanager
def alone(file: Path, refusal: str) -> Iterator[None]:
    """Inside, nobody else is inside for the same file, which is there and is only locked. InputError with the sentence
    `refusal`: somebody is. For work that takes long; on a disk without locks nobody is kept out."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(refusal) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Inside, nobody else is inside for the same folder: no other thread, no other process. Nests within a thread.

    The folder itself is locked (flock), so no file is left behind, and the kernel gives the lock back when a process
    ends, however it ends. On a disk without locks the threads of this process still wait for each other.
    FileNotFoundError: there is no such folder.
    """
    key = os.path.realpath(folder)
    with _threads.setdefault(key, threading.RLock()):
        if key in _held:
            yield
            return
        descriptor = os.open(key, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            _held.add(key)
            yield
        finally:
            _held.discard(key)
            os.close(descriptor)


def held_elsewhere(folder: Path) -> bool:
    """Whether somebody is inside `exclusive(folder)`, another thread or another process; also where nobody can know,
    because the disk has no locks or the folder went away."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False

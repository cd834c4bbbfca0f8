"""One owner per run folder: who trains it now, and whether an earlier owner ended in order.

The owner holds an flock on FOLDER/.owner, which the kernel releases when the process ends, however it ends; the file
says who it is. On another machine (a shared disk) such a lock may not be seen, so what the file says is believed there:
an owner elsewhere is alive until somebody deletes the file.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import parse_json, write_problem

OWNER = ".owner"
PATIENCE_SECONDS = 1.0  # a command that only looks holds the lock for an instant
State = Literal["new", "running", "stopped", "died", "finished"]


class Owner(NamedTuple):
    """The process that trains a run."""

    host: str
    pid: int
    started: str  # of the process: what /proc says, "" where there is none
    since: str  # when it took the run, local time, ISO 8601

    def text(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class RunStatus(NamedTuple):
    """What is known of a run folder. `owner` is of a run that is running or died."""

    state: State
    owner: Owner | None


_held: dict[Path, tuple[int, int]] = {}  # folder -> (open file, how many times this process has taken it)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Inside, this process owns the run folder, which is made if need be. Nests within one process.

    A SIGTERM or SIGHUP that nothing else answers, as while a model loads, leaves the block as an exit does: the folder
    is given up, which on another machine nobody could tell. InputError: another process owns it.
    """
    with _leaving_in_order():
        yield from _holding(folder)


def let_go() -> None:
    """Give up every folder: for a process that ends at this moment."""
    with contextlib.suppress(RuntimeError):  # another thread takes or gives up a folder at this moment
        for descriptor, _ in _held.values():
            with contextlib.suppress(OSError):
                os.truncate(descriptor, 0)


@contextlib.contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Inside, signals that would end the process at once raise SystemExit; outside of the main thread nothing does."""
    here = threading.current_thread() is threading.main_thread()
    answered = [n for n in (signal.SIGTERM, signal.SIGHUP) if here and signal.getsignal(n) is signal.SIG_DFL]
    try:
        for number in answered:
            signal.signal(number, _leave)
        yield
    finally:
        for number in answered:
            if signal.getsignal(number) is _leave:
                signal.signal(number, signal.SIG_DFL)


def _leave(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise SystemExit(128 + number)


def _holding(folder: Path) -> Iterator[None]:
    key = Path(os.path.abspath(folder))
    if key in _held:
        descriptor, count = _held[key]
        _held[key] = descriptor, count + 1
    else:
        _held[key] = _take(folder), 1
    try:
        yield
    finally:
        descriptor, count = _held.pop(key)
        if count > 1:
            _held[key] = descriptor, count - 1
        else:
            with contextlib.suppress(OSError):
                os.truncate(descriptor, 0)  # ended in order: there is no owner any more
                _remove_if_empty(folder)
            os.close(descriptor)


def status(folder: Path) -> RunStatus:
    """Whether a run is running, was stopped, died or has finished; "new" where there is no run."""
    owner, free = _look(folder / OWNER)
    if owner and not (free and _gone(owner)):
        return RunStatus("running", owner)
    if owner:
        return RunStatus("died", owner)
    finished, begun = _newest_state(folder)
    return RunStatus("finished" if finished else "stopped" if begun else "new", None)


def require_free(folder: Path, what: str) -> None:
    """InputError if another process trains the run in `folder`; `what` is what cannot be done meanwhile."""
    if os.path.abspath(folder) in map(str, _held):
        return
    found = status(folder)
    if found.state == "running" and found.owner:
        raise InputError(_refusal(folder, found.owner, what))


def _remove_if_empty(folder: Path) -> None:
    """A start that failed leaves nothing behind: no folder with nothing but the owner's file in it."""
    checkpoints = folder / "checkpoints"
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()
    if os.listdir(folder) == [OWNER]:
        (folder / OWNER).unlink()
        folder.rmdir()


def _take(folder: Path) -> int:
    path = folder / OWNER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise CheckpointError(write_problem(path if path.exists() else folder, 0, error)) from error
    try:
        locked = _lock(descriptor)
        if locked and not os.fstat(descriptor).st_nlink:  # its last owner left nothing behind, this file included
            os.close(descriptor)
            return _take(folder)
        owner = _read(path)
        if owner and (not locked or not _gone(owner)):
            raise InputError(_refusal(folder, owner, "it cannot be trained twice at once"))
        if not locked:
            raise InputError(f"{folder} is being taken by another process; try again")
        me = Owner(socket.gethostname(), os.getpid(), _started(os.getpid()), _now())
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me._asdict()).encode(), 0)
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int) -> bool:
    """Take the lock, waiting a moment for commands that only look. Where there are no locks, the file must do."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return True
            if time.monotonic() > deadline:
                return False
        time.sleep(0.02)


def _look(path: Path) -> tuple[Owner | None, bool]:
    """(who the file names, whether nobody holds its lock)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None, True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            free = True
        except OSError as error:
            free = error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
        return _read(path), free
    finally:
        os.close(descriptor)


def _read(path: Path) -> Owner | None:
    try:
        found = parse_json(path.read_bytes())
        return Owner(str(found["host"]), int(found["pid"]), str(found["started"]), str(found["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # empty (ended in order), or cut short by a crash while it was written


def _gone(owner: Owner) -> bool:
    """Whether an owner whose lock is free has ended: certain on this machine, unknown of any other."""
    if owner.host != socket.gethostname():
        return False
    if owner.pid == os.getpid():
        return True
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _started(owner.pid) != owner.started  # the number was given to another process since


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _refusal(folder: Path, owner: Owner, what: str) -> str:
    if owner.host != socket.gethostname():
        return (
            f"{folder} is being trained by {owner.text()}: {what}. Stop it there, or choose another folder; if that "
            f"machine no longer runs it, delete {folder / OWNER}"
        )
    return (
        f"{folder} is being trained by {owner.text()}: {what}. Wait for it, stop it with `kill {owner.pid}`, or choose "
        "another folder"
    )


def _newest_state(folder: Path) -> tuple[bool, bool]:
    """(whether the newest checkpoint is of a finished run, whether there is anything of a run)."""
    found = (folder / "checkpoints").glob("step-*/state.json")
    steps = sorted(found, key=lambda path: (len(path.parent.name), path))  # step-1000000 comes after step-999999
    if not steps:
        return False, (folder / "metrics.jsonl").exists()
    try:
        return bool(parse_json(steps[-1].read_bytes())["finished"]), True
    except (OSError, ValueError, KeyError, TypeError):
        return False, True


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")

r"""Files that are whole or absent: atomic writes, folders swapped in, JSON lines, digests.

A reader, or a crash, sees the old content or the new one, never a part. Lines end at \n, \r\n or \r, nowhere else:
str.splitlines also cuts at U+2028, U+0085 and form feeds, which may stand inside a prompt.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palate.runtime.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk without room, a quota that is used up
_REMEDIES = {
    errno.EACCES: "Its owner or its permissions forbid it: change them, or set run.folder to a place of your own",
    errno.EPERM: "Its owner or its permissions forbid it: change them, or set run.folder to a place of your own",
    errno.EROFS: "The disk is mounted read-only: set run.folder to another disk",
    errno.EEXIST: "A file of that name is in the way: move it, or set run.folder to another place",
    errno.ENOTDIR: "A file stands where a folder is needed: move it, or set run.folder to another place",
    errno.ENOENT: "The folder was moved or deleted meanwhile: put it back, or set run.folder to another place",
    errno.ENAMETOOLONG: "The name is too long for this disk: set run.folder to a shorter one",
    errno.ELOOP: "It is a link, which is not followed here: put a file in its place, or delete it",
    errno.EIO: "The disk reports an error: look at its health before you trust it again",
}
_OF_PATHS = {  # of any file that is read or written
    errno.EACCES: "Its owner or its permissions forbid it: change them, or name another place",
    errno.EPERM: "Its owner or its permissions forbid it: change them, or name another place",
    errno.EROFS: "The disk is mounted read-only: name another place",
    errno.EEXIST: "A file of that name is in the way: move it, or name another place",
    errno.ENOTDIR: "A file stands where a folder is needed: move it, or name another place",
    errno.ENOENT: "It, or the folder that it is to lie in, is not there: look at its name, or make the folder",
    errno.EISDIR: "A folder stands where a file is needed: name a file",
    errno.ENAMETOOLONG: "The name is too long for this disk: name a shorter one",
}
_LITTER = ("thumbs.db", "desktop.ini")  # and what begins with a dot: what file managers leave in a folder
_LINE_END = re.compile(r"\r\n|\r|\n")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk inside that names no file, as that of a full one, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write the file; OSError names it."""
    with naming(path):
        path.write_bytes(data)


def append(path: Path, data: bytes, *, durably: bool = False) -> None:
    """Append all of the data, or nothing where the disk has no room for it; OSError names the file, also where it is a
    link: in a folder that came from somebody else, it may lead anywhere.

    durably: wait until the disk has it."""
    with naming(path), open(path, "ab", buffering=0, opener=_not_through_a_link) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durably:
            os.fsync(file.fileno())


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_durably(path: Path, data: bytes) -> None:
    """Write the file and wait until the disk has it; OSError names it."""
    with naming(path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`: a reader, or a crash, sees the old content or the new, never a part. Of two
    writers at once the last one's content stays, whole. InputError: a folder is there, which stays."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, where a file is to be written; name a file in it")
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # and not the temporary one, which nobody has named
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has the file, or the names in the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename a file or a folder; a folder at `target` is deleted first."""
    if target.is_dir():
        remove_folder(target)
    os.replace(source, target)


def remove_folder(folder: Path) -> None:
    """Delete a folder with all that is in it. OSError names the folder, or a path in it: what deletes below an open
    folder names the last part alone."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if not (isinstance(error.filename, str) and os.path.isabs(error.filename)):
            error.filename = str(folder)
        raise


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` when the block ends well."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace(temporary, target)
    except OSError as error:
        if isinstance(error.filename, str) and error.filename.startswith(str(temporary)):
            error.filename = str(target) + error.filename[len(str(temporary)) :]  # nobody has named the temporary one
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def split_lines(text: str) -> list[str]:
    """The lines of a text, without their ends; a last line end opens no empty line."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def json_line(row: Any) -> bytes:
    """One line of a JSON lines file, in ASCII, with its end."""
    return json.dumps(row).encode() + b"\n"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError: it is none, nests deeper than Python reads, or has half of a character as
    an escape, which can be written into no file."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    escapes: Any = (b"\\ud", b"\\uD") if isinstance(text, bytes) else ("\\ud", "\\uD")
    if any(escape in text for escape in escapes):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"it has half of a character, \\u{ord(error.object[error.start]):x}") from error
    return value


def read_json_lines(path: Path, *, cut_short: bool = False) -> list[tuple[int, Any]]:
    """(line number, value) of each line that is not empty. InputError: a line that is not JSON.

    cut_short: a last line that a crash cut does not count, and is no error.
    """
    try:
        lines = split_lines(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((number, parse_json(line)))
        except ValueError as error:
            if cut_short and number == len(lines):
                break
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def in_shell(path: Path | str) -> str:
    """The path as it stands in a command to copy: one with spaces in quotes."""
    return shlex.quote(str(path))


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: keys sorted, no spaces. ValueError: NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_files(folder: Path) -> list[Path]:
    """The files in a folder, sorted, without what file managers leave there; those in folders inside it left out."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not is_litter(path.name))


def is_litter(name: str) -> bool:
    """Whether a file of that name is hidden, or one that a file manager keeps for itself."""
    return name.startswith(".") or name.lower() in _LITTER


def folder_size(folder: Path) -> int:
    """Bytes of the files below a folder; what goes away meanwhile, or cannot be looked at, counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def json_digest(value: Any) -> str:
    """SHA-256 of a value's JSON text with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_remedy(error: OSError) -> str:
    """The error's text, and what to do about a full disk, or a path that cannot be used, wherever it was met."""
    if not isinstance(error.filename, (str, bytes)):
        full = "a disk is full: free some space, or name another place; what was saved before is intact"
        return full if error.errno in FULL else str(error)
    path = Path(os.fsdecode(error.filename))
    if error.errno in FULL:
        return write_problem(path, 0, error)
    remedy = _OF_PATHS.get(error.errno or 0)
    return f"{path}: {error.strerror}. {remedy}" if remedy else str(error)


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if os.path.exists(place))


def write_problem(folder: Path, need: int, error: Exception) -> str:
    """The message for a write under `folder` that failed: what was wrong, and the remedy for that."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    code = error.errno if isinstance(error, OSError) else None
    if code in (*FULL, None):
        needs = f"need about {need / 2**20:.1f} MiB, " if need else ""
        return (
            f"cannot write {folder}: {reason} ({needs}free {free / 2**20:.1f} MiB). "
            "Free some space or set run.folder to another disk; what was saved before is intact"
        )
    return f"cannot write {folder}: {reason}. {_REMEDIES.get(code, 'Set run.folder to another place')}"

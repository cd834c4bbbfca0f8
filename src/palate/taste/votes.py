"""Votes on disk: one JSON line per choice, only ever added to, each line durable before the next pair is shown.

A line is a vote (`Vote.to_json`) or takes one back: {"undo": id}. Pictures lie beside the file in pictures/, named by
the SHA-256 of their bytes, so that a vote keeps its meaning when the model that drew them is gone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.exclusive import exclusive
from palate.runtime.files import parse_json, write_durably
from palate.taste.encoded import picture_ending

CHOICES = ("left", "right", "tie", "both-bad")
OUTCOMES = {"left": 1.0, "right": 0.0, "tie": 0.5, "both-bad": 0.5}  # y of the learner
FILE = "votes.jsonl"
PICTURES = "pictures"
LINE_LIMIT = 64 * 1024  # bytes of a line
TEXTS = ("prompt", "id", "session", "rater", "repeat_of", "file", "model", "run")  # other values are numbers
IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EROFS)  # a file, or whom the folder belongs to
_NAME = re.compile(r"[0-9a-f]{64}\.(png|jpg|webp|bmp)")


@dataclass(frozen=True)
class Picture:
    """A stored picture, and how it was drawn where that is known. `prompt` is what the model was given, which may say
    more than the vote's prompt does."""

    file: str  # in the store's pictures folder, SHA-256 of its bytes and an ending
    prompt: str = ""
    model: str = ""  # fingerprint of the weights that drew it
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None
    run: str = ""
    step: int | None = None  # of the run


@dataclass(frozen=True)
class Vote:
    """One choice between two pictures of one prompt. `left` and `right` are where they were shown."""

    prompt: str
    left: Picture
    right: Picture
    choice: str  # one of CHOICES
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    ms: int | None = None  # response time
    session: str = ""
    rater: str = ""
    round: int = 1
    repeat_of: str | None = None  # the vote whose pictures these are, sides exchanged

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise InputError(f"choice: expected one of {', '.join(CHOICES)}, got {self.choice!r}")

    @property
    def outcome(self) -> float:
        """1 the left picture, 0 the right one, 1/2 neither."""
        return OUTCOMES[self.choice]

    def to_json(self) -> dict[str, Any]:
        tree = {key: value for key, value in asdict(self).items() if value is not None and value != ""}
        tree["prompt"] = self.prompt
        for side in ("left", "right"):
            tree[side] = {key: value for key, value in tree[side].items() if value is not None and value != ""}
        return tree


class VoteStore:
    """The votes of a folder, or of a .jsonl file. Reading passes over a last line that was cut short."""

    def __init__(self, path: str | Path):
        path = Path(path)
        self.file = path if path.suffix == ".jsonl" else path / FILE
        self.folder = self.file.parent
        self.pictures = self.folder / PICTURES

    def read(self) -> list[Vote]:
        """The votes in force, in order. InputError names the file and line of a row that is not a vote."""
        votes: dict[str, Vote] = {}
        for number, row in _rows(self.file):
            if "undo" in row:
                votes.pop(str(row["undo"]), None)
                continue
            vote = vote_of(row, f"{self.file} line {number}")
            votes[vote.id] = vote
        return list(votes.values())

    def append(self, vote: Vote) -> Vote:
        self._add([vote.to_json()])
        return vote

    def extend(self, votes: Iterable[Vote]) -> int:
        """Append the votes whose ids are new, each once, all or none; how many."""
        known = {vote.id for vote in self.read()} if self.file.exists() else set()
        new = {vote.id: vote for vote in votes if vote.id not in known}
        if new:
            self._add([vote.to_json() for vote in new.values()])
        return len(new)

    def undo(self) -> Vote | None:
        """Take back the newest vote in force, and return it."""
        if not self.file.exists():
            return None
        with exclusive(self.folder):  # two who undo at once take back two votes
            votes = self.read()
            if not votes:
                return None
            self._add([{"undo": votes[-1].id}])
            return votes[-1]

    def keep(self, content: bytes) -> str:
        """Store an encoded picture; the name of its file. InputError if it is not a picture, or too large."""
        ending = picture_ending(content)
        name = f"{hashlib.sha256(content).hexdigest()}.{ending}"
        target = self.pictures / name
        temporary = target.with_name(f".tmp-{secrets.token_hex(4)}-{name}")
        try:
            self.pictures.mkdir(parents=True, exist_ok=True)
            with exclusive(self.folder):  # under which `staging.bring_in` takes away what failed to come in
                if not target.is_file() or target.stat().st_size != len(content):  # a power cut may have emptied it
                    write_durably(temporary, content)
                    os.replace(temporary, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise cannot_write(self.folder, error) from error
        return name

    def path_of(self, picture: Picture) -> Path:
        """Where the picture lies. InputError when it is gone."""
        path = self.pictures / picture.file
        if not path.is_file():
            raise InputError(
                f"the picture {picture.file[:16]}... of a vote is gone from {self.pictures}; "
                "copy it back, or take the vote out of the file"
            )
        return path

    def with_pictures(self) -> tuple[list[Vote], int]:
        """The votes whose two pictures are there, and how many are left out because one is gone."""
        votes = self.read()
        there = [v for v in votes if all((self.pictures / p.file).is_file() for p in (v.left, v.right))]
        return there, len(votes) - len(there)

    def _add(self, rows: list[dict[str, Any]]) -> None:
        """Write the rows, all or none. InputError: one is longer than what `read` takes for a vote, or has a text of
        bytes that are none."""
        try:
            each = [json.dumps(row, sort_keys=True, ensure_ascii=False).encode() for row in rows]
        except UnicodeEncodeError as error:  # of a command line in another encoding
            raise InputError(
                f"a text of a vote is not UTF-8: {error.object[max(0, error.start - 40) :][:60]!r}"
            ) from error
        if len(longest := max(each, key=len)) > LINE_LIMIT:
            raise InputError(
                f"a vote takes {len(longest) >> 10} KiB, at most {LINE_LIMIT >> 10} are allowed; shorten its texts: "
                f"{longest.decode()[:80]}..."
            )
        lines = b"".join(line + b"\n" for line in each)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(self.folder), open(self.file, "ab+", buffering=0) as out:
                size = out.seek(0, os.SEEK_END)
                if size:  # a line cut short by a crash must not swallow the next one
                    out.seek(size - 1)
                    if out.read(1) != b"\n":
                        lines = b"\n" + lines
                try:
                    if out.write(lines) < len(lines):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(out.fileno())
                except BaseException:
                    os.ftruncate(out.fileno(), size)
                    if not size:
                        self.file.unlink()
                    raise
        except OSError as error:
            raise cannot_write(self.file, error) from error


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """The error for a store that cannot be written to, with the remedy."""
    full = "; free some space: nothing that was stored before is lost" if error.errno == errno.ENOSPC else ""
    remedy = "; name another folder" if error.errno in IN_THE_WAY else full
    return CheckpointError(f"cannot write {path}: {error.strerror or error}{remedy}")


def choice_of(said: Any) -> str:
    """One of CHOICES, as a list of another program may spell it ("Left", "both_bad", "neither"). InputError: none."""
    text = "-".join(str(said).lower().replace("_", " ").split()).replace("neither", "both-bad")
    if text not in CHOICES:
        raise InputError(f"choice: expected one of {', '.join(CHOICES)}, got {str(said)[:40]!r}")
    return text


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; make votes in palate studio, or bring some with palate votes import"
                         ) from error  # fmt: skip
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; give a folder with {FILE} in it, or such a file"
        ) from error
    whole = content.endswith(b"\n")
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip(b" \t\r\0"):  # a power cut may leave zeros at the end of a file
            continue
        try:
            if len(line) > LINE_LIMIT:
                raise ValueError("longer than a vote")
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("not a mapping")
        except ValueError as error:
            if (number == len(lines) and not whole) or _cut(lines, number):
                continue  # the process ended while it wrote this line
            raise InputError(f"{path} line {number}: not a vote ({str(error)[:60]}); take the line out") from error
        yield number, row


def _cut(lines: list[bytes], number: int) -> bool:
    """Whether this is the start of a vote that a crash cut, after which a later start wrote on."""
    line = lines[number - 1]
    open_still = line.count(b"{") > line.count(b"}")  # cut after the brace of a picture, it ends as a vote does
    return line.startswith(b"{") and (open_still or not line.rstrip().endswith(b"}")) and number < len(lines)


def vote_of(row: dict[str, Any], where: str) -> Vote:
    """The vote that a row of JSON holds. InputError: it is none; `where` tells the user which row."""
    try:
        left, right = _picture(row["left"]), _picture(row["right"])
        rest = _known(row, ("id", "ms", "session", "rater", "round", "repeat_of"))
        vote = Vote(prompt=_known(row, ("prompt",))["prompt"], left=left, right=right, choice=row["choice"], **rest)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{where}: expected a vote with prompt, left, right and choice; it lacks {str(error)[:60]}"
        ) from error
    return vote


def _picture(row: Any) -> Picture:
    if not isinstance(row, dict) or not isinstance(row.get("file"), str) or not _NAME.fullmatch(row["file"]):
        raise InputError("a picture needs a file named by its SHA-256, as written by palate; use palate votes import")
    return Picture(**_known(row, tuple(Picture.__dataclass_fields__)))


def _known(row: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """What the row says of the keys; null says nothing. InputError: a value of another kind than the key takes."""
    known = {key: row[key] for key in keys if row.get(key) is not None}
    for key, value in known.items():
        text, number = isinstance(value, str), isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (text if key in TEXTS else number):
            raise InputError(f"{key} must be {'text' if key in TEXTS else 'a number'}, got {str(value)[:40]!r}")
    return known

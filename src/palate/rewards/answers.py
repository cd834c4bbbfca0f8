"""What a judge has answered, kept in a file of JSON lines, so that nothing is asked twice.

A row per answer, {"image": SHA-256 of the pixels, "question": what was asked, "judge": the model's name, "text",
"places"}, written as it arrives and in one call: a process that is killed loses at most the answers on their way.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from palate.rewards.chat import Reply
from palate.runtime.errors import InputError
from palate.runtime.files import append, json_line, read_json_lines

Key = tuple[str, str, str]  # image, question, judge
KEPT = 8  # places of the answer whose tokens are kept and scored


def as_kept(reply: Reply) -> Reply:
    """What of a reply is kept: a fresh answer and one that is read back have the same score."""
    places = (tuple((token, float(f"{chance:.6g}")) for token, chance in place) for place in reply.places[:KEPT])
    return Reply(reply.text, tuple(places))


class Answers:
    """The answers in `path`, which need not exist; those in the files `also` are read and never written."""

    def __init__(self, path: Path, also: Sequence[Path] = ()):
        self.path = path
        self._found: dict[Key, Reply] = {}
        self._lock = threading.Lock()
        for file in (*also, path):
            if file.is_file():
                self._read(file)
        if path.is_file():
            _cut_unfinished_line(path)

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: Key) -> Reply | None:
        """The kept reply, None where there is none."""
        return self._found.get(key)

    def add(self, key: Key, reply: Reply) -> None:
        """Keep a reply, here and in the file. Threads may call it at once."""
        image, question, judge = key
        row = {"image": image, "question": question, "judge": judge, "text": reply.text, "places": reply.places}
        with self._lock:
            self._found[key] = reply
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append(self.path, json_line(row))

    def _read(self, file: Path) -> None:
        for number, row in read_json_lines(file, cut_short=True):
            try:
                places = tuple(tuple((str(token), float(chance)) for token, chance in place) for place in row["places"])
                if not all(place and all(0 <= chance <= 1 for _, chance in place) for place in places):
                    raise ValueError("a place without tokens, or a probability that is none")
                self._found[row["image"], row["question"], row["judge"]] = Reply(str(row["text"]), places)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{file}, line {number}: not an answer of a judge ({json.dumps(row)[:60]}); delete the line, or "
                    "the file to ask again"
                ) from error


def _cut_unfinished_line(path: Path) -> None:
    """Take away the part of a row that a crash left at the end, so that the next row begins a line of its own."""
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        file.seek(max(0, end - (1 << 20)))
        tail = file.read()
        if not tail.endswith(b"\n"):
            file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)

"""metrics.jsonl, the log of a run and the source of truth of its reports: append, read, cut back.

Each row is an object with a whole number as "step" and an "event". Fields that end in _seconds are times; all others
are a function of the recipe.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import json_line, parse_json, read_json_lines, write_atomically, write_problem

METRICS, STEERING = "metrics.jsonl", "steering.json"


class RunLog:
    """A context manager that appends rows to the metrics.jsonl of `folder`; a rank that writes nothing says so."""

    def __init__(self, folder: Path, *, writes: bool = True):
        self.folder = folder
        self._path = folder / METRICS if writes else Path(os.devnull)
        self._file: IO[bytes] | None = None
        self.listener: Callable[[dict[str, Any]], None] | None = None  # is called with each row that is written

    def __enter__(self) -> RunLog:
        self._file = open(self._path, "ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. CheckpointError: it did not fit on the disk; a reader ignores the cut line."""
        assert self._file, "a log is written inside its `with`"
        line = json_line({key: _json_number(value) for key, value in row.items()})
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise CheckpointError(write_problem(self.folder, len(line), error)) from error
        if self.listener:
            self.listener(row)

    def sync(self) -> None:
        """Wait until the disk has every row."""
        if self._file and self._path.name == METRICS:
            os.fsync(self._file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a crash cut short does not count. No file: no rows."""
    if not path.is_file():
        return []
    rows = []
    for number, row in read_json_lines(path, cut_short=True):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise InputError(f"{path}, line {number}: expected an object with a whole number as step")
        rows.append(row)
    return rows


def words_after(words: Mapping[str, Sequence[str]], row: Mapping[str, Any]) -> dict[str, list[str]]:
    """The control words by side after a steering event, which keeps a side that it does not give."""
    return {side: list(old if row.get(side) is None else row[side]) for side, old in words.items()}


def rewind(folder: Path, step: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl back to `step`; returns the steering events after it, which the resumed run replays.

    They are first made durable in steering.json, so that a crash while resuming does not lose them.
    """
    log, waiting = folder / METRICS, folder / STEERING
    rows = read_metrics(log)
    events = {row["step"]: row for row in rows if row.get("event") == "steer" and row["step"] > step}
    try:
        events = {row["step"]: row for row in parse_json(waiting.read_bytes()) if row["step"] > step} | events
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{waiting}: not the steering events of a run ({error}); delete it to continue without them"
        ) from error
    replay = [events[number] for number in sorted(events)]
    write_atomically(waiting, json.dumps(replay).encode())
    _cut(log, rows, step)
    return replay


def cut_for_good(folder: Path, step: int) -> None:
    """Cut metrics.jsonl back to `step`; no steering event after it is replayed by a resumed run.

    Those that wait for it go first: a crash in between leaves a log that is not cut yet, and can be cut again.
    """
    log = folder / METRICS
    rows = read_metrics(log)
    (folder / STEERING).unlink(missing_ok=True)
    _cut(log, rows, step)


def _cut(log: Path, rows: Sequence[dict[str, Any]], step: int) -> None:
    write_atomically(log, b"".join(json_line(row) for row in rows if row["step"] <= step))


def _json_number(value: Any) -> Any:
    """JSON has no NaN: such values are written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

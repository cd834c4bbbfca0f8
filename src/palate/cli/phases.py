"""The phases of a long command on stderr: one moving line on a terminal, a line every few seconds otherwise."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from palate.runtime.phases import listening, tell
from palate.runtime.progress import duration

SECONDS = 5.0  # between two plain lines of one phase


class Phases:
    """A listener of `runtime.phases`. Counts and time left come first, so that narrow terminals cut the rest."""

    def __init__(self) -> None:
        self.phase, self.started, self.spoken, self.said = "", time.monotonic(), 0.0, ""
        self.terminal = sys.stderr.isatty()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        fresh = phase != self.phase
        if fresh or done == 0:
            self.phase, self.started = phase, now
        if not self.terminal and (not total or (not fresh and now - self.spoken < SECONDS)):
            return  # a log wants few lines, and none before anything is known
        text = line(phase, done, total, now - self.started)
        if self.terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif text != self.said:
            print(text, file=sys.stderr, flush=True)
        self.spoken, self.said = now, text

    def close(self) -> None:
        """Take the moving line away."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def line(phase: str, done: int, total: int, seconds: float) -> str:
    """ "drawing 120/416  29 %, 2 min left"; only what is known."""
    if not total:
        return phase
    left = f", {duration(seconds / done * (total - done))} left" if 0 < done < total and seconds > 1 else ""
    return f"{phase} {done}/{total}  {done / total:.0%}{left}".replace("%", " %")


@contextlib.contextmanager
def show_phases(quiet: bool) -> Iterator[None]:
    """Inside, phases are shown; the first, loading, at once."""
    if quiet:
        yield
        return
    phases = Phases()
    with listening(phases):
        tell("loading")
        try:
            yield
        finally:
            phases.close()

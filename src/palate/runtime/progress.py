"""What a command says while it works: a live line on a terminal, plain lines otherwise.

Printing never stops the work: when nobody reads the output any more, the work goes on silently. Notes also go to the
logger "palate", marked `shown` where they were printed, so that a handler does not print them twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from palate.runtime.notebook import Cell, cell
from palate.runtime.phases import listening

logger = logging.getLogger("palate")

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
PLAIN_SECONDS = 5.0  # between two plain lines about the same work
BAR = 12  # characters
LINE = 160  # characters, of a notebook


def printable(text: str) -> str:
    """`text` without escape sequences and control characters: prompts and file names cannot drive the terminal."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


def say(text: str, *, error: bool = False) -> None:
    """Print a line, whatever has become of the stream: a closed pipe or a lost terminal ends nothing."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(printable(text), file=stream, flush=True)
    except (OSError, ValueError):
        _silence(stream)


def _silence(stream: Any) -> None:
    """Lead a stream that nobody reads to nowhere, so that the interpreter's own flush at its end does not fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def counted(number: int, thing: str) -> str:
    """ "1 vote", "2 votes"."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """ "40 s", "35 min", "3 h 5 min": what a person would say."""
    if seconds < 60:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """A context manager; `show` after each step, `note` for a sentence in between, `phase` for what else takes time.

    Within the block it listens to `palate.runtime.phases`.
    """

    def __init__(self, steps: int, *, visible: bool = True):
        self.steps, self.first, self.step, self.visible = steps, 0, 0, visible
        self.name, self.part, self.parts, self.metrics = "", 0, 0, ""
        self.live: Any = None  # rich's, imported on a terminal only
        self.cell: Cell | None = None  # of a notebook
        self.started = self.spoken = time.monotonic()
        self._listening = contextlib.ExitStack()

    def begin(self, done: int) -> None:
        """Count from step `done`: before the block begins, once it is known."""
        self.first = self.step = done

    def __enter__(self) -> Progress:
        self.started = self.spoken = time.monotonic()
        self._listening.enter_context(listening(self.phase))
        self.cell = cell() if self.visible else None
        if self.visible and not self.cell and sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(get_renderable=self._rendered, refresh_per_second=4)
            self._safely(self.live.start)
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        if self.cell:
            self.name = ""
            self.cell.say(self.line(LINE), self.steps, self.steps)
        if self.live:
            self._safely(self.live.stop)
            self.live = None

    def note(self, text: str) -> None:
        """A sentence that stays."""
        logger.info(text, extra={"shown": self.visible})
        if not self.visible:
            return
        if self.live:
            self._safely(lambda: self.live.console.print(printable(text), markup=False, highlight=False))
        else:
            say(text)

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """What is being done besides steps: "previews", 5 of 8. "" when steps go on."""
        new, self.name, self.part, self.parts = name != self.name, name, done, total
        if not self.visible or not name:
            return
        if self.cell:
            self.cell.say(self.line(LINE), self.step, self.steps)
        elif self.live:
            self._safely(self.live.refresh) if new else None
        elif (now := time.monotonic()) - self.spoken >= PLAIN_SECONDS:
            self.spoken = now
            say(self._phase_text())

    def show(self, step: int, row: Mapping[str, Any]) -> None:
        """A step is done; `row` holds its metrics and step_seconds."""
        self.step, self.name = step, ""
        if not self.visible:
            return
        rewards = [f"{key} {value:.4g}" for key, value in row.items() if key.startswith("reward") and _number(value)]
        self.metrics = ", ".join([f"{row.get('step_seconds', 0.0):.2f} s per step", *rewards[:2]])
        now = time.monotonic()
        if self.cell:
            self.cell.say(self.line(LINE), step, self.steps)
        elif not self.live and (step in (self.steps, self.first + 1) or now - self.spoken >= PLAIN_SECONDS):
            self.spoken = now
            say(f"step {step}/{self.steps}  {self._place()}  {self.metrics}")

    def picture(self, png: bytes, title: str) -> None:
        """The newest previews, where there is a place for pictures: under the cell of a notebook."""
        if self.cell:
            self.cell.show(png, title)

    def _place(self) -> str:
        """ "41 %, 35 min left"."""
        done = self.step - self.first
        percent = f"{100 * self.step / self.steps:.0f} %"
        if not done:
            return percent
        return f"{percent}, {duration((time.monotonic() - self.started) / done * (self.steps - self.step))} left"

    def _phase_text(self) -> str:
        return f"{self.name} {self.part}/{self.parts}" if self.parts else self.name

    def line(self, width: int) -> str:
        """The live line: percent and time left come first, and what does not fit into `width` is cut at the end."""
        full = round(BAR * self.step / self.steps)
        bar = "" if self.cell else "#" * full + "-" * (BAR - full) + "  "
        doing = self._phase_text() or self.metrics
        text = printable(f"{self._place()}  step {self.step}/{self.steps}  {bar}{doing}")
        return text if len(text) <= width else text[: max(width - 1, 0)] + "…"

    def _rendered(self) -> Any:
        from rich.text import Text

        return Text(self.line(self.live.console.width if self.live else 80), no_wrap=True)

    def _safely(self, act: Any) -> None:
        try:
            act()
        except (OSError, ValueError):
            self.visible = False
            _silence(sys.stdout)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

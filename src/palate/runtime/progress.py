"""What a run says while it goes on: a live bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from typing import Any

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without escape sequences and control characters: prompts and file names cannot drive the terminal."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


class Progress:
    """A context manager; `show` after each step, `note` for a sentence in between."""

    def __init__(self, steps: int, *, done: int = 0, visible: bool = True):
        self.steps, self.first, self.visible = steps, done, visible
        self.live: Any = None  # rich's bar, imported on a terminal only
        self.started = self.spoken = time.monotonic()

    def begin(self, done: int) -> None:
        """Count from step `done`: before the block begins, once it is known."""
        self.first = done

    def __enter__(self) -> Progress:
        self.started = self.spoken = time.monotonic()
        if self.visible and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.live = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
            )
            self.live.start()
            self.task = self.live.add_task("", total=self.steps, completed=self.first)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def note(self, text: str) -> None:
        if not self.visible:
            return
        if self.live:
            self.live.console.print(printable(text), markup=False, highlight=False)
        else:
            print(printable(text), flush=True)

    def show(self, step: int, row: Mapping[str, Any]) -> None:
        if not self.visible:
            return
        rewards = [f"{key} {value:.4g}" for key, value in row.items() if key.startswith("reward") and _number(value)]
        text = ", ".join([*rewards[:2], f"{row.get('step_seconds', 0.0):.2f} s a step"])
        if self.live:
            self.live.update(self.task, completed=step, description=text)
            return
        now = time.monotonic()
        if step == self.steps or step == self.first + 1 or now - self.spoken >= 5:
            self.spoken = now
            left = (now - self.started) / max(step - self.first, 1) * (self.steps - step)
            print(f"step {step}/{self.steps}  {text}  {left:.0f} s left", flush=True)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""A cell of a notebook as the place where a run is shown: one line with a bar, and under it the newest pictures."""

from __future__ import annotations

import base64
import html
import sys
import time
from typing import Any

SECONDS = 0.25  # between two changes of the line


class Cell:
    """What a cell shows, changed in place. `display` is IPython's function of that name."""

    def __init__(self, display: Any):
        self.display = display
        self.line = display(_line("", 0, 0), raw=True, display_id=True)
        self.pictures: Any = None
        self.shown = 0.0

    def say(self, text: str, done: int, total: int) -> None:
        """The line, and how much of `total` is done; changes that come too fast are left out, but for the last."""
        now = time.monotonic()
        if now - self.shown >= SECONDS or done == total:
            self.shown = now
            self.line.update(_line(text, done, total), raw=True)

    def show(self, png: bytes, title: str) -> None:
        """The pictures under the line, in place of those that stood there."""
        picture = {"image/png": base64.b64encode(png).decode(), "text/plain": title}
        if self.pictures is None:
            self.pictures = self.display(picture, raw=True, display_id=True)
        else:
            self.pictures.update(picture, raw=True)


def cell() -> Cell | None:
    """The cell that runs now; None outside a notebook."""
    module = sys.modules.get("IPython")  # a notebook's kernel has imported it; nobody else waits for it
    shell = module.get_ipython() if module is not None else None
    if shell is None or "kernel" not in shell.trait_names() or shell.kernel is None:
        return None
    return Cell(sys.modules["IPython.display"].display)


def _line(text: str, done: int, total: int) -> dict[str, str]:
    bar = f'<progress value="{done}" max="{total}"></progress> ' if total else ""
    return {"text/plain": text, "text/html": f"{bar}<code>{html.escape(text)}</code>"}

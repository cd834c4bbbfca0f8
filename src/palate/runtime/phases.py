"""What is being done now (loading, drawing 120/416, judging), told to whoever listens; nobody listens by default.

Long work calls `tell` as it goes. The command line shows it, tests record it, a server may send it on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]  # phase, done, total (0 where it is not known)
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def tell(phase: str, done: int = 0, total: int = 0) -> None:
    """Say what is being done, and how much of it."""
    listener = _listener.get()
    if listener is not None:
        listener(phase, done, total)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, `listener` hears what is told."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)

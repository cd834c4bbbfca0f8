"""Signals that ask a run to stop: the first is noted for the end of the step, a second one has its usual effect."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """The number of the first signal that came, 0 before."""

    number = 0
    since = 0.0  # time.monotonic() of the first signal


@contextlib.contextmanager
def stop_signals(heard: Callable[[int], None] = lambda number: None) -> Iterator[Stop]:
    """Inside, the first SIGTERM, SIGINT or SIGHUP is noted and given to `heard`; a second one has its usual effect.

    Outside of the main thread, where Python delivers no signals, nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _frame: object) -> None:
        if stop.number:
            if "RANK" in os.environ and time.monotonic() - stop.since < 1:
                return  # of one signal, one copy comes from the launcher and one from what signals whole process groups
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.number, stop.since = number, time.monotonic()
        heard(number)

    wanted = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup leaves it
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Signals that ask a run to stop: the first is noted for the end of the step, a second one ends the process at once.

Python runs a signal's handler only between two of its own instructions, so a single long call of torch would keep it
waiting. A thread therefore listens as well, at the pipe into which the interpreter writes each signal at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FIRST_STEP_SECONDS = 10.0  # that the first step of a process gets after a signal: there is nothing to save yet


class Stop:
    """The number of the first signal that came, 0 before."""

    number = 0
    since = 0.0  # time.monotonic() of the first signal
    stepped = False  # whether this process has finished a step, so that there is something to save


@contextlib.contextmanager
def stop_signals(
    heard: Callable[[int], None] = lambda number: None, before_end: Callable[[], None] = lambda: None
) -> Iterator[Stop]:
    """Inside, the first SIGTERM, SIGINT or SIGHUP is noted and given to `heard`; a second one ends the process, after
    `before_end`.

    A process that has not finished a step ends FIRST_STEP_SECONDS after the first signal. Outside of the main thread,
    where Python delivers no signals, nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _frame: object) -> None:
        if not stop.number:
            stop.number, stop.since = number, time.monotonic()
            heard(number)

    wanted = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup leaves it
    before = {number: signal.signal(number, note) for number in wanted}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    old = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(
        target=_listen, args=(reader, stop, tuple(wanted), before_end), name="palate-signals", daemon=True
    )
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(old)
        os.close(writer)  # the thread reads the end of the pipe
        thread.join()
        os.close(reader)
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(reader: int, stop: Stop, wanted: tuple[int, ...], before_end: Callable[[], None]) -> None:
    """End the process when it must not wait for the step that runs."""
    first: tuple[int, float] | None = None
    while True:
        waiting = None if first is None or stop.stepped else max(0.0, first[1] + FIRST_STEP_SECONDS - time.monotonic())
        ready, _, _ = select.select([reader], [], [], waiting)
        if not ready:
            assert first, "only a signal that came starts the clock"
            if not stop.stepped:
                before_end()
                os._exit(128 + first[0])
            continue
        numbers = os.read(reader, 64)
        if not numbers:
            return
        for number in numbers:
            if number not in wanted:
                continue
            if first is None:
                first = number, time.monotonic()
            elif "RANK" in os.environ and time.monotonic() - first[1] < 1:
                pass  # of one signal, one copy comes from the launcher and one from what signals whole process groups
            else:
                before_end()
                os._exit(128 + number)

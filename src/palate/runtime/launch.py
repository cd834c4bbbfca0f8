"""Start a program once for each rank of one machine, and end all of them when one fails.

Workers find their place in the environment as under torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...). Unlike torchrun, a
worker gets as long as it needs after a signal to finish its step and save, and the exit code is the worker's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence

from palate.runtime.errors import RankLostError
from palate.runtime.progress import say

GRACE_SECONDS = 4.0  # that the other ranks get to end by themselves when one has failed
STOPPED = (0, 129, 130, 143)  # exit codes of ranks that ended as they were told to


def launch(command: Sequence[str], nproc: int) -> int:
    """Run `command` as ranks 0 .. nproc - 1 of this machine; returns the exit code of the first one that failed, or 0.

    SIGTERM, SIGINT and SIGHUP are handed on. A worker whose launcher has died sees its parent change (PALATE_LAUNCHER).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "PALATE_LAUNCHER": os.getpid()}  # fmt: skip
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // nproc)
    shared = {key: str(value) for key, value in shared.items()}
    workers = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         start_new_session=True)  # a Ctrl-C reaches the workers once, through this process
        for rank in range(nproc)
    ]  # fmt: skip
    with _handed_on(workers):
        try:
            return _wait(workers)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()


def _wait(workers: Sequence[subprocess.Popen]) -> int:
    failed: list[int] = []
    deadline = float("inf")
    running = list(workers)
    while running:
        for worker in [worker for worker in running if worker.poll() is not None]:
            running.remove(worker)
            code = worker.returncode if worker.returncode >= 0 else 128 - worker.returncode
            if code:
                failed.append(code)
            if code not in STOPPED:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            say(f"palate: a rank has failed; ending the {len(running)} that still run", error=True)
            for worker in running:
                worker.kill()
                worker.wait()
            break
        time.sleep(0.05)
    # a rank that lost another one is not the first that failed
    return next((code for code in failed if code != RankLostError.exit_code), failed[0] if failed else 0)


@contextlib.contextmanager
def _handed_on(workers: Sequence[subprocess.Popen]) -> Iterator[None]:
    def hand_on(number: int, _frame: object) -> None:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(number)

    wanted = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

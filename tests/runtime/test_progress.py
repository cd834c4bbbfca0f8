"""What is said while something works: first what matters, never an error, at once after a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from palate.runtime.phases import tell
from palate.runtime.progress import Progress, duration, printable


def test_time_is_told_as_people_say_it():
    told = [duration(s) for s in (0, 40, 59.4, 61, 2101, 3600, 3 * 3600 + 300)]
    assert told == ["0 s", "40 s", "59 s", "1 min", "35 min", "1 h 0 min", "3 h 5 min"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_percent_and_time_left_survive_any_width(width):
    bar = Progress(200)
    bar.show(82, {"reward_denoise": 2.753, "reward_inversion": -0.3248, "step_seconds": 7.59})
    bar.started -= 7.59 * 82
    line = bar.line(width)
    assert len(line) <= width and line.startswith("41 %, 15 min left  step 82/200")
    bar.phase("previews", 5, 8)
    if width >= 60:
        assert "#####-------  previews 5/8" in bar.line(width)
    bar.show(83, {})
    assert "previews" not in bar.line(120)


def test_the_time_left_of_a_resumed_run_is_told_by_the_steps_since():
    bar = Progress(200)
    bar.begin(100)
    bar.show(120, {})
    bar.started -= 40  # two seconds each
    assert bar.line(80).startswith("60 %, 3 min left")


def test_a_phase_that_takes_long_is_named_and_a_short_one_is_not(capsys):
    tell("nobody listens")
    with Progress(3) as bar:
        tell("previews", 1, 8)
        bar.spoken -= 60
        tell("previews", 5, 8)
    assert capsys.readouterr().out == "previews 5/8\n"
    with Progress(3, visible=False) as bar:
        bar.spoken -= 60
        tell("hidden")
    assert capsys.readouterr().out == ""


def test_text_of_others_cannot_drive_the_terminal():
    bar = Progress(3)
    bar.phase("\x1b[2Jloading")
    assert bar.line(80).endswith("  loading") and printable("\x1b[2Jloading") == "loading"


def child(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


def test_a_reader_that_goes_away_ends_nothing():
    process = child("""
        import sys
        from palate.runtime.progress import Progress, say
        with Progress(3) as bar:
            print("begun", flush=True)
            sys.stdin.readline()
            for step in (1, 2, 3):
                bar.show(step, {})
                bar.note("a note")
            say("the end")
        print("left", file=sys.stderr)
    """, stdin=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == "left\n"
    process.stderr.close()


STUCK = """
    import hashlib
    from palate.runtime import signals
    signals.FIRST_STEP_SECONDS = {patience}
    with signals.stop_signals(lambda number: print("heard", flush=True)) as stop:
        stop.stepped = {stepped}
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # one call, as torch's: no handler of Python's runs
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_call_that_never_ends_does_not_keep_a_process(number, stepped):
    process = child(STUCK.format(patience=0.2, stepped=stepped))
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        if stepped:  # there is something to save: only a second signal ends it
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(number)
        assert process.wait(20) == 128 + number
    finally:
        process.kill()
        process.communicate()


def test_signals_are_as_before_afterwards():
    from palate.runtime.signals import stop_signals

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    heard: list[int] = []
    with stop_signals(heard.append) as stop:
        stop.stepped = True
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == signal.SIGHUP and heard == [signal.SIGHUP]
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]


def test_what_nohup_ignores_stays_ignored():
    from palate.runtime.signals import stop_signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)

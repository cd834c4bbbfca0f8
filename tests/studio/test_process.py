"""Runs in processes of their own: every state that a page can show, from the folder, the lock and the exit."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from support.studio import wait_for

from palate.runtime.errors import InputError
from palate.studio import process
from palate.studio.process import Processes, began, last_message
from palate.studio.workspace import Workspace

TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
from palate.runtime.runlock import owned
folder = Path(sys.argv[-1].partition("=")[2].strip("'")) if sys.argv[1] == "train" else Path(sys.argv[2])
how = os.environ["HOW"]
if how == "bad":
    sys.exit("palate: reward.source.taste: nowhere holds no taste")
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
with owned(folder):
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "event": "step"}) + "\\n")
    checkpoint = folder / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True, exist_ok=True)
    parent = os.getppid()
    while not stopped and how == "long" and os.getppid() == parent:  # nothing outlives a killed test
        time.sleep(0.02)
    (checkpoint / "state.json").write_text(json.dumps({"finished": "" if stopped else how}))
if stopped:
    print("continue with: palate resume", folder)
    sys.exit(143)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(how) -> (processes, folder of the run "a"), with a trainer that ends as told."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    made = []

    def begin(how):
        monkeypatch.setenv("HOW", how)
        made.append(Processes(Workspace(tmp_path / "runs")))
        made[-1].train("srpo-emoji", "a")
        return made[-1], tmp_path / "runs" / "a"

    yield begin
    for processes in made:
        for child in processes.children():
            child.kill()
            child.wait(10)


def until(processes, folder, state):
    wait_for(lambda: processes.state(folder)[0] == state, 30, f"{state}, not {processes.state(folder)}")


def test_a_run_starts_runs_and_stops_when_asked(start):
    processes, folder = start("long")
    assert processes.state(folder)[0] in ("waiting", "running")
    until(processes, folder, "running")
    with pytest.raises(InputError, match="already"):
        processes.resume("a")
    assert processes.stop("a")
    until(processes, folder, "stopped")
    assert not processes.stop("a") and processes.owner("a") is None


def test_a_killed_run_shows_as_died_at_once_and_can_be_resumed(start):
    processes, folder = start("long")
    until(processes, folder, "running")
    os.kill(processes.owner("a"), signal.SIGKILL)
    until(processes, folder, "died")
    processes.resume("a")
    until(processes, folder, "running")


def test_another_studio_sees_the_same(start):
    """The first one was killed: the run goes on, and who looks next finds it by its lock."""
    processes, folder = start("long")
    until(processes, folder, "running")
    other = Processes(processes.workspace)
    assert other.state(folder)[0] == "running" and other.owner("a") == processes.owner("a")
    assert other.stop("a")
    until(processes, folder, "stopped")
    assert other.state(folder) == ("stopped", "")


@pytest.mark.parametrize(("how", "said"), [("finished", ""), ("guard: concept fell", "guard: concept fell")])
def test_a_finished_run_says_why_it_ended(start, how, said):
    processes, folder = start(how)
    until(processes, folder, "finished")
    assert processes.state(folder) == ("finished", said) == Processes(processes.workspace).state(folder)


def test_a_run_that_cannot_begin_shows_its_last_message(start):
    processes, folder = start("bad")
    until(processes, folder, "died")
    assert processes.state(folder)[1] == "reward.source.taste: nowhere holds no taste"


def test_last_words_and_numbers_used_again():
    assert last_message("step 1\rstep 2\npalate: no room\n") == "no room"
    assert last_message("").startswith("its process ended without a word")
    assert began(os.getpid()) and not began(2**22 + 1)

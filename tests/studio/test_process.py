"""Runs in processes of their own: every state that a page can show, from the folder, the lock and the exit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from support.studio import wait_for

from palate.runtime import runlock
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
if how == "loading":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))  # as one does that has no step to save
    parent = os.getppid()
    with owned(folder):
        while os.getppid() == parent:
            time.sleep(0.02)
if how == "importing":
    os.kill(os.getpid(), signal.SIGKILL)
with owned(folder):
    print("step 1 of 60", flush=True)
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


def test_who_was_killed_says_nothing_and_no_error_of_an_earlier_start(start, monkeypatch):
    """One log for all starts of a run: the first could not begin, the second is killed in its first step."""
    processes, folder = start("bad")
    until(processes, folder, "died")
    monkeypatch.setenv("HOW", "long")
    processes.resume("a")
    until(processes, folder, "running")
    wait_for(lambda: "step 1 of 60" in processes.log("a"), 30, "its first line")
    os.kill(processes.owner("a"), signal.SIGKILL)
    until(processes, folder, "died")
    for studio in (processes, Processes(processes.workspace)):
        assert studio.state(folder)[1].startswith("its process ended without a word")
    processes.resume("a")
    until(processes, folder, "running")
    processes.stop("a")
    until(processes, folder, "stopped")
    assert Processes(processes.workspace).state(folder) == ("stopped", "")


def test_a_stop_reaches_the_process_that_has_just_taken_the_run_of_a_dead_one(start, monkeypatch):
    """It holds the lock, and the file still names the dead one."""
    processes, folder = start("long")
    until(processes, folder, "running")
    living = processes.owner("a")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = runlock.status(folder).owner._replace(pid=dead.pid)
    monkeypatch.setattr(processes, "_status", lambda name: runlock.RunStatus("running", owner))
    assert processes.owner("a") == living
    monkeypatch.undo()


def test_a_run_that_was_stopped_while_it_loaded_did_not_die(start):
    """It ends at once, having no step to save, so its owner is not taken out of the folder."""
    processes, folder = start("loading")
    until(processes, folder, "running")
    assert processes.stop("a")
    until(processes, folder, "stopped")
    assert Processes(processes.workspace).state(folder) == ("stopped", "")


def test_a_run_that_was_killed_before_it_owned_its_folder_died_for_a_later_studio_too(start):
    processes, folder = start("importing")
    until(processes, folder, "died")
    assert Processes(processes.workspace).state(folder)[0] == "died"


def test_a_run_that_failed_here_and_was_resumed_in_a_terminal_is_as_that_left_it(start):
    processes, folder = start("bad")
    until(processes, folder, "died")
    (folder / "metrics.jsonl").write_text('{"step": 1, "event": "step"}\n')
    for path in (processes.log_path("a"), processes.workspace.home / "processes" / "a.json"):
        os.utime(path, (path.stat().st_mtime - 60,) * 2)  # a minute passes
    with runlock.owned(folder):  # trains, and is stopped in order
        pass
    both = processes, Processes(processes.workspace)
    assert [studio.state(folder) for studio in both] == [("stopped", "")] * 2
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with runlock.owned(folder):
        owner = json.loads((folder / runlock.OWNER).read_text())
    (folder / runlock.OWNER).write_text(json.dumps(owner | {"pid": dead.pid}))  # trains once more, and is killed
    for studio in both:
        state, said = studio.state(folder)
        assert state == "died" and said.startswith("its process ended without a word")
    processes.resume("a")  # begun here once more: what it says counts again
    assert processes.children()[-1].wait(60) == 1
    assert processes.state(folder) == ("died", "reward.source.taste: nowhere holds no taste")


def test_last_words_and_numbers_used_again():
    assert last_message("step 1\rstep 2\npalate: no room\n") == "no room"
    assert last_message("").startswith("its process ended without a word")
    assert began(os.getpid()) and not began(2**22 + 1)

"""Training in processes of their own, by the same command as at a terminal; and how a run folder stands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate import recipe as recipes
from palate.runtime import checkpoint, runlock
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import write_atomically
from palate.studio.workspace import Workspace

LOG_TAIL = 64 * 1024  # bytes of a log that are shown
COMMAND = (sys.executable, "-m", "palate")
STOPS = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a run that was asked to stop, or while it loaded
SILENT = "its process ended without a word; it was killed, or the machine went down"


class Processes:
    """Starts `palate train` and `palate resume`, and tells a run's state from its folder."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def train(self, recipe: str, name: str, overrides: Sequence[str] = ()) -> None:
        """Begin a new run of that name. The recipe was checked before; what fails later stands in the log. InputError:
        there is a run of that name."""
        folder = self.workspace.place(name)
        plan = recipes.read(recipe, [*overrides, f"run.folder={quoted(folder)}"])
        with self.workspace.turn():
            if (folder / "recipe.yaml").exists():
                raise InputError(f"{name} was begun in another window just now; look at it, or start once more")
            folder.mkdir(parents=True, exist_ok=True)  # the page shows the run from now on
            write_atomically(folder / "recipe.yaml", recipes.dump(plan).encode())
        try:
            self._start(name, ["train", recipe, *overrides, f"run.folder={quoted(folder)}"])
        except OSError:  # a full disk, no memory for another process: there is no run then
            (folder / "recipe.yaml").unlink()
            folder.rmdir()
            raise

    def resume(self, name: str, overrides: Sequence[str] = ()) -> None:
        self._start(name, ["resume", str(self.workspace.runs / name), *overrides])

    def _start(self, name: str, arguments: list[str]) -> None:
        with self._lock:
            if self.owner(name) is not None:
                raise InputError(f"{name} is being trained already; stop it first")
            self.workspace.logs.mkdir(parents=True, exist_ok=True)
            log = self.log_path(name)
            with open(log, "ab") as out:
                begins = out.tell()  # what earlier starts printed is before
                child = subprocess.Popen(
                    [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=out,
                    stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "NO_COLOR": "1"},
                )  # fmt: skip
            self._children[name] = child
            tree = {"pid": child.pid, "began": began(child.pid), "log": begins}
            self.workspace.write(f"processes/{name}.json", tree)

    def stop(self, name: str) -> bool:
        """Ask the run's process to save and end; False when none is at work."""
        pid = self.owner(name)
        if pid is None:
            return False
        tree = self.workspace.read(f"processes/{name}.json")
        if tree.get("pid") == pid:
            self.workspace.write(f"processes/{name}.json", tree | {"asked": True})
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        return True

    def owner(self, name: str) -> int | None:
        """The process that trains the run, or that loads its model, if it lives on this machine."""
        found = self._status(name)
        if found.state == "running" and found.owner is not None:
            if found.owner.host != socket.gethostname():
                return None
            if lives(found.owner.pid):  # else the next owner has not written its name over that of a dead one yet
                return found.owner.pid
        child = self._children.get(name)
        if child is not None:
            return child.pid if child.poll() is None else None
        tree = self.workspace.read(f"processes/{name}.json")  # begun by a studio that has ended since
        pid = tree.get("pid")
        return pid if isinstance(pid, int) and tree.get("began") and began(pid) == tree["began"] else None

    def state(self, folder: Path) -> tuple[str, str]:
        """(waiting, running, stopped, died or finished; a sentence)."""
        name, found = folder.name, self._status(folder.name)
        if found.state == "running":
            elsewhere = found.owner is not None and found.owner.host != socket.gethostname()
            if elsewhere and found.owner:
                remedy = f"If that machine no longer runs it, delete {name}/{runlock.OWNER} and press Resume."
                return "running", f"It is trained by {found.owner.text()}. {remedy}"
            return "running", ""
        if self.owner(name) is not None:
            return "waiting", ""
        if found.state == "finished":
            text = str(newest(folder).get("finished", ""))
            return "finished", "" if text == "finished" else text
        child, tree = self._children.get(name), self.workspace.read(f"processes/{name}.json")
        if not (found.owner and found.owner.pid == tree.get("pid")) and self._taken_since(name):
            killed = found.state == "died"  # of it nothing is known here but that it did not end in order
            return ("died", last_message("")) if killed else ("stopped", "")
        log = self.log(name, begins if isinstance(begins := tree.get("log"), int) else 0)
        said = [line for line in log.splitlines()[-12:] if line.startswith("palate: ")]  # an error, in its last lines
        asked = tree.get("asked") is True if child is None else child.returncode in STOPS
        if found.state == "died" and not (asked and found.owner and found.owner.pid == tree.get("pid")):
            return "died", last_message("\n".join(said))  # it was killed; its last line is how far it was, not why
        begun = found.state == "new" and "pid" in tree  # here, and left nothing
        failed = child.returncode not in (0, *STOPS) if child else not asked and (begun or bool(said))
        return ("died", last_message(log)) if failed else ("stopped", "")

    def _taken_since(self, name: str) -> bool:
        """Whether a process that was not begun here has had the run after the last one that was: it wrote into the
        owner's file. One begun here leaves that file before it prints what went wrong."""
        places = self.log_path(name), self.workspace.home / "processes" / f"{name}.json"
        try:
            owner = (self.workspace.runs / name / runlock.OWNER).stat().st_mtime_ns
            return owner > max(place.stat().st_mtime_ns for place in places)
        except OSError:
            return False  # none was begun here, or none has had it

    def forget(self, name: str) -> None:
        """Let a run that was deleted say nothing of a later one of its name, which another program may begin."""
        self._children.pop(name, None)
        (self.workspace.home / "processes" / f"{name}.json").unlink(missing_ok=True)
        if self.log_path(name).is_file():
            self.log_path(name).write_bytes(b"")  # the file stays: its name is taken

    def _status(self, name: str) -> runlock.RunStatus:
        child = self._children.get(name)
        if child is not None:
            child.poll()  # a killed child stays a process until somebody asks how it ended
        return runlock.status(self.workspace.runs / name)

    def children(self) -> list[subprocess.Popen[bytes]]:
        """The processes that this studio began, whether they still live or not."""
        return list(self._children.values())

    def log_path(self, name: str) -> Path:
        return self.workspace.logs / f"{name}.log"

    def log(self, name: str, begins: int = 0) -> str:
        """The end of what the run printed, from a place in the file on."""
        try:
            with open(self.log_path(name), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(begins, size - LOG_TAIL))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""


def newest(folder: Path) -> dict[str, Any]:
    """The state of the newest checkpoint, whole or not verified; empty without one."""
    found = checkpoint.steps(folder / "checkpoints")
    for step in reversed(found):
        try:
            tree = json.loads((folder / "checkpoints" / checkpoint.name(step) / checkpoint.STATE).read_text("utf-8"))
        except (OSError, ValueError, CheckpointError):
            continue
        if isinstance(tree, dict):
            return tree
    return {}


def lives(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def began(pid: int) -> str:
    """When a process began, in the kernel's ticks: a number used again by another process is told apart. "" if none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if stat[0] == "Z" else stat[19]


def last_message(log: str) -> str:
    """The last line that says something, without the progress lines."""
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    own = [line.removeprefix("palate: ") for line in lines if line.startswith("palate: ")]
    return (own or lines or [SILENT])[-1][:300]


def quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"

"""One owner per run folder: two processes never write one, a dead owner is noticed, other machines are asked."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from palate.runtime import runlock
from palate.runtime.errors import InputError
from palate.runtime.runlock import OWNER, owned, require_free, status

HOLDER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from palate.runtime.runlock import owned
    with owned(Path(sys.argv[1])):
        (Path(sys.argv[1]) / "metrics.jsonl").touch()
        print("held", flush=True)
        sys.stdin.readline()
""")


@pytest.fixture
def holder(tmp_path):
    """Starts a process that owns the folder until its standard input ends."""
    started = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_owner_is_refused_until_the_first_has_ended(tmp_path, holder):
    folder = tmp_path / "run"
    process = holder(folder)
    assert status(folder).state == "running" and status(folder).owner.pid == process.pid
    with pytest.raises(InputError, match=f"process {process.pid} on .* since .*kill {process.pid}"), owned(folder):
        pass
    with pytest.raises(InputError, match="no export"):
        require_free(folder, "no export")
    assert status(folder).state == "running"  # looking and failing have not taken it away
    process.communicate("\n")
    assert status(folder).state == "stopped"
    with owned(folder):
        assert status(folder).owner.pid == os.getpid()


def test_an_owner_that_was_killed_is_known_as_dead_and_replaced(tmp_path, holder):
    folder = tmp_path / "run"
    process = holder(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert status(folder).state == "died" and status(folder).owner.pid == process.pid
    require_free(folder, "nothing")
    with owned(folder):
        pass
    assert status(folder).state == "stopped"


def test_an_owner_on_another_machine_is_believed(tmp_path):
    owner = {"host": "elsewhere", "pid": 1, "started": "5", "since": "2026-01-01T00:00:00"}
    (tmp_path / OWNER).write_text(json.dumps(owner))
    assert status(tmp_path).state == "running"
    with pytest.raises(InputError, match=f"process 1 on elsewhere .*delete .*{OWNER}"), owned(tmp_path):
        pass
    (tmp_path / OWNER).unlink()
    with owned(tmp_path):
        pass


def test_a_number_that_now_belongs_to_another_process_is_not_the_owner(tmp_path):
    owner = {"host": socket.gethostname(), "pid": os.getppid(), "started": "1", "since": "2026-01-01T00:00:00"}
    (tmp_path / OWNER).write_text(json.dumps(owner))
    assert status(tmp_path).state == "died"
    with owned(tmp_path):
        pass


def test_an_owner_with_this_process_s_own_number_is_an_earlier_one(tmp_path, monkeypatch):
    """In a container every start may have the same number; where no /proc tells when a process began, too."""
    monkeypatch.setattr(runlock, "_started", lambda pid: "")
    earlier = {"host": socket.gethostname(), "pid": os.getpid(), "started": "", "since": "yesterday"}
    (tmp_path / runlock.OWNER).write_text(json.dumps(earlier))
    assert runlock.status(tmp_path).state == "died"
    with runlock.owned(tmp_path):
        assert runlock.status(tmp_path).state == "running"


def test_it_nests_in_one_process_and_leaves_no_empty_folder(tmp_path):
    folder = tmp_path / "deep" / "run"
    with owned(folder):
        with owned(folder):
            (folder / "checkpoints").mkdir()
        assert status(folder).state == "running"
    assert not folder.exists() and status(folder).state == "new"
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").touch()
    with owned(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept" / "notes.txt").exists()


def test_of_many_that_try_at_once_one_has_it(tmp_path):
    """All four are there before the first tries, and who has it keeps it until the others have tried."""
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from palate.runtime.errors import InputError
        from palate.runtime.runlock import owned
        folder, there, refused = map(Path, sys.argv[1:4])
        def wait(place, count):
            end = time.time() + 60
            while len(list(place.iterdir())) < count and time.time() < end:
                time.sleep(0.001)
        (there / sys.argv[4]).touch()
        wait(there, 4)
        try:
            with owned(folder):
                (folder / "x").touch()
                print("mine", flush=True)
                wait(refused, 3)
        except InputError:
            (refused / sys.argv[4]).touch()
            print("refused", flush=True)
    """)
    folders = [tmp_path / name for name in ("run", "there", "refused")]
    for folder in folders:
        folder.mkdir()
    command = [sys.executable, "-c", script, *map(str, folders)]
    processes = [subprocess.Popen([*command, str(k)], stdout=subprocess.PIPE, text=True) for k in range(4)]
    said = sorted(process.communicate()[0].strip() for process in processes)
    assert said == ["mine", "refused", "refused", "refused"]

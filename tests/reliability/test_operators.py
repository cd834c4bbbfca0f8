"""What an operator of shared machines meets: other users, jobs that are ended while they load, power cuts, NFS."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.checkpoints import STATE, TENSORS, Killed, kill_at, write
from support.loop import run

from palate.cli import runs as runs_command
from palate.models.text_cache import TextCache, TextReader
from palate.runtime import checkpoint, runlock
from palate.runtime.errors import CheckpointError
from palate.runtime.images import encode_png
from palate.runtime.tensors import writing_tensors
from palate.taste.votes import Picture, Vote, VoteStore
from palate.train import loop, steering
from palate.train.steering import Steering


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o002)
    yield
    os.umask(before)


LOADING = """
import sys, time
from pathlib import Path
from palate.runtime.runlock import owned
with owned(Path(sys.argv[1])):
    print("taken", flush=True)
    time.sleep(60)
"""
IN_ONE_CALL = """
import sys, time
from pathlib import Path
from palate.runtime.runlock import let_go, owned
from palate.runtime.signals import stop_signals
with owned(Path(sys.argv[1])), stop_signals(before_end=let_go):
    print("taken", flush=True)
    while True:
        time.sleep(60)  # one call, as of torch: python hears of a signal when it ends
"""


@pytest.mark.parametrize(("code", "signals"), [(LOADING, 1), (IN_ONE_CALL, 2)])
def test_a_process_that_is_told_to_end_gives_its_folder_up(tmp_path, code, signals):
    """On another node, where a job is queued anew, nobody could tell that its owner has ended."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("{}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"taken\n"
        assert json.loads((folder / ".owner").read_text())["pid"] == child.pid
        child.send_signal(signal.SIGTERM)
        if signals == 2:
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(1.5)  # it may finish its step
            child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 143
    finally:
        child.kill()
        child.wait()
    assert (folder / ".owner").read_text() == ""


def test_others_of_a_group_can_read_and_go_on_with_a_run(tmp_path, umask):
    path = write(tmp_path / "checkpoints", 1)
    assert {mode(part) for part in path.iterdir()} == {0o664}
    with writing_tensors(tmp_path / "x.safetensors"):
        checkpoint.save_file({"a": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    (tmp_path / "network").mkdir()
    with writing_tensors(tmp_path / "network"):
        checkpoint.save_file({"a": torch.zeros(1)}, str(tmp_path / "network/x.safetensors"))
    assert {mode(file) for file in tmp_path.rglob("x.safetensors")} == {0o664}
    assert len(list((tmp_path / "network").iterdir())) == 1
    with runlock.owned(tmp_path):
        assert mode(tmp_path / ".owner") == 0o664


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    digest = checkpoint.file_digest

    def denied(path):
        if "step-000002" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return digest(path)

    monkeypatch.setattr(checkpoint, "file_digest", denied)
    with pytest.raises(CheckpointError, match="It may be whole, so it is not passed over"):
        checkpoint.load_newest(tmp_path, warn=pytest.fail)
    monkeypatch.undo()

    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_file", failing)
        with pytest.raises(CheckpointError, match=r"delete \S*/step-000002 to do without"):  # that one, not all
            checkpoint.load_newest(tmp_path, warn=pytest.fail)
    (tmp_path / "step-000002/state.json").unlink()  # this is damage
    assert checkpoint.load_newest(tmp_path, warn=lambda text: None).step == 1


def test_the_checkpoint_comes_before_its_copy(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loop, "write_adapter", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path / "run", steps=3, checkpoint_every=0)
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [3]


def test_a_kill_while_a_step_is_saved_again_costs_nothing(tmp_path, monkeypatch):
    """Between the renames, with no other checkpoint."""
    for point in range(3):
        folder = tmp_path / str(point)
        write(folder, 4)
        with monkeypatch.context() as patch:
            kill_at(patch, point, ("replace", "remove_folder"))
            with pytest.raises(Killed):
                checkpoint.save(folder, 4, {k: v + 9 for k, v in TENSORS.items()}, STATE)
        assert checkpoint.steps(folder) or checkpoint.set_aside(folder)
        checkpoint.settle(folder)
        found = checkpoint.load_newest(folder, warn=pytest.fail).tensors["ids"] - TENSORS["ids"]
        assert found.unique().tolist() == ([9] if point == 2 else [4])
        assert not list(folder.glob(".tmp-*"))


def test_words_that_cannot_be_read_end_no_run_and_are_told_of_once(tmp_path):
    said = []
    (tmp_path / steering.CONTROL).mkdir()  # as a file of another user: neither read nor deleted
    words = Steering(tmp_path, None, _OneRank(), unknown_words=str, note=said.append)
    assert [words._next(step) for step in (1, 2)] == [(None, False)] * 2 and len(said) == 1


class _OneRank:
    is_main = True


def test_a_folder_of_another_user_is_listed(tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "none"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/recipe.yaml").write_text("{}")
    look = os.stat

    def closed(path, *rest, **named):
        if str(path).startswith(f"{tmp_path}/b/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, *rest, **named)

    monkeypatch.setattr(os, "stat", closed)
    runs_command.print_runs(tmp_path, True)
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(found) == {"a", "b"} and found["b"]["state"] == "broken" and "denied" in found["b"]["headline"]


def test_a_part_of_a_shared_text_cache_that_is_closed_costs_no_run(tmp_path, monkeypatch):
    calls = []

    def load():
        return lambda prompt: calls.append(prompt) or {"x": torch.ones(2)}

    def denied(path, data):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("palate.models.text_cache.write_atomically", denied)
    cache = TextCache(
        TextReader(lambda *_: load(), len, 99), load, key="k", device=torch.device("cpu"), folder=tmp_path
    )
    with pytest.warns(UserWarning, match="model.text_cache: .* Permission denied; what cannot be kept there") as warned:
        cache.fill(["a", "b"])
    assert sum("text_cache" in str(each.message) for each in warned) == 1 and not cache.loaded
    assert cache(["a", "b"])["x"].shape == (2, 2) and sorted(calls) == ["", "a", "b"]


def test_a_power_cut_costs_the_last_vote_at_most(tmp_path):
    store = VoteStore(tmp_path)
    content = encode_png(np.zeros((16, 16, 3), np.uint8))
    name = store.keep(content)
    votes = [Vote("a fox", Picture(name), Picture(name), "left", id=f"v{k}") for k in range(3)]
    for vote in votes[:2]:
        store.append(vote)
    with open(store.file, "ab") as file:
        file.write(b"\0" * 300)  # what a file system may leave
    store.append(votes[2])
    assert [vote.id for vote in store.read()] == ["v0", "v1", "v2"]
    (store.pictures / name).write_bytes(b"")
    assert store.keep(content) == name and (store.pictures / name).read_bytes() == content


def test_what_another_process_reads_ends_no_save(tmp_path, monkeypatch):
    for step in range(3):
        write(tmp_path, step)

    def busy(folder):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))

    monkeypatch.setattr(checkpoint, "remove_folder", busy)
    checkpoint.prune(tmp_path, keep=1, also=set())
    assert checkpoint.steps(tmp_path) == [2]
    write(tmp_path, 3)
    monkeypatch.undo()
    write(tmp_path, 4)
    assert checkpoint.steps(tmp_path) == [2, 3, 4] and not list(tmp_path.glob(".tmp-*"))


def test_a_million_steps_are_more_than_999_999(tmp_path):
    for step, finished in ((999_999, ""), (1_000_000, "finished")):
        folder = tmp_path / "checkpoints" / checkpoint.name(step)
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"finished": finished}))
    assert runlock.status(tmp_path).state == "finished"


def test_a_page_of_a_run_that_cannot_be_written_to(tmp_path, palate):
    from support.pages import fake_run

    made = fake_run(tmp_path / "run")
    code, _, _ = palate("report", made, "--out", tmp_path / "page.html")
    assert code == 0 and "<html" in (tmp_path / "page.html").read_text() and not (made / "report.html").exists()

"""Pictures and the votes, lists or studies that name them come in together, or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.studio import wait_for

from palate.runtime.errors import PalateError
from palate.studio.artist import Artist
from palate.studio.comparing import Comparing
from palate.studio.voting import Voting
from palate.studio.workspace import Workspace
from palate.taste.readers import import_votes
from palate.taste.votes import Picture, Vote


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@contextlib.contextmanager
def files_no_longer_than(size):
    """A disk that is full, for files of more than `size` bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def everything(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def folders(workspace, source, *, damaged=False):
    for side, shades in (("win", (1, 2)), ("lose", (3, 4))):
        (source / side).mkdir(parents=True)
        for name, shade in zip("ab", shades, strict=True):
            (source / side / f"{name}.png").write_bytes(png(shade)[: -30 if damaged and shade == 4 else None])
    import_votes(source, workspace.store)


def rows(workspace, source):
    """A list whose second row is no vote."""
    source.mkdir()
    (source / "a.png").write_bytes(png(1))
    row = {"prompt": "a fox", "left": "a.png", "right": "a.png", "choice": "left"}
    (source / "list.json").write_text(json.dumps([row, row | {"choice": "up"}]))
    import_votes(source / "list.json", workspace.store)


def upload(workspace, source, *, damaged=False):
    better = [("1.png", png(1)), ("2.png", png(2)[: -30 if damaged else None])]
    Voting(workspace, Artist(workspace)).add_pictures("fox", better, [("3.png", png(3))])


def pool(workspace, source):
    """The studio draws pictures to choose among, and cannot list them: a folder of that name is in the way."""
    artist = Artist(workspace)
    artist.look, artist.sampler = lambda images, prompts: np.zeros((len(images), 1)), SimpleNamespace(steps=1)
    (workspace.home / "pool.jsonl").mkdir(exist_ok=True)
    artist.add(["fox"], torch.zeros(1, 3, 8, 8), ["fox"], [0])


def study(workspace, source):
    """The studio draws a blind study, and cannot write down whose pictures are whose."""
    comparing = Comparing(workspace)
    comparing.showing = lambda run: SimpleNamespace(prompts=["fox"])
    comparing._draw = lambda showing, prompts, parts: torch.full((1, 3, 8, 8), 0.1 * len(parts))
    comparing._lora = comparing._made = lambda *runs: {}
    (workspace.home / "compare").write_text("")
    comparing._make("a", "a", "")


WAYS = {
    "a damaged picture": lambda *given: folders(*given, damaged=True), "a row that is no vote": rows,
    "a full disk": folders, "uploaded": lambda *given: upload(*given, damaged=True), "uploaded, full": upload,
    "the pool": pool, "a study": study,
}  # fmt: skip


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_what_fails_to_come_in_leaves_nothing(tmp_path, way, before):
    """Of the pictures that fail, one was there before: it stays."""
    workspace = Workspace(tmp_path / "runs")
    store = workspace.store
    for k in range(before):
        store.append(Vote("fox", Picture(store.keep(png(1))), Picture(store.keep(png(100))), "left", id=str(k)))
    for own in ("pool.jsonl", "compare"):  # of the test's, not of the store
        if way == {"pool.jsonl": "the pool", "compare": "a study"}[own]:
            (workspace.home / own).mkdir() if own == "pool.jsonl" else (workspace.home / own).write_text("")
    was = everything(tmp_path / "runs")
    size = store.file.stat().st_size + 300 if before else 300
    with (
        files_no_longer_than(size if "full" in way else resource.RLIM_INFINITY),
        pytest.raises((PalateError, OSError)),
    ):
        WAYS[way](workspace, tmp_path / "source")
    assert everything(tmp_path / "runs") == was


def test_a_new_folder_of_votes_that_an_import_failed_on_is_gone(tmp_path):
    store = Workspace(tmp_path / "runs").store
    store.folder.rmdir()
    with pytest.raises(PalateError):
        folders(SimpleNamespace(store=store), tmp_path / "source", damaged=True)
    assert not store.folder.exists()


def test_an_import_that_was_killed_is_harmless_and_swept_and_one_at_work_is_not(tmp_path):
    """The child waits for ever for its second picture, a pipe; what it holds lies beside the pictures."""
    workspace = Workspace(tmp_path / "runs")
    store = workspace.store
    (tmp_path / "slow" / "win").mkdir(parents=True)
    (tmp_path / "slow" / "lose").mkdir()
    (tmp_path / "slow" / "win" / "a.png").write_bytes(png(7))
    os.mkfifo(tmp_path / "slow" / "lose" / "a.png")
    child = os.fork()
    if child == 0:
        import_votes(tmp_path / "slow", store)
        os._exit(1)
    try:
        wait_for(lambda: list(store.pictures.glob(".*/pictures/[0-9a-f]*.png")), 20, "a picture of the child")
        upload(workspace, tmp_path)
        assert len(list(store.pictures.glob(".*/pictures/[0-9a-f]*.png"))) == 1  # the child still lives
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    kept = sorted(path.name for path in store.pictures.glob("[0-9a-f]*"))
    assert len(kept) == 3 and len(store.read()) == 2  # of the upload alone
    folders(workspace, tmp_path / "again")
    assert not list(store.pictures.glob(".*")) and len(store.read()) == 4
    assert all(store.path_of(picture) for vote in store.read() for picture in (vote.left, vote.right))

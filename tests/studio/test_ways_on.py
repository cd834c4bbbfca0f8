"""States from which a person must be able to get on: what is gone, damaged, elsewhere, or was ended by somebody."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.studio import wait_for

from palate import recipe
from palate.runtime.errors import InputError
from palate.studio.process import SILENT, STOPS
from palate.studio.routes_train import _require_idle
from palate.studio.runview import Words
from palate.studio.steering import checked_word
from palate.taste import pictures
from palate.taste.pictures import Choice, as_image, features_of_choices, read_choices
from palate.taste.votes import Picture, Vote, VoteStore


def begun(found, name, kind="taste-emoji", *overrides):
    folder = found.workspace.runs / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.dump(recipe.read(kind, list(overrides))))
    return folder


def test_align_opens_when_the_run_that_is_drawn_from_is_gone(studio, monkeypatch):
    client, found = studio
    monkeypatch.setattr(found.workspace, "settings", lambda: {"source": "gone", "prompts": [], "mode": "fresh"})
    assert client.get("/align").status_code == 200
    monkeypatch.setattr(found.voting, "votes", lambda: [None] * 99)
    answer = client.post("/align/start", headers={"hx-request": "true"})
    assert answer.status_code == 422 and "gone, whose pictures you chose between, is gone" in answer.text


def test_a_second_window_begins_no_run_beside_one_that_trains(studio, monkeypatch):
    client, found = studio
    begun(found, "busy-1")
    _require_idle(found)
    monkeypatch.setattr(found.processes, "owner", lambda name: 7 if name == "busy-1" else None)
    monkeypatch.setattr(found.voting, "votes", lambda: [None] * 99)
    client.post("/steer/word", data={"word": "3d", "side": "positive"})
    for path in ("/align/start", "/steer/start"):
        answer = client.post(path, headers={"hx-request": "true"})
        assert answer.status_code == 422 and "busy-1 is training already" in answer.text, path
    (found.workspace.home / "steer.json").unlink()


def test_a_run_that_its_guard_ended_offers_no_more_steps(studio, monkeypatch):
    client, found = studio
    begun(found, "ended-1")
    monkeypatch.setattr(type(found.processes), "state", lambda self, folder: ("finished", "guard: concept fell"))
    monkeypatch.setattr("palate.studio.runview.RunView.checkpoints", lambda self: [0, 10])
    assert "Go on for 30 steps" not in client.get("/live", params={"run": "ended-1"}).text
    answer = client.post("/runs/ended-1/resume", data={"more": 30}, headers={"hx-request": "true"})
    assert answer.status_code == 422 and "the guard has ended ended-1" in answer.text
    monkeypatch.setattr(type(found.processes), "state", lambda self, folder: ("finished", ""))
    assert "Go on for 30 steps" in client.get("/live", params={"run": "ended-1"}).text


def test_a_run_of_a_machine_that_is_gone_says_how_it_goes_on(studio):
    client, found = studio
    folder = begun(found, "far-1")
    owner = {"host": "old-laptop", "pid": 4242, "started": "1", "since": "2026-01-01T10:00:00"}
    (folder / ".owner").write_text(json.dumps(owner))
    text = client.get("/live", params={"run": "far-1"}).text
    assert "old-laptop" in text and "delete far-1/.owner and press Resume" in text


def test_a_run_that_was_stopped_while_it_loaded_is_stopped(studio):
    _, found = studio
    assert {-signal.SIGINT, -signal.SIGTERM} <= set(STOPS)
    folder = found.workspace.runs / "early-1"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    found.processes._children["early-1"] = child
    found.workspace.write("processes/early-1.json", {"pid": child.pid, "began": "", "log": 0})
    begun(found, "early-1")
    assert found.processes.stop("early-1")
    wait_for(lambda: child.poll() is not None, what="the stop")
    assert found.processes.state(folder) == ("stopped", "")


def test_a_silent_death_is_not_said_to_have_said_something(studio, monkeypatch):
    client, found = studio
    begun(found, "mute-1")
    for message, said in ((SILENT, False), ("no space left", True)):
        monkeypatch.setattr(type(found.processes), "state", lambda self, folder, m=message: ("died", m))
        text = client.get("/live", params={"run": "mute-1"}).text
        assert message in text and ("The last thing it said" in text) == said


@pytest.mark.parametrize("word", ["a", "the", "on", "background", "fox"])
def test_words_that_steer_nothing_are_refused(word):
    with pytest.raises(InputError, match=r"it knows|is no word of style, size or background"):
        checked_word(word, Words(), embedded=True)


def test_a_word_of_two_has_no_effect_of_its_own(studio, monkeypatch):
    _, found = studio
    begun(found, "two-1", "srpo-emoji")
    view = dataclasses.replace(found.view("two-1"), previews=[0, 5])
    monkeypatch.setattr(type(view), "pictures", lambda self, step: [{"prompt": "a", "seed": 0, "file": "0.png"}])
    monkeypatch.setattr(found.effects, "_count", lambda *given: {"3d": 1, "": 1})
    found.artist.ready.set()
    monkeypatch.setattr(type(found.artist), "works", True, raising=False)
    words = Words({"3d": 0}, {"purple 3d": 0})
    assert list(found.effects.of(view, words)) == ["3d"]


def votes_of(folder, count=4):
    store = VoteStore(folder)
    for i in range(count):
        kept = []
        for k in range(2):
            stream = io.BytesIO()
            pixels = np.random.default_rng(2 * i + k).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stream, "PNG")
            kept.append(Picture(store.keep(stream.getvalue())))
        store.append(Vote("a fox", *kept, "left"))
    return store


def test_a_damaged_picture_takes_its_vote_out_and_no_other(tmp_path, caplog):
    store = votes_of(tmp_path)
    file = store.path_of(store.read()[1].right)
    file.write_bytes(file.read_bytes()[:300])
    with caplog.at_level(logging.WARNING, "palate"):
        found = read_choices(store)
    assert len(found) == 3 and "1 of 4 votes do not count: a picture of them is gone or damaged" in caplog.text
    for file in store.pictures.iterdir():
        file.write_bytes(b"x")
    with pytest.raises(InputError, match=r"the pictures of all votes in .* are damaged"):
        read_choices(store)


def test_large_pictures_are_looked_at_one_by_one(monkeypatch):
    seen = []

    def features(images, prompts):
        seen.append(len(images))
        return images.mean((2, 3))

    choices = [Choice("a", torch.rand(3, 64, 64), torch.rand(3, 64, 64)) for _ in range(3)]
    whole = features_of_choices(features, choices)
    assert seen == [6]
    seen.clear()
    monkeypatch.setattr(pictures, "PIXELS", 2 * 64 * 64)
    assert all((a == b).all() for a, b in zip(features_of_choices(features, choices), whole, strict=True))
    assert seen == [2, 2, 2]
    monkeypatch.setattr(pictures, "PIXELS", 1)
    seen.clear()
    pictures.raw_features(features, torch.stack([as_image(c.left) for c in choices]), ["a"] * 3)
    assert seen == [1, 1, 1]

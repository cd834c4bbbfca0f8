"""What trackers receive, read back by their own readers; a tracker that fails ends nothing."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import types

import numpy as np
import pytest
from support.loop import rows, run

from palate.cli.run_folder import remove_run
from palate.recipe import GuardSettings
from palate.train import tracking
from palate.train.tracking import Trackers

GUARD = GuardSettings(every=2, prompts=4)
OPTIONS = {"steps": 3, "preview_every": 3, "preview_prompts": 4, "guard": GUARD,
           "check": lambda model, prompts, ids: {"heldout": 1.0, "concept": 0.5}}  # fmt: skip


@pytest.mark.slow
def test_tensorboard_holds_the_metrics_previews_and_verdicts(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, tracker=["tensorboard"], **OPTIONS)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    logged = {row["step"]: row["loss"] for row in rows(tmp_path) if row["event"] == "step"}
    assert {event.step: pytest.approx(event.value) for event in found.Scalars("loss")} == logged
    assert [(event.step, event.value) for event in found.Scalars("guard/concept")] == [(0, 0.5), (2, 0.5)]
    assert [event.step for event in found.Images("previews")] == [0, 3]
    verdicts = found.Tensors("events/guard/text_summary")
    assert [event.step for event in verdicts] == [0, 2] and b"ok" in verdicts[1].tensor_proto.string_val[0]
    assert b"| heldout | 1.0 | 1.0 |" in found.Tensors("result/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.slow
def test_a_step_that_is_made_again_after_a_resume_stands_once_in_tensorboard(tmp_path):
    """A run that died at step 4 goes on from its checkpoint of step 2; the steps between are of no run."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at, losses in ((0, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}), (2, {3: 30.0})):
        tracker = tracking.TensorBoard(tmp_path, {"lr": 1.0}, resumed_at=resumed_at)
        for step, loss in losses.items():
            tracker.scalars(step, {"loss": loss})
        tracker.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.slow
def test_wandb_offline_keeps_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    run(tmp_path, tracker=["wandb"], **OPTIONS)
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 1000
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/previews_*.png"))) == 2


@pytest.mark.slow
def test_trackio_keeps_a_run_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    _, outcome = run(tmp_path / "mine", tracker=["trackio"], **OPTIONS)
    assert outcome.reason == "finished"
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "palate.db")) as database:
        kept = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by id")]
    losses = [row["loss"] for row in rows(tmp_path / "mine") if row["event"] == "step"]
    assert [row["loss"] for row in kept if "loss" in row] == pytest.approx(losses)
    assert any("result" in row for row in kept)
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 2


def test_trackio_is_called_as_its_documentation_says(tmp_path, monkeypatch):
    """With the signatures of trackio 0.43, so that a call which it would refuse fails here too."""
    calls = []

    class Run:
        def log(self, metrics: dict, step: int | None = None) -> None:
            calls.append((step, metrics))

        def finish(self) -> None:
            calls.append("finish")

    def init(project: str, name: str | None = None, *, config: dict | None = None, resume: str = "never") -> Run:
        calls.append((project, name, config, resume))
        return Run()

    class Image:
        def __init__(self, value, caption: str | None = None):
            assert value.dtype == np.uint8 and value.shape[2] == 3

    class Table:
        def __init__(self, columns: list[str] | None = None, data: list[list] | None = None):
            self.columns, self.data = columns, data

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init, Image=Image, Table=Table))
    (tmp_path / "mine").mkdir()
    tracker = tracking.trackio(tmp_path / "mine", {"lr": 1.0})
    tracker.scalars(1, {"loss": 2.0})
    tracker.image(1, "previews", np.zeros((2, 2, 3), np.uint8))
    tracker.table(2, "result", [{"metric": "reward", "value": 3.0}, {"metric": "concept", "value": None}])
    tracker.close()
    (project, name, *rest), first = calls[:2]
    assert (project, name.rpartition("-")[0], rest) == ("palate", "mine", [{"lr": 1.0}, "allow"])
    assert first == (1, {"loss": 2.0}) and calls[-1] == "finish"
    assert isinstance(calls[2][1]["previews"], Image)
    table = calls[3][1]["result"]
    assert (table.columns, table.data) == (["metric", "value"], [["reward", 3.0], ["concept", None]])


@pytest.mark.parametrize(("tracker", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_is_the_same_to_a_service_and_a_fresh_one_is_another(tmp_path, monkeypatch, tracker, key):
    """Both are known there by one text, and both services go on with a run whose text they have."""
    opened: list[str] = []

    class Run:
        def log(self, metrics: dict, step: int | None = None) -> None: ...
        def finish(self) -> None: ...

    def init(**told) -> Run:
        assert told["resume"] == "allow"
        opened.append(told[key])
        return Run()

    monkeypatch.setitem(sys.modules, tracker, types.SimpleNamespace(init=init))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    run(tmp_path / "mine", tracker=[tracker], steps=1)
    run(tmp_path / "mine", tracker=[tracker], steps=2, resume=True)
    remove_run(tmp_path / "mine")  # as --fresh does
    run(tmp_path / "mine", tracker=[tracker], steps=1)
    run(tmp_path / "other" / "mine", tracker=[tracker], steps=1)
    assert opened[0] == opened[1] and len(set(opened)) == 3


def test_a_run_of_before_ids_were_kept_stays_the_same_to_weights_and_biases(tmp_path):
    (tmp_path / "wandb").mkdir()
    assert tracking.wandb_id(tmp_path) == tracking.json_digest(str(tmp_path))[:16] == tracking.wandb_id(tmp_path)


class Recording:
    def __init__(self, fails_at: str = ""):
        self.heard, self.fails_at = [], fails_at

    def __getattr__(self, name):
        def hear(*values):
            if name == self.fails_at:
                raise ConnectionError("the service is down")
            self.heard.append((name, *values))

        return hear


def test_rows_become_scalars_and_sentences():
    tracker = Recording()
    trackers = Trackers({"x": tracker}, print)
    trackers.row({"step": 3, "event": "step", "loss": 0.5, "skipped": "nan"})
    trackers.row({"step": 4, "event": "guard", "verdict": "ok", "heldout": 1, "best_step": 4})
    trackers.row({"step": 5, "event": "steer", "positive": ["3d", "flat"], "negative": None})
    assert tracker.heard == [
        ("scalars", 3, {"loss": 0.5}), ("event", 3, "events/step", "skipped: nan"),
        ("scalars", 4, {"guard/heldout": 1.0}), ("event", 4, "events/guard", "verdict: ok"),
        ("event", 5, "events/steer", "positive: 3d, flat"),
    ]  # fmt: skip


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on():
    said: list[str] = []
    good = Recording()
    trackers = Trackers({"bad": Recording("scalars"), "good": good}, said.append)
    for step in (1, 2):
        trackers.row({"step": step, "event": "step", "loss": 1.0})
    trackers.image(2, "previews", np.zeros((2, 2, 3), np.uint8))
    assert len(good.heard) == 3 and len(said) == 1 and "the service is down" in said[0]


def test_trackers_are_closed_when_a_run_breaks_off(tmp_path, monkeypatch):
    """Some services keep what they were told last in memory until then."""
    tracker = Recording()
    monkeypatch.setitem(tracking.TRACKERS, "wandb", lambda *_, **__: tracker)
    with (
        pytest.raises(KeyboardInterrupt),
        tracking.tracking(["wandb"], tmp_path, {}, resumed_at=0, note=pytest.fail) as trackers,
    ):
        trackers.row({"step": 1, "event": "step", "loss": 1.0})
        raise KeyboardInterrupt
    assert [name for name, *_ in tracker.heard] == ["scalars", "close"]


def test_a_tracker_that_cannot_be_opened_or_is_missing_is_told(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError("no login")

    monkeypatch.setitem(tracking.TRACKERS, "wandb", broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    _, outcome = run(tmp_path / "a", tracker=["wandb"], steps=1)
    assert outcome.reason == "finished"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"trainer.tracker: wandb is not installed; run `pip install 'palate\[wandb\]'`"
    ):
        run(tmp_path / "b", tracker=["wandb"], steps=1)
    with pytest.raises(ValueError, match="tracker"):
        run(tmp_path / "c", tracker=["mlflow"], steps=1)

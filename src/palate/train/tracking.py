"""Trackers: what a run logs, sent on to TensorBoard, Weights & Biases or Trackio. metrics.jsonl stays the truth.

A tracker that fails is reported once and then left out: no service may end a training.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from palate.runtime.errors import InputError
from palate.runtime.files import json_digest, parse_json, write_atomically

KEPT = "tracking.json"  # in the run's folder, under which id its services know it: {"id": ...}

Scalars = Mapping[str, float]
Rows = Sequence[Mapping[str, Any]]


class Tracker(Protocol):
    """What a run is shown in. Steps count from 1; 0 is the base model."""

    def scalars(self, step: int, values: Scalars) -> None: ...

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """uint8 pixels (H, W, 3)."""

    def event(self, step: int, name: str, text: str) -> None:
        """A sentence about a step, as the guard's verdict."""

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Rows with the same keys."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard; `tensorboard --logdir runs` shows all runs."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, resumed_at: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)
        if not resumed_at:
            self.writer.add_text("config", _markdown([config]), 0)

    def scalars(self, step: int, values: Scalars) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def event(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        self.writer.add_text(name, _markdown(rows), step)

    def close(self) -> None:
        self.writer.close()


class Service:
    """A run of the project "palate" at a service: Weights & Biases and Trackio are called alike."""

    def __init__(self, library: Any, run: Any):
        self.library, self.run = library, run

    def scalars(self, step: int, values: Scalars) -> None:
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.run.log({name: self.library.Image(pixels)}, step=step)

    def event(self, step: int, name: str, text: str) -> None:
        self.run.log({name: text}, step=step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        columns = list(rows[0]) if rows else []
        data = [[row.get(key) for key in columns] for row in rows]
        self.run.log({name: self.library.Table(columns=columns, data=data)}, step=step)

    def close(self) -> None:
        self.run.finish()


def weights_and_biases(folder: Path, config: Mapping[str, Any], *, resumed_at: int = 0) -> Service:
    """WANDB_MODE=offline keeps the run in RUN/wandb, WANDB_PROJECT names another project."""
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "palate"),
        name=folder.absolute().name,
        id=wandb_id(folder),
        dir=str(folder),
        config=dict(config),
        resume="allow",
    )
    return Service(wandb, run)


def trackio(folder: Path, config: Mapping[str, Any], *, resumed_at: int = 0) -> Service:
    """On this machine; `trackio show` opens the run, TRACKIO_DIR says where it is kept. It is known by its name alone,
    so that this ends in the run's id."""
    library = importlib.import_module("trackio")
    run = library.init(
        project=os.environ.get("TRACKIO_PROJECT", "palate"),
        name=f"{folder.absolute().name}-{run_id(folder)[:8]}",
        config=dict(config),
        resume="allow",
    )
    return Service(library, run)


def wandb_id(folder: Path) -> str:
    """`run_id`; of a run that began before ids were kept, and whose files are in the folder, the one that it has."""
    if (folder / "wandb").is_dir() and not (folder / KEPT).is_file():
        _keep_id(folder, json_digest(str(folder.absolute()))[:16])
    return run_id(folder)


def run_id(folder: Path) -> str:
    """16 hexadecimal digits that a run has as long as its folder: a resumed one is the same run to a service, one that
    replaces it (--fresh) is another."""
    file = folder / KEPT
    if not file.is_file():
        _keep_id(folder, secrets.token_hex(8))
    kept = parse_json(file.read_bytes())
    if not (isinstance(kept, dict) and isinstance(kept.get("id"), str)):
        raise InputError(f'{file}: expected {{"id": TEXT}}; delete it, and the run begins anew in the tracker')
    return kept["id"]


def _keep_id(folder: Path, text: str) -> None:
    write_atomically(folder / KEPT, json.dumps({"id": text}).encode())


TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": weights_and_biases,
    "trackio": trackio,
}


class Trackers:
    """All trackers of a run; usable as one."""

    def __init__(self, found: Mapping[str, Tracker], note: Callable[[str], None]):
        self.found, self.note = dict(found), note

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: numbers as scalars, everything else as a sentence."""
        step, event = int(row["step"]), str(row["event"])
        numbers = {
            key: float(value)
            for key, value in row.items()
            if key not in ("step", "best_step") and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        prefix = "" if event == "step" else f"{event}/"
        if numbers:
            self._each(lambda tracker: tracker.scalars(step, {prefix + key: value for key, value in numbers.items()}))
        texts = {k: v for k, v in row.items() if k != "event" and isinstance(v, (str, list)) and v}
        if texts:
            said = "; ".join(f"{k}: {v if isinstance(v, str) else ', '.join(map(str, v))}" for k, v in texts.items())
            self._each(lambda tracker: tracker.event(step, f"events/{event}", said))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._each(lambda tracker: tracker.image(step, name, pixels))

    def table(self, step: int, name: str, rows: Rows) -> None:
        self._each(lambda tracker: tracker.table(step, name, rows))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.found.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever a service raises, the training goes on
                del self.found[name]
                self.note(f"the tracker {name} has failed and is left out from now on: {type(error).__name__}: {error}")


def check_trackers(names: Sequence[str]) -> None:
    """InputError: a tracker is unknown, or its package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"trainer.tracker: got {name!r}; expected some of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"trainer.tracker: {name} is not installed; run `pip install 'palate[{name}]'`")


@contextlib.contextmanager
def tracking(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], *, resumed_at: int, note: Callable[[str], None]
) -> Iterator[Trackers]:
    """Inside, the trackers are open. One that cannot be opened is reported and left out."""
    found: dict[str, Tracker] = {}
    for name in names:
        try:
            found[name] = TRACKERS[name](folder, config, resumed_at=resumed_at)
        except Exception as error:  # no network, no login, no room: the run itself needs none of them
            note(f"the tracker {name} cannot be opened: {type(error).__name__}: {error}")
    trackers = Trackers(found, note)
    try:
        yield trackers
    finally:
        trackers.close()


def _markdown(rows: Rows) -> str:
    """A table as TensorBoard renders it."""
    keys = list(rows[0]) if rows else []
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines)

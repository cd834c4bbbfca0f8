"""Going back to an earlier step of a run: everything later is taken away, as if it had been stopped there."""

from __future__ import annotations

from pathlib import Path

from palate.core import Model
from palate.runs.folder import trained_model
from palate.runs.result import adapter_of, write_adapter
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.exclusive import exclusive
from palate.runtime.files import remove_folder
from palate.runtime.result import forget_adapter
from palate.runtime.runlock import owned
from palate.runtime.runlog import METRICS, cut_for_good, read_metrics
from palate.studio.artist import LOADING
from palate.train.steering import CONTROL


def go_back(folder: Path, step: int) -> None:
    """Make `step` the newest of the run in `folder`: its weights become the result.

    InputError: there is no checkpoint of that step, or a process trains the run. CheckpointError: it is damaged; then
    nothing is taken away. Later checkpoints, pictures, metrics and words are deleted, words that wait for the next of
    the later steps too.
    """
    checkpoints = folder / "checkpoints"
    with exclusive(folder), owned(folder):  # owned by this process, and of its threads by this one
        if step not in checkpoint.steps(checkpoints):
            raise InputError(f"step {step} of {folder.name} was not kept; kept are {checkpoint.steps(checkpoints)}")
        checkpoint.load(checkpoints / checkpoint.name(step))  # every byte verified before anything goes
        forget_adapter(folder)
        for kind in ("checkpoints", "samples"):
            for later in checkpoint.steps(folder / kind):
                if later > step:
                    remove_folder(folder / kind / checkpoint.name(later))
        if any(row["step"] > step for row in read_metrics(folder / METRICS)):
            (folder / CONTROL).unlink(missing_ok=True)
        cut_for_good(folder, step)
        write_adapter(folder, _result(folder))


def adapter_now(folder: Path) -> Path:
    """The adapter of the run's result; written first where the run was stopped without one. InputError: it trains."""
    with exclusive(folder):
        return adapter_of(folder, lambda: _result(folder))


def _result(folder: Path) -> Model:
    with LOADING:
        return trained_model(folder, warn=lambda text: None)[0]

"""A run's result, `runtime.result`, as weights: one answer for sample, evaluate, export, report and the studio.

RUN/adapter is a copy of it for other programs: written when a run ends, taken away when it goes on, and made again here
when it is asked for and missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from palate.core import Model, SavesAdapter
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import new_folder
from palate.runtime.result import ADAPTER, result_of
from palate.runtime.runlock import owned, require_free
from palate.train import restore_result

Warn = Callable[[str], None]


def load_result(model: Model, run: Path, *, warn: Warn) -> int:
    """Put the run's result into `model`; returns its step. `warn` gets a sentence for each damaged checkpoint that is
    passed over, and for a process that still trains the run. CheckpointError: none, or one of other base weights."""
    found = result_of(run)
    if found is None:
        raise CheckpointError(f"{run} has no result yet: it holds no checkpoint. Train it first, or wait for its first")
    step = restore_result(model, found.folder, warn=warn)
    if found.status.state == "running" and found.status.owner:
        warn(f"{run} is being trained by {found.status.owner.text()}; these are its weights of step {step}")
    return step


def adapter_of(run: Path, build: Callable[[], Model]) -> Path:
    """RUN/adapter, written from the result where it is missing; `build` makes the run's model with the result in it.

    InputError: another process trains the run, nothing was saved so far, or its model has no adapter.
    """
    require_free(run, "its result changes with every step")
    folder = run / ADAPTER
    if folder.is_dir():
        return folder
    if result_of(run) is None:
        raise InputError(f"{run} has no result yet: it holds no checkpoint. Train it first")
    with owned(run):
        write_adapter(run, build())
    return folder


def write_adapter(run: Path, model: Model) -> None:
    """Write RUN/adapter from a model that holds the run's result. InputError: it has no adapter."""
    if not isinstance(model, SavesAdapter):
        raise InputError(f"{run}: its model has no adapter to write")
    with new_folder(run / ADAPTER) as temporary:
        model.save_adapter(temporary)

"""Going back to an earlier step of a run: everything later is taken away, as if it had been stopped there."""

from __future__ import annotations

import shutil
from pathlib import Path

from palate import recipe as recipes
from palate.core import SavesAdapter
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.files import new_folder
from palate.runtime.runlock import owned
from palate.runtime.runlog import rewind
from palate.studio.artist import LOADING
from palate.train import restore_result


def go_back(folder: Path, step: int) -> None:
    """Make `step` the newest of the run in `folder`: its weights become the result.

    InputError: there is no checkpoint of that step, or a process trains the run. CheckpointError: it is damaged; then
    nothing is taken away. Later checkpoints, pictures and metrics are deleted.
    """
    checkpoints = folder / "checkpoints"
    with owned(folder):
        if step not in checkpoint.steps(checkpoints):
            raise InputError(f"step {step} of {folder.name} was not kept; kept are {checkpoint.steps(checkpoints)}")
        checkpoint.load(checkpoints / checkpoint.name(step))  # every byte verified before anything goes
        for kind in ("checkpoints", "samples"):
            for later in checkpoint.steps(folder / kind):
                if later > step:
                    shutil.rmtree(folder / kind / checkpoint.name(later))
        rewind(folder, step)
        _write_adapter(folder)


def make_result(folder: Path) -> None:
    """A run that was stopped has checkpoints and no adapter: write that of the newest one."""
    with owned(folder):
        _write_adapter(folder)


def _write_adapter(folder: Path) -> None:
    """The LoRA of the newest checkpoint as the run's result."""
    recipe = recipes.read(str(folder / "recipe.yaml"))
    with LOADING:
        model = recipes.build_model(recipe)
    if not isinstance(model, SavesAdapter):
        raise InputError(f"{folder.name}: its model has no adapter to write")
    restore_result(model, folder, warn=lambda text: None)
    with new_folder(folder / "adapter") as temporary:
        model.save_adapter(temporary)

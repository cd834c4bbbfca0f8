"""Going back to an earlier step of a run: everything later is taken away, as if it had been stopped there."""

from __future__ import annotations

import shutil
from pathlib import Path

from palate import recipe as recipes
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.runlog import rewind
from palate.train import restore_result


def go_back(folder: Path, step: int) -> None:
    """Make `step` the newest of the run in `folder`: its weights become the result. No process may be training it.

    InputError: there is no good checkpoint of that step. Later checkpoints, pictures and metrics are deleted.
    """
    checkpoints = folder / "checkpoints"
    if step not in checkpoint.steps(checkpoints):
        raise InputError(f"step {step} of {folder.name} was not kept; kept are {checkpoint.steps(checkpoints)}")
    checkpoint.load(checkpoints / checkpoint.name(step))  # every byte verified before anything goes
    for kind in ("checkpoints", "samples"):
        for later in checkpoint.steps(folder / kind):
            if later > step:
                shutil.rmtree(folder / kind / checkpoint.name(later))
    rewind(folder, step)
    recipe = recipes.read(str(folder / "recipe.yaml"))
    model = recipes.build_model(recipe)
    restore_result(model, folder, warn=lambda text: None)
    write_adapter(model, folder)


def write_adapter(model: object, folder: Path) -> None:
    """The LoRA of the model's present weights as the run's result."""
    temporary = folder / ".tmp-adapter"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_adapter(temporary)  # type: ignore[attr-defined]
    if (folder / "adapter").is_dir():
        shutil.rmtree(folder / "adapter")
    temporary.replace(folder / "adapter")


def make_result(folder: Path) -> None:
    """A run that was stopped has checkpoints and no adapter: write that of the newest one."""
    recipe = recipes.read(str(folder / "recipe.yaml"))
    model = recipes.build_model(recipe)
    restore_result(model, folder, warn=lambda text: None)
    write_adapter(model, folder)

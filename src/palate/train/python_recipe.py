"""The recipe.yaml of a run that Python began: it says what can be said, and names the objects that it cannot rebuild.

Reports read it as any other. What has to rebuild the objects (resume, sample, evaluate on the command line) refuses it
with the way that works, which is to pass the objects.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from palate.core import Algorithm, Model, Reward
from palate.recipe import SampleSettings, TrainerSettings, text_of
from palate.recipe.names import PYTHON
from palate.recipe.reader import yaml_of
from palate.runtime.files import in_shell

HEAD = "# Begun from Python: the parts named python:... are objects. Pass them: palate.load(folder, model=...)\n"


def describe_job(
    model: Model, algorithm: Algorithm, reward: Reward, prompts: list[str], folder: str,
    trainer: TrainerSettings, sample: SampleSettings,
) -> str:  # fmt: skip
    """The YAML text."""
    settings = vars(algorithm).get("settings") if "__dict__" in dir(algorithm) else None  # what it lacks is said later
    own = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) and not isinstance(settings, type) else {}
    tree = {
        "run": {"folder": folder},
        "model": {"name": PYTHON + _name(model)},
        "algorithm": {"name": PYTHON + _name(algorithm), **own},
        "reward": {"name": PYTHON + _name(reward)},
        "prompts": {"list": prompts},
        "trainer": dataclasses.asdict(trainer),
        "sample": dataclasses.asdict(sample),
    }
    plain = json.loads(json.dumps(tree, default=str))
    return HEAD + yaml_of(plain)


def from_python(folder: Path) -> bool:
    """Whether the run's recipe.yaml is such a description."""
    file = folder / "recipe.yaml"
    return file.is_file() and text_of(str(file)).startswith(HEAD)


def way_on(folder: Path, steps: int | None = None) -> str:
    """The command, or the call, that continues a run; with so many steps in all."""
    if (folder / "recipe.yaml").is_file() and not from_python(folder):
        return f"`palate resume {in_shell(folder)}{f' trainer.steps={steps}' if steps else ''}`"
    return f"train(..., resume=True{f', steps={steps}' if steps else ''})"


def _name(thing: Any) -> str:
    """module.Class of an object, module.function of a function."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"

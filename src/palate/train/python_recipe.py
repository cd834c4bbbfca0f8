"""The recipe.yaml of a run that Python began: it says what can be said, and names the objects that it cannot rebuild.

Reports read it as any other. What has to rebuild the objects (resume, sample, evaluate on the command line) refuses it
with the way that works, which is to pass the objects.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.recipe import text_of
from palate.recipe.names import PYTHON
from palate.recipe.reader import read_yaml, yaml_of
from palate.runtime.errors import InputError
from palate.runtime.files import in_shell, json_digest
from palate.train.state import tensors_digest

if TYPE_CHECKING:
    from palate.train.job import Job

logger = logging.getLogger("palate")
RECIPE = "recipe.yaml"
LISTED = 64 * 1024  # characters of prompts that are written down one by one
HEAD = "# Begun from Python: the parts named python:... are objects. Pass them: palate.load(folder, model=...)\n"


def describe_job(job: Job) -> str:
    """The YAML text."""
    algorithm = job.algorithm
    settings = vars(algorithm).get("settings") if "__dict__" in dir(algorithm) else None  # what it lacks is said later
    own = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) and not isinstance(settings, type) else {}
    tree = {
        "run": {"folder": str(job.folder)},
        "model": {"name": PYTHON + _name(job.model)},
        "algorithm": {"name": PYTHON + _name(algorithm), **own},
        "reward": {"name": PYTHON + _name(job.reward)},
        "prompts": _prompts(job),
        "trainer": dataclasses.asdict(job.trainer),
        "sample": dataclasses.asdict(job.sample),
    }
    plain = json.loads(json.dumps(tree, default=lambda thing: _name(thing) if callable(thing) else str(thing)))
    return HEAD + yaml_of(plain)


def _prompts(job: Job) -> dict[str, Any]:
    """As many of the prompts as a page of text holds, a digest of all, and what was given beside them."""
    ends = itertools.accumulate(len(json.dumps(prompt)) for prompt in job.prompts)
    return {
        "list": job.prompts[: sum(end <= LISTED for end in ends)],
        "count": len(job.prompts),
        "digest": json_digest(job.prompts),
        "latents": None if job.latents is None else tensors_digest({"": [job.latents]}),
        "sizes": list(job.sizes),
    }


def check_same(job: Job) -> None:
    """InputError: the run in the job's folder was begun from Python with other settings, words or prompts. A warning:
    with an object of another class, which may be the same one with a line added to it.

    What the run's version of Palate did not write down, and what is written by its place in memory, is not compared.
    """
    if not from_python(job.folder):
        return
    before = read_yaml(text_of(str(job.folder / RECIPE)), "recipe")
    if "digest" not in before["prompts"]:  # an earlier version listed all of them
        before["prompts"]["digest"] = json_digest(before["prompts"]["list"])
    now = read_yaml(describe_job(job), "recipe")
    different = []
    for section in ("model", "algorithm", "reward", "prompts"):
        then, given = before[section], now[section]
        for key in sorted(then.keys() & given.keys() - {"list", "count"}):
            if then[key] == given[key] or " at 0x" in str(then[key]):
                continue
            told = f"{section}.{key} (then {_short(then[key])}, now {_short(given[key])})"
            if key != "name":
                different.append(told)
            elif then[key].rpartition(".")[2] != given[key].rpartition(".")[2]:  # a file may be run or imported
                logger.warning(f"{job.folder} was begun with another {told}")
    if different:
        raise InputError(
            f"{job.folder} was begun with another {', another '.join(different)}; give what it was begun with, or "
            "choose another folder for a new run. Words are changed by palate.steer while it runs"
        )


def _short(value: Any) -> str:
    text = str(value).removeprefix(PYTHON)
    return text if len(text) <= 60 else f"{text[:50]}..."


def from_python(folder: Path) -> bool:
    """Whether the run's recipe.yaml is such a description."""
    file = folder / RECIPE
    return file.is_file() and text_of(str(file)).startswith(HEAD)


def way_on(folder: Path, steps: int | None = None) -> str:
    """The command, or the call, that continues a run; with so many steps in all."""
    if (folder / RECIPE).is_file() and not from_python(folder):
        return f"`palate resume {in_shell(folder)}{f' trainer.steps={steps}' if steps else ''}`"
    return f"train(..., resume=True{f', steps={steps}' if steps else ''})"


def _name(thing: Any) -> str:
    """module.Class of an object, module.function of a function."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"

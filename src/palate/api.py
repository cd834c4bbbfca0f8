"""Finished runs from Python: `palate.load`, `palate.evaluate`, `palate.report`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from palate.core import Algorithm, DrawsOwnSamples, Model, Reward, Sampler
from palate.evaluate import EvaluationPanel, generate, quantise
from palate.models.latents import ImageSize
from palate.models.sizes import at_size
from palate.recipe import SampleSettings, builder
from palate.recipe.algorithm import build_algorithm
from palate.recipe.names import PYTHON
from palate.report import write_report
from palate.runs.evaluation import evaluate_run
from palate.runs.folder import RunFolder
from palate.runs.python_run import PythonRun, begun_in_python
from palate.runs.result import load_result
from palate.runs.stored import read_recipe
from palate.runtime.errors import InputError
from palate.runtime.files import write_file
from palate.runtime.images import encode_png, grid

logger = logging.getLogger("palate")


@dataclass(frozen=True)
class LoadedRun:
    """A run's model with the weights that are its result now, and how images are drawn from it."""

    folder: Path
    model: Model
    step: int | None  # of the checkpoint; None: of a run that a recipe describes, whose loader chose it
    sampler: Sampler | None = None
    how: SampleSettings = field(default_factory=SampleSettings)  # the recipe's section `sample`

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int] = (0,), *, steps: int | None = None,
        guidance: float | None = None, weights: str = "policy", image_size: ImageSize | None = None,
    ) -> Images:  # fmt: skip
        """len(prompts) x len(seeds) images, all seeds of the first prompt first; weights="reference" is the base.
        steps, guidance, image_size: None = those of `sample` in the run's recipe, as `palate sample` and `palate
        evaluate` draw, else the model's own. InputError: steps or guidance for a generator, which has its own.

        The noise is a function of (seed, index of the prompt), so base and result can be compared in pairs.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        sampler = self.sampler if weights == "policy" else None
        if sampler is not None and (steps is not None or guidance is not None):
            raise InputError("steps, guidance: a generator draws as it was trained; leave them out")
        steps = self.how.steps if steps is None else steps
        guidance = self.how.guidance if guidance is None else guidance
        with at_size(self.model, self.how.image_size if image_size is None else image_size, "image_size"):
            drawn = generate(
                self.model, prompts, seeds, steps=steps, guidance=guidance, weights=weights, sampler=sampler
            )
        return Images(quantise(drawn), len(seeds))


@dataclass(frozen=True)
class Images:
    """Images (N, 3, H, W) in [0, 1] that a notebook shows as a grid."""

    tensor: Tensor
    columns: int = 4

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, row: int) -> Tensor:
        return self.tensor[row]

    def save(self, path: str | Path) -> None:
        """Write all of them as one PNG."""
        write_file(Path(path), self._repr_png_())

    def _repr_png_(self) -> bytes:
        return encode_png(grid(self.tensor, self.columns, gap=2))


def load(run: str | Path, *, model: Model | None = None, algorithm: Any = None) -> LoadedRun:
    """The result of a run: its newest good checkpoint, averaged where an average is kept.

    model: an object as the run was begun with, for a run of Python's own parts; its weights are replaced. algorithm:
    likewise, needed where it draws samples in its own way. InputError: not a run, or a part has to be passed.
    """
    folder, own = Path(run), RunFolder(run)
    if model is not None:
        step = load_result(model, folder, warn=logger.warning)
        sampler = algorithm.sampler if isinstance(algorithm, DrawsOwnSamples) else _sampler_of(folder)
        return LoadedRun(folder, model, step, sampler, SampleSettings(**(own.tree.get("sample") or {})))
    if begun_in_python(own):
        raise InputError(f"{folder} was begun from Python; pass the model: palate.load({str(folder)!r}, model=...)")
    found, sampler = own.model(logger.warning)
    return LoadedRun(folder, found, None, sampler, own.recipe.sample)


def evaluate(
    run: str | Path, *, model: Model | None = None, algorithm: Algorithm | None = None, reward: Reward | None = None,
    prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None, panel: EvaluationPanel | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a run's result against its base, and write and return evaluation.json; `palate evaluate` in Python.

    model, algorithm, reward: the objects of a run that Python began; the model's weights are replaced, the algorithm is
    needed where it draws in its own way, and the reward is what counts as optimised. None = what the recipe names.
    prompts, seeds, panel: None = what its section `evaluate` says; of a run that Python began 64 of its prompts, four
    seeds, and the embedded model's judges. `palate.runs.evaluate_run(..., stored=True)` judges images that lie there.
    InputError: not a run, or an object has to be passed.
    """
    folder = RunFolder(run)
    sampler = algorithm.sampler if isinstance(algorithm, DrawsOwnSamples) else _sampler_of(folder.path)
    if begun_in_python(folder):
        if model is None:
            raise InputError(f"{run} was begun from Python; pass the model: palate.evaluate({str(run)!r}, model=...)")
        folder = own = PythonRun(run, model, reward=reward, algorithm=algorithm)
        panel, prompts, seeds = own.panel(panel), prompts or own.prompts(), seeds or own.seeds()
    elif reward is not None:
        raise InputError(f"reward: {run} names its own in its recipe; leave it out")
    if model is not None:
        load_result(model, folder.path, warn=logger.warning)
    return evaluate_run(folder, model=model, prompts=prompts, seeds=seeds, panel=panel, sampler=sampler)


def _sampler_of(folder: Path) -> Sampler | None:
    """How a run's algorithm draws where it draws in its own way, as far as its recipe names the algorithm."""
    if str((read_recipe(folder).get("algorithm") or {}).get("name", PYTHON)).startswith(PYTHON):
        return None
    return builder.sampler_of(build_algorithm(RunFolder(folder).recipe))


def report(run: str | Path) -> Path:
    """Write the page of a run and return its path; `palate report` in Python."""
    return write_report(Path(run))


__all__ = ["Images", "LoadedRun", "evaluate", "load", "report"]

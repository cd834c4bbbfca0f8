"""`palate.train(...)`: one job from Python's arguments, run to its end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palate.core import Algorithm, GuardMeasure, Model, Reward
from palate.data import listed
from palate.models.latents import ImageSize
from palate.recipe import SampleSettings, TrainerSettings, evenly_spaced
from palate.runtime import distributed
from palate.runtime.errors import InputError
from palate.runtime.runlock import let_go, owned
from palate.runtime.signals import stop_signals
from palate.train.checks import as_judge
from palate.train.job import Job, Outcome, check_settings
from palate.train.loop import Run
from palate.train.python_recipe import check_same, describe_job

logger = logging.getLogger("palate")
_starts: weakref.WeakKeyDictionary[Model, list[float]] = weakref.WeakKeyDictionary()  # sums of first parameters


def train(
    model: Model,
    algorithm: Algorithm,
    reward: Reward,
    prompts: Sequence[str],
    *,
    folder: str | Path,
    trainer: TrainerSettings | None = None,
    preview: Sequence[str] | None = None,
    sample: SampleSettings | None = None,
    latents: Tensor | None = None,
    sizes: Sequence[ImageSize] = (),
    check: GuardMeasure | None = None,
    resume: bool = False,
    progress: bool = True,
    **changes: Any,
) -> Outcome:
    """Train `model` in place and write everything into `folder`; returns how the run ended: `reason` ("finished",
    "signal" or "guard: ..."), `step` and `exit_code`, 0 unless a signal stopped it.

    folder: of the run; one that holds a run is refused, unless `resume`, which goes on from its newest checkpoint, or
    it has made no step. With `ema_decay` the result is the average, which `palate.load(folder, model=...)` puts into a
    model; `model` itself keeps the last weights. progress: a line on the terminal.
    trainer: the settings of the loop; `changes` are fields of it by name, as `steps=20, lr=1e-4` (TrainerSettings has
    them all: 40 steps of 16 samples at 1e-5 where nothing is said). Without `trainer`
    the guard is off unless `guard=GuardSettings(...)` is given. preview: prompts of the previews and, all of them, of
    the guard (None = evenly spaced over `prompts`); sample: how previews are drawn. latents (N, C, h, w): clean latents
    of N real images captioned by `prompts` (offline training). sizes: image sizes, of which every step draws one.
    check: what the guard measures (None = with judges for the embedded model, `palate.evaluate.monitor` for any other).
    Inside `palate.runtime.distributed.process_group` every rank calls this with the same arguments, and `batch_size` is
    what all of them work on together. InputError: what was given cannot work.
    """
    if not distributed.joined():
        raise InputError(
            "this process is one of several ranks, which do not know one another yet; call train inside "
            "`with palate.runtime.distributed.process_group():`"
        )
    prompts, folder = listed(prompts), Path(folder).expanduser()
    sample, identity = _renamed_options(sample, changes)
    settings = check_settings(trainer, changes)
    how = sample or SampleSettings()
    job = Job(
        model, algorithm, reward, prompts, folder, settings,
        listed(preview) if preview else evenly_spaced(prompts), how, latents, check, identity, sizes=list(sizes),
    )  # fmt: skip
    job.check(resume=resume)
    if check is not None and not settings.guard.every:
        raise InputError("check: the guard is off, so that nothing calls it; add guard=GuardSettings(every=10)")
    if resume:
        check_same(job)
    with torch.enable_grad():  # whatever the caller has set
        return run_job(dataclasses.replace(job, recipe=describe_job(job)), resume=resume, progress=progress)


def run_job(job: Job, *, resume: bool = False, progress: bool = True, goes_on: bool = False) -> Outcome:
    """Run a job to its end, a signal or an error; on several ranks, each calls this with an equal job.

    goes_on: the model is meant to begin with what an earlier job left in it.
    """
    job.check(resume=resume)
    with contextlib.ExitStack() as held, as_judge(job.reward):
        distributed.ranks().on_main(lambda: held.enter_context(owned(job.folder)))
        runs: list[Run] = []
        stop = held.enter_context(stop_signals(lambda number: _answer(runs, number), let_go))
        runs.append(Run(job, progress=progress))
        _warn_of_earlier_training(job.model, runs[0], resume or goes_on)
        try:
            return runs[0].go(stop, resume=resume)
        except BaseException:
            runs[0].saver.take_back()
            raise


def _warn_of_earlier_training(model: Model, run: Run, meant: bool) -> None:
    """Three seeds in a loop are not three seeds if each begins where the one before ended."""
    now = [float(p.detach().double().sum()) for ps in run.weights.parameters.values() for p in ps]
    try:
        start = _starts.setdefault(model, now)
    except TypeError:  # an object without a weak reference or a hash
        return
    if start != now and not meant:
        logger.warning(
            "this model object was trained before and starts from those weights; for a new start call its reset(), or "
            "load it again"
        )


def _answer(runs: Sequence[Run], number: int) -> None:
    """Say at once what a signal will do; written past Python's own buffers, which may be in use at this moment."""
    if not runs or not runs[0].progress.visible:
        return
    again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
    text = f"\nfinishing step {runs[0].counters.step + 1}, then saving; {again} ends the run without it\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _renamed_options(sample: SampleSettings | None, changes: dict[str, Any]) -> tuple[SampleSettings | None, str]:
    """Take options out of `changes` that had a place of their own until this release."""
    old = {name: changes.pop(f"sample_{name}") for name in ("steps", "guidance") if f"sample_{name}" in changes}
    if old:
        warnings.warn("sample_steps, sample_guidance are now sample=SampleSettings(...)", DeprecationWarning, 3)
        sample = SampleSettings(**old)
    return sample, changes.pop("identity", None) or ""

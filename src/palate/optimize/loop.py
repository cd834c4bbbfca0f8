"""Online optimisation of a black-box objective: a budget of queries, a surrogate that SQDF maximises.

After the black-box experiment of SQDF (arXiv 2512.04559), which has the structure of SEIKO (arXiv 2402.16359). Round
r = 1, 2, ...:

    1. draw images with the policy as it is, query the objective about each, write everything down    queries.jsonl
    2. fit a surrogate to all answers so far: affine heads on frozen, differentiable features
    3. SQDF maximises the surrogate from the policy as it is; its KL is to the pretrained model       round-01/, a run

The objective is never differentiated. A query is written down before it is made, so that the budget holds and nothing
is asked twice, whatever interrupts the run: a query whose answer was never seen counts as spent.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from palate.core import Algorithm, Sampleable
from palate.data import evenly_spaced
from palate.evaluate.samples import Drawing, steps_and_guidance
from palate.optimize.queries import Queries
from palate.optimize.rounds import Draw, query_round
from palate.optimize.surrogate import Surrogate, fit_surrogate, mean_std
from palate.recipe.settings import OptimizeSettings, SampleSettings, TrainerSettings
from palate.rewards.learned import Features
from palate.rewards.oracles import Oracle
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.files import json_line, new_folder, read_json_lines, write_atomically
from palate.runtime.result import forget_adapter
from palate.train import Job, Outcome, restore_result, run_job


@dataclass(frozen=True)
class Search:
    """Everything that an optimisation is made of; `from_recipe` makes one of a recipe.

    trainer.steps are the updates of one round, with a fresh optimizer and a fresh algorithm (an empty buffer).
    """

    model: Sampleable
    make_algorithm: Callable[[], Algorithm]
    oracle: Oracle
    features: Features
    prompts: Sequence[str]
    folder: Path
    settings: OptimizeSettings
    trainer: TrainerSettings
    sample: SampleSettings = field(default_factory=SampleSettings)
    preview: Sequence[str] = ()  # prompts of the guard and of previews; none: some of `prompts`
    identity: str = ""  # decides, with the queries, whether a round's checkpoints are of this search


def optimize(search: Search, *, progress: bool = True, say: Callable[[str], None] = print) -> Outcome:
    """Spend the budget and train after each round; continues what the folder already holds. The model ends as the
    result. OracleError, InputError and what `palate.train` raises leave everything that was asked in the folder."""
    model, folder, settings, trainer = search.model, search.folder, search.settings, search.trainer
    queries = Queries(folder)
    how = Drawing(search.sample.steps, search.sample.guidance)
    draw = Draw(model, search.prompts, trainer.seed, *steps_and_guidance(model, how))
    for number, size in enumerate(round_sizes(settings.budget, settings.rounds), 1):
        draw.begin(number, size)
        query_round(queries, number, size, draw, search.oracle, settings)
        surrogate, row = _fit(queries, number, search.features, settings, seed=trainer.seed)
        _append_round(folder / "rounds.jsonl", row)
        say(
            f"round {number}: {queries.spent} of {settings.budget} queries, mean answer "
            f"{row.get('oracle', math.nan):.4g}; the surrogate explains {row['explained']:.0%} of the variance"
        )
        round_folder = folder / f"round-{number:02d}"
        resume = bool(checkpoint.steps(round_folder / "checkpoints"))
        if not resume:
            shutil.rmtree(round_folder, ignore_errors=True)
        job = Job(
            model,
            search.make_algorithm(),
            surrogate,
            list(search.prompts),
            round_folder,
            replace(trainer, seed=trainer.seed + number),
            list(search.preview) or evenly_spaced(search.prompts),
            sample=search.sample,
            identity=hashlib.sha256(f"{search.identity}|{number}|{queries.digest(number)}".encode()).hexdigest(),
        )
        forget_adapter(folder)  # of an earlier round
        outcome = run_job(job, resume=resume, progress=progress, goes_on=number > 1)
        if outcome.exit_code:
            return outcome
        restore_result(model, round_folder, warn=logging.getLogger("palate").warning)
    if (round_folder / "adapter").is_dir():
        with new_folder(folder / "adapter") as whole:
            shutil.copytree(round_folder / "adapter", whole, dirs_exist_ok=True)
    return Outcome(folder, queries.spent, "finished", 0)


def _fit(
    queries: Queries, number: int, features: Features, settings: OptimizeSettings, *, seed: int
) -> tuple[Surrogate, dict[str, Any]]:
    """The surrogate of all answers up to round `number`, and that round's row of rounds.jsonl."""
    images, prompts, scores, rounds = queries.evaluated(number)
    if len(scores) < 2:
        failed = [str(row["failed"]).splitlines()[0] for row in queries.rows.values() if row.get("failed")]
        why = f" (the last that failed: {failed[-1]})" if failed else ""
        raise InputError(
            f"only {len(scores)} queries were answered in {queries.spent}{why}; fix the oracle, and "
            "raise optimize.budget in another run.folder"
        )
    # rewards in standard deviations of the base model's own answers: alpha_kl is per one of them
    mean, std = mean_std(scores[rounds == rounds.min()])
    surrogate, fit = fit_surrogate(features, images, prompts, (scores - mean) / std, settings, seed=seed)
    newest = scores[rounds == number]
    row: dict[str, Any] = {"round": number, "spent": queries.spent, "answered": len(scores), **fit}
    if len(newest):
        row |= {"oracle": float(newest.mean()), "oracle_best": float(newest.max())}
    return surrogate, row


def round_sizes(budget: int, rounds: int) -> list[int]:
    """Queries of each round: 1 : 2 : 4 : ..., together exactly `budget`. 15360 in 4 gives 1024, 2048, 4096, 8192.

    InputError when the first round has fewer than the two that a surrogate needs.
    """
    least = 2 * (2 ** min(rounds, 64) - 1)
    if budget < least:
        more = f"expected at least {least}, or fewer optimize.rounds"
        raise InputError(f"optimize.budget = {budget} is too small for {rounds} rounds; {more}")
    ends = [budget * (2**k - 1) // (2**rounds - 1) for k in range(rounds + 1)]
    return [b - a for a, b in itertools.pairwise(ends)]


def _append_round(path: Path, row: dict[str, Any]) -> None:
    """Append the row of a round unless it is there: a resumed run fits the same surrogate again."""
    rows = [known for _, known in read_json_lines(path)] if path.is_file() else []
    if all(known["round"] != row["round"] for known in rows):
        write_atomically(path, b"".join(json_line(each) for each in [*rows, row]))

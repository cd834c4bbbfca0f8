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
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palate.core import Algorithm, Random, Sampleable, TextCached, TwoTower, prompt_order
from palate.data import evenly_spaced
from palate.optimize.oracles import call_with_timeout, load_oracle, validate_scores
from palate.optimize.queries import Queries
from palate.optimize.surrogate import Features, Surrogate, fit_surrogate, mean_std, reward_features
from palate.recipe import builder, reader
from palate.recipe.settings import OptimizeSettings, Recipe, SampleSettings, TrainerSettings
from palate.rewards.load import load_reward
from palate.rewards.oracles import Oracle
from palate.runtime import checkpoint
from palate.runtime.errors import InputError, RewardServiceError
from palate.runtime.files import json_digest, json_line, read_json_lines, write_atomically
from palate.runtime.images import quantise
from palate.sampling import sample
from palate.train import Job, Outcome, restore_result, run_job


class OracleError(RewardServiceError):
    """The black-box objective failed as often as is allowed. Every query and answer so far is in queries.jsonl."""


class _Draw:
    """Draws a round's images with the policy as it is."""

    def __init__(self, model: Sampleable, prompts: Sequence[str], seed: int, steps: int, guidance: float):
        self.model, self.prompts, self.seed, self.steps, self.guidance = model, prompts, seed, steps, guidance
        self.orders: dict[int, list[int]] = {}

    def begin(self, number: int, size: int) -> None:
        """Settle which prompts the `size` images of round `number` have."""
        self.orders[number] = prompt_order(len(self.prompts), self.seed + number, 0, size)

    @torch.no_grad()
    def __call__(self, number: int, ids: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Images (B, 3, H, W) of round `number`, as an 8-bit PNG holds them, and their prompts."""
        prompts = [self.prompts[self.orders[number][i]] for i in ids]
        noise = Random(self.seed, number, ids).normal("query", self.model.latent_shape)
        noise = noise.to(self.model.parameters("policy")[0].device)
        x = sample(self.model, self.model.encode_prompts(prompts), noise, self.steps, guidance=self.guidance)
        return quantise(self.model.decode(x).float().cpu()), prompts


def optimize(
    model: Sampleable,
    make_algorithm: Callable[[], Algorithm],
    oracle: Oracle,
    features: Features,
    prompts: Sequence[str],
    *,
    folder: str | Path,
    settings: OptimizeSettings,
    trainer: TrainerSettings,
    how: SampleSettings | None = None,
    preview: Sequence[str] = (),
    identity: str = "",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Spend the budget and train after each round; continues what `folder` already holds. The model ends as the result.

    trainer.steps are the updates of one round, with a fresh optimizer and a fresh algorithm (an empty buffer).
    OracleError, InputError and what `palate.train` raises leave everything that was asked in `folder`.
    """
    folder = Path(folder)
    queries = Queries(folder)
    how = how or SampleSettings()
    steps = how.steps or model.default_steps
    guidance = model.default_guidance if how.guidance is None else how.guidance
    draw = _Draw(model, prompts, trainer.seed, steps, guidance)
    for number, size in enumerate(round_sizes(settings.budget, settings.rounds), 1):
        draw.begin(number, size)
        query_round(queries, number, size, draw, oracle, settings)
        surrogate, row = _fit(queries, number, features, settings, seed=trainer.seed)
        _append_round(folder / "rounds.jsonl", row)
        say(
            f"round {number}: {queries.spent} of {settings.budget} queries, mean answer "
            f"{row.get('oracle', math.nan):.4g}; the surrogate explains {row['explained']:.0%} of the variance"
        )
        here = folder / f"round-{number:02d}"
        resume = bool(checkpoint.steps(here / "checkpoints"))
        if not resume:
            shutil.rmtree(here, ignore_errors=True)
        job = Job(
            model,
            make_algorithm(),
            surrogate,
            list(prompts),
            here,
            replace(trainer, seed=trainer.seed + number),
            list(preview) or evenly_spaced(prompts),
            sample=how,
            identity=hashlib.sha256(f"{identity}|{number}|{queries.digest(number)}".encode()).hexdigest(),
        )
        outcome = run_job(job, resume=resume, progress=progress)
        if outcome.exit_code:
            return outcome
        restore_result(model, here, warn=say)
    if (here / "adapter").is_dir():
        shutil.copytree(here / "adapter", folder / "adapter", dirs_exist_ok=True)
    return Outcome(folder, queries.spent, "finished", 0)


def _fit(
    queries: Queries, number: int, features: Features, settings: OptimizeSettings, *, seed: int
) -> tuple[Surrogate, dict[str, Any]]:
    """The surrogate of all answers up to round `number`, and that round's row of rounds.jsonl."""
    images, prompts, scores, rounds = queries.evaluated(number)
    if len(scores) < 2:
        raise InputError(
            f"only {len(scores)} queries were answered in {queries.spent}; fix the oracle, and "
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


def query_round(
    queries: Queries,
    number: int,
    size: int,
    draw: Callable[[int, Sequence[int]], tuple[Tensor, list[str]]],
    oracle: Oracle,
    settings: OptimizeSettings,
) -> None:
    """Query the `size` images of a round that no earlier try has answered, never past the budget."""
    pending = [i for i in range(size) if (number, i) not in queries.closed]
    tries: dict[int, int] = {}
    while pending and queries.spent < settings.budget:
        now = pending[: min(settings.oracle.batch, settings.budget - queries.spent)]
        images, prompts = draw(number, now)
        asked = queries.ask(number, now, images, prompts)
        try:
            answer = validate_scores(call_with_timeout(settings.oracle.timeout, oracle, images, prompts), len(now))
            problem = "the answer is not a finite number"
        except Exception as error:  # whatever the user's own code raises is the oracle's failure, told below
            answer, problem = [math.nan] * len(now), f"{type(error).__name__}: {error}"
        queries.answer(asked, answer, problem)
        failed = [i for i, score in zip(now, answer, strict=True) if not math.isfinite(score)]
        for i in failed:
            tries[i] = tries.get(i, 0) + 1
        if any(tries[i] > settings.oracle.retries for i in failed):
            raise OracleError(
                f"the oracle failed {settings.oracle.retries + 1} times on the same images: "
                f"{problem.splitlines()[0]}. {queries.spent} of {settings.budget} queries are spent "
                f"and kept in {queries.log}; fix the oracle and give the same command again"
            )
        pending = failed + pending[len(now) :]


def round_sizes(budget: int, rounds: int) -> list[int]:
    """Questions of each round: 1 : 2 : 4 : ..., together exactly `budget`. 15360 in 4 gives 1024, 2048, 4096, 8192.

    ValueError when the first round has fewer than the two that a surrogate needs.
    """
    least = 2 * (2**rounds - 1)
    if budget < least:
        raise InputError(f"optimize.budget = {budget} is too small for {rounds} rounds; expected at least {least}")
    ends = [budget * (2**k - 1) // (2**rounds - 1) for k in range(rounds + 1)]
    return [b - a for a, b in itertools.pairwise(ends)]


def from_recipe(recipe: Recipe, *, say: Callable[[str], None] = print) -> Outcome:
    """What `palate optimize` does with a checked recipe that has an `optimize` section."""
    folder, settings = Path(recipe.run.folder), recipe.optimize
    assert settings is not None, "asked of a recipe with that section"
    checkpoint.check_space(folder, need=1 << 20)
    oracle = load_oracle(settings.oracle, seed=recipe.trainer.seed)  # the cheap things that can be wrong come first
    round_sizes(settings.budget, settings.rounds)
    stored = folder / "recipe.yaml"
    begun = reader.read(str(stored)) if stored.is_file() else recipe
    if begun.optimize is None:
        raise InputError(f"{folder} holds a run of palate train; choose another run.folder, or replace it with --fresh")
    if identity_of(begun) != identity_of(recipe):
        raise InputError(
            f"{folder} was begun with other settings (its recipe.yaml); only how the oracle is reached "
            "may change. Choose another run.folder, or replace it with --fresh, answers included"
        )
    prompts, preview = builder.prompts_of(recipe)
    builder.check_start(recipe)
    torch.manual_seed(recipe.trainer.seed)  # the LoRA's first weights
    model = builder.build_model(recipe)
    builder.load_consistency(recipe, model)
    if isinstance(model, TextCached):
        model.cache_prompts([*prompts, *preview])
    write_atomically(stored, reader.dump(recipe).encode())
    tower = load_reward(settings.features, settings.features_source)
    assert isinstance(tower, TwoTower), "optimize.features names two-tower rewards only"
    assert isinstance(model, Sampleable), "every family can be sampled"
    return optimize(
        model,
        lambda: builder.build_algorithm(recipe),
        oracle,
        reward_features(tower, prompts),
        prompts,
        folder=folder,
        settings=settings,
        trainer=recipe.trainer,
        how=recipe.sample,
        preview=preview,
        identity=identity_of(recipe),
        say=say,
    )


def identity_of(recipe: Recipe) -> str:
    """Hash of what decides the queries and the updates: not how the oracle is reached, nor how long one waits."""
    tree = reader.as_tree(recipe)
    ways = tree["optimize"]["oracle"]
    oracle = {key: value for key, value in ways.items() if key in ("name", "function", "noise")}
    kind = next((key for key in ("command", "url") if ways[key] is not None), None)
    return json_digest(
        [reader.fingerprint(recipe), recipe.trainer.steps, {**tree["optimize"], "oracle": [kind, oracle]}]
    )


def newest_round(folder: Path) -> Path:
    """The last round's run that holds a checkpoint; ValueError when no round has come so far."""
    rounds = [path for path in sorted(folder.glob("round-*")) if checkpoint.steps(path / "checkpoints")]
    if not rounds:
        raise InputError(f"{folder} holds no trained round yet; continue it with palate optimize")
    return rounds[-1]


def _append_round(path: Path, row: dict[str, Any]) -> None:
    """Append the row of a round unless it is there: a resumed run fits the same surrogate again."""
    rows = [known for _, known in read_json_lines(path)] if path.is_file() else []
    if all(known["round"] != row["round"] for known in rows):
        write_atomically(path, b"".join(json_line(each) for each in [*rows, row]))

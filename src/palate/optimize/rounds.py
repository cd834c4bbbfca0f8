"""A round of queries: which images are drawn, and how the objective is asked about them, never past the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palate.core import Random, Sampleable, prompt_order
from palate.optimize.oracles import call_with_timeout, validate_scores
from palate.optimize.queries import Queries
from palate.recipe.settings import OptimizeSettings
from palate.rewards.oracles import Oracle
from palate.runtime.errors import RewardServiceError
from palate.runtime.images import quantise
from palate.sampling import sample


class OracleError(RewardServiceError):
    """The black-box objective failed as often as is allowed. Every query and answer so far is in queries.jsonl."""


class Draw:
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
        except Exception as error:  # whatever the user's own code raises is the oracle's failure, reported below
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

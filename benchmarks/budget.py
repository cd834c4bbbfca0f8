"""What a run will cost before it is made: prices measured on this machine, times the calls that its method states.

    python benchmarks/budget.py        # the prices, and processor seconds per 1,000 forwards of each method

Prices are processor seconds of one thread, taken in a few seconds each, so that other work beside does not count.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import methods
import torch
from methods import FAIR, FIXED, METHODS
from tasks import needs_gradient

from palate import recipe
from palate.algorithms.table import find

BATCH = 16


class Prices(NamedTuple):
    """Processor seconds: of a denoiser forward of one image, of the backward behind it, of decoding and scoring an
    image, of the gradient of that, and of an image of a look (guided sampling, and everybody's judgement)."""

    forward: float
    backward: float
    score: float
    score_backward: float
    look: float


class Calls(NamedTuple):
    """Of one update, per prompt of the batch."""

    forward: float
    backward: float
    scored: float


def calls_of(method: str) -> Calls:
    """What the method's own `calls_per_update` says, with the settings of the comparison."""
    settings = recipe.read(METHODS[method], [*FAIR, *FIXED.get(method, [])]).algorithm
    module = importlib.import_module(find(settings.name).load_class().__module__)
    told = module.calls_per_update(settings)
    if "predict" not in told:
        return Calls(told["forward"], told["backward"], told.get("decode", told.get("reward", 0)))
    guided = 1 if settings.rollout_guidance == 1 else 2  # SRPO counts calls, and its rollout has a guidance of its own
    own = told["predict"] - settings.rollout_steps
    return Calls(settings.rollout_steps * guided + own, told["backward"], told["decode"])


def per_forward(method: str, prices: Prices) -> float:
    """Processor seconds of training for each denoiser forward, all else that goes with it included."""
    calls = calls_of(method)
    score = prices.score + (prices.score_backward if needs_gradient(METHODS[method]) else 0.0)
    return prices.forward + (calls.backward * prices.backward + calls.scored * score) / calls.forward


def row_seconds(method: str, prices: Prices, budget: int, looks: int, images: int) -> float:
    """Processor seconds of a whole run: `budget` forwards, and `looks` at `images` pictures."""
    return budget * per_forward(method, prices) + looks * images * prices.look


@torch.no_grad()
def measured_prices(task: str = "style") -> Prices:
    """Of the embedded model on this machine, in one thread."""
    torch.set_num_threads(1)
    parts = recipe.build(recipe.read("draft-emoji", FAIR))
    model, prompts = parts.model, parts.prompts[:BATCH]
    cond, xt, t = model.encode_prompts(prompts), torch.randn(BATCH, *model.latent_shape), torch.full((BATCH,), 0.5)

    def predict() -> torch.Tensor:
        return model.predict(xt, t, cond).x0.square().mean()

    def score() -> torch.Tensor:
        return parts.reward(model.decode(xt), prompts).mean()

    xt.requires_grad_()
    forward, score_only = (seconds(act) for act in (predict, score))
    with torch.enable_grad():
        both, score_both = (seconds(lambda act=act: act().backward()) for act in (predict, score))
    who = methods.referees(4, (0, 1), False, task)
    methods.measure(model, who)
    look = seconds(lambda: methods.measure(model, who), repeats=1)
    each = [value / BATCH for value in (forward, both - forward, score_only, score_both - score_only)]
    return Prices(*(max(value, 0.0) for value in each), look / 8)


def seconds(act: Callable[[], Any], repeats: int = 4) -> float:
    """The least processor time of some calls, after one that is not counted."""
    act()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        act()
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    prices = measured_prices()
    print(", ".join(f"{name} {1000 * value:.1f} ms" for name, value in prices._asdict().items()))
    for method in methods.available():
        print(f"{method}: {1000 * per_forward(method, prices):.1f} s per 1,000 forwards")


if __name__ == "__main__":
    main()

"""What one SRPO update costs on the embedded model: calls counted, and its time against the sum of its parts.

    python benchmarks/step_cost.py [--repeats 7]

Both are timed in this process, in turns, so that the ratio does not hang on what else the machine does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter

import torch

from palate import recipe
from palate.algorithms.srpo import calls_per_update
from palate.core import Batch, Random
from palate.sampling import sample


class Counted:
    """A model that counts its calls and passes them on."""

    def __init__(self, model, calls: Counter):
        self._model, self._calls = model, calls

    def __getattr__(self, name):
        value = getattr(self._model, name)
        if name not in ("predict", "decode"):
            return value

        def call(*args, **kwargs):
            self._calls[name] += 1
            return value(*args, **kwargs)

        return call


def clock(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="srpo-emoji")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    plan = recipe.read(args.recipe)
    torch.manual_seed(0)
    parts = recipe.build(plan)
    model, settings, size = parts.model, plan.algorithm, plan.trainer.batch_size
    prompts = parts.prompts[:size]
    with torch.no_grad():
        cond = model.encode_prompts(prompts)
    batch = Batch(prompts, cond, torch.arange(size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    xt, t = torch.randn(size, *model.latent_shape), torch.full((size,), 0.7)
    losses = settings.n * len(settings.branches)

    def update(counted=model) -> None:
        for loss in parts.algorithm.step(counted, parts.reward, batch, Random(0, 1, range(size))):
            loss.value.backward()
        optimizer.step()
        optimizer.zero_grad()

    def rollout() -> None:
        with torch.no_grad():
            sample(model, cond, xt, settings.rollout_steps, guidance=settings.rollout_guidance, shift=settings.shift)

    def branch() -> None:
        if settings.reference_penalty:
            with torch.no_grad():
                model.predict(xt, t, cond, guidance=settings.guidance, weights="reference")
        x0 = model.predict(xt, t, cond, guidance=settings.guidance).x0
        features = parts.reward.image_features(model.decode(x0))
        (parts.reward.score(features, prompts) - parts.reward.score(features, prompts)).mean().backward()

    def apply() -> None:
        optimizer.step()
        optimizer.zero_grad()

    calls = Counter()
    update(Counted(model, calls))
    expected = calls_per_update(settings)
    print(f"calls: {dict(calls)}; formula: predict {expected['predict']}, decode {expected['decode']}")
    if calls["predict"] != expected["predict"] or calls["decode"] != expected["decode"]:
        raise SystemExit("the count differs from the formula")
    rows = [(clock(update), clock(rollout), clock(branch), clock(apply)) for _ in range(args.repeats)]
    whole, roll, one, step = (statistics.median(column) for column in zip(*rows, strict=True))
    total = roll + losses * one + step
    print(
        f"update / sum of its parts = {whole / total:.3f}   (rollout {roll / total:.0%}, {losses} branches "
        f"{losses * one / total:.0%}, optimizer {step / total:.0%})"
    )


if __name__ == "__main__":
    main()

"""How often a recipe's update calls each network: its own algorithm runs on a two-by-two model that only counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice, pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from palate.core import Batch, ChecksBatch, Random
from palate.models.gaussian import GaussianModel
from palate.path import Prediction
from palate.recipe import Recipe, build_algorithm, prompts_of, trained_names
from palate.recipe.builder import SharesRollouts
from palate.recipe.cross_checks import AsksBlackBox, rewards_used
from palate.recipe.pictures import SamplesPosterior
from palate.recipe.start import teachers_of
from palate.rewards.table import find

LARGEST_BATCH = 256  # that is run; a larger one is counted on one of its divisors


class Counts(NamedTuple):
    """What an update asks of each part."""

    calls: dict[str, float]  # images per update, forward by part and backward as "`part` backward"
    graph: dict[str, float]  # images per image of the batch that the largest single backward pass goes through, by part
    passes: int = 1  # backward passes between two updates, at most


@runtime_checkable
class HasPhases(Protocol):
    """Settings of an algorithm whose first updates ask for other things than its later ones."""

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """Steps after which it changes what an update asks for; 0 is none."""


class _Counted(GaussianModel):
    """Exact predictions of a known Gaussian on 2 x 2 latents; every call is added up, per image."""

    def __init__(self, names: Sequence[str], frozen: Sequence[str] = ()):
        super().__init__(torch.zeros(1, 2, 2), 0.6, networks=[*names, "consistency", *frozen])
        self.calls: Counter[str] = Counter()
        self.graphs: dict[int, Counter[str]] = defaultdict(Counter)  # per backward pass
        self.trained = names
        self.default_steps, self.default_guidance = 28, 1.0

    def predict(
        self, xt: Tensor, t: Tensor, cond: Tensor, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        images = len(xt) * (1 if guidance == 1.0 else 2)
        self.calls["denoiser"] += images
        pred = super().predict(xt, t, cond, guidance=guidance, weights=weights)
        learns = weights in self.trained and any(p.requires_grad for p in self.parameters(weights))
        return Prediction(*self.watched(torch.stack(pred), "denoiser" if learns else "denoiser frozen", images))

    def encode(self, images: Tensor) -> Tensor:
        self.calls["encoder"] += len(images)
        return super().encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        self.calls["decoder"] += len(latents)
        return self.watched(super().decode(latents), "decoder", len(latents))

    def watched(self, output: Tensor, part: str, images: int) -> Tensor:
        """The output, which adds to "`part` backward" when a backward pass comes through it."""

        def passed(gradient: Tensor) -> None:
            self.calls[f"{part} backward"] += images
            self.graphs[torch._C._current_graph_task_id()][part.removesuffix(" frozen")] += images

        if output.requires_grad:
            output.register_hook(passed)
        return output


def count(recipe: Recipe, *, updates: int = 8) -> dict[str, float]:
    """Images per update that go through each part, forward and backward, as `counts` counts them."""
    return counts(recipe, updates=updates).calls


def counts(recipe: Recipe, *, updates: int = 8) -> Counts:
    """The calls of an update, the mean over the first `updates` of each phase of the run, and its largest graph.

    Calls are proportional to the batch, so a large one is counted on a part of it: nothing here grows with it.
    """
    whole, size = recipe.trainer.batch_size, _counted_batch(recipe)
    if isinstance(recipe.algorithm, AsksBlackBox):  # as an update is once the head has its answers
        recipe = replace(recipe, algorithm=replace(recipe.algorithm, head_first=2))  # type: ignore[type-var]
    algorithm = build_algorithm(recipe)
    teachers = [name for name, _, _ in teachers_of(recipe)]
    model = _Counted(trained_names(recipe.algorithm.name), teachers)
    if isinstance(recipe.algorithm, SharesRollouts):
        every = recipe.algorithm.rollout_every
        updates = every * max(1, updates // every)
    two_tower = any(find(name).two_tower for name in rewards_used(recipe.reward))
    reward = _CountedTowers(model) if two_tower else _CountedReward(model)
    prompts = [f"prompt {'x' * i}" for i in range(size)]
    if teachers:  # who teach prompts of the recipe's own
        prompts = list(islice(cycle(prompts_of(recipe)[0]), size))
    mean: dict[str, float] = defaultdict(float)
    most = 1
    for begin, end in _phases(recipe):
        model.calls.clear()
        steps = updates if end == recipe.trainer.steps else min(updates, end - begin)
        for step in range(begin + 1, begin + steps + 1):
            rng = Random(0, step, range(size))
            batch = Batch(prompts, model.encode_prompts(prompts), torch.arange(size), _latents(recipe, rng))
            passes = 0
            for loss in algorithm.step(model, reward, batch, rng):
                loss.value.backward()
                passes += 1
                if loss.update is not None:
                    most, passes = max(most, passes), 0
                    for name in algorithm.trains:
                        for p in model.parameters(name):
                            p.grad = None
        for name, total in model.calls.items():
            mean[name] += total / steps * ((end - begin) / recipe.trainer.steps)
    parts = {part for graph in model.graphs.values() for part in graph}
    largest = {part: max(graph[part] for graph in model.graphs.values()) / size for part in sorted(parts)}
    return Counts({name: each * (whole / size) for name, each in mean.items()}, largest, most)


def _phases(recipe: Recipe) -> list[tuple[int, int]]:
    """(Steps before it, its last step) of each phase of the run."""
    steps = recipe.trainer.steps
    ends = recipe.algorithm.phase_ends if isinstance(recipe.algorithm, HasPhases) else ()
    return list(pairwise(sorted({0, steps, *(end for end in ends if 0 < end < steps)})))


def _counted_batch(recipe: Recipe) -> int:
    """The batch that is run: the recipe's own, or the largest divisor of it that is small and fits the algorithm."""
    whole = recipe.trainer.batch_size
    if whole <= LARGEST_BATCH:
        return whole
    fitting = (size for size in range(LARGEST_BATCH, 0, -1) if whole % size == 0 and takes_batch(recipe, size))
    return next(fitting, LARGEST_BATCH)


def takes_batch(recipe: Recipe, size: int) -> bool:
    """Whether the recipe's algorithm works with batches of that size."""
    try:
        if isinstance(recipe.algorithm, ChecksBatch):
            recipe.algorithm.check_batch(size)
    except ValueError:
        return False
    return True


def _latents(recipe: Recipe, rng: Random) -> Tensor | None:
    """Clean latents (B, 1, 2, 2) of offline training; (B, 2, 1, 2, 2) of pairs, (B, 2, 2, 2, 2) of their Gaussians.

    Of likes every other image is absent, and then the other one."""
    if recipe.prompts.pairs is not None or recipe.prompts.likes is not None:
        sampled = isinstance(recipe.algorithm, SamplesPosterior) and recipe.algorithm.posterior
        pairs = torch.stack([rng.normal("x", (2 if sampled else 1, 2, 2))] * 2, 1)
        if recipe.prompts.likes is not None:
            pairs[::2, 1], pairs[1::2, 0] = torch.nan, torch.nan
        return pairs
    return rng.normal("x", (1, 2, 2)) if recipe.prompts.images is not None else None


class _CountedReward:
    """A function of the mean pixel and the prompt's length; every image that is looked at is counted."""

    def __init__(self, model: _Counted):
        self.model = model

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(self._features(images), prompts)

    def features(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What a head learns a black-box reward on."""
        return self._features(images)[:, None]

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, tuple[float, Tensor]]:
        """All of a weighted sum's, which together are one look at each image."""
        return {"all": (1.0, self(images, prompts))}

    def _features(self, images: Tensor) -> Tensor:
        self.model.calls["reward"] += len(images)
        return self.model.watched(images.mean((1, 2, 3)) + 0 * images.sum(), "reward", len(images))

    def _score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return features + torch.tensor([0.01 * len(prompt) for prompt in prompts])


class _CountedTowers(_CountedReward):
    """The same in two towers, so that an algorithm may look once and score several prompts."""

    def image_features(self, images: Tensor) -> Tensor:
        return self._features(images)

    def score(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(features, prompts)

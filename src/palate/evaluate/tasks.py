"""The six tasks of `palate.rewards.tasks`, asked of a model and of the base that it comes from, on the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.core import Model
from palate.evaluate.metrics import bootstrap_interval
from palate.evaluate.samples import Drawing, generate, pairs
from palate.rewards.tasks import TaskReward, task_prompts

SEEDS = 4  # images per prompt
BASE, RESULT = Drawing(weights="reference"), Drawing()  # by the model's defaults


class TaskScore(NamedTuple):
    """Shares of right images, and how the result's differs from the base's, with its 95 % interval over prompts."""

    base: float
    value: float
    change: float
    change_low: float
    change_high: float


def evaluate_tasks(
    model: Model,
    *,
    base: Drawing = BASE,
    result: Drawing = RESULT,
    seeds: Sequence[int] = range(SEEDS),
    prompts: Mapping[str, Sequence[str]] | None = None,
    reward: TaskReward | None = None,
) -> dict[str, TaskScore]:
    """Each task's score and, as "mean", that over all tasks, which count alike.

    base, result: how each draws. prompts: of each task; None = `task_prompts`. InputError where the assets have no
    words for them, or no detector.
    """
    prompts = prompts or task_prompts()
    reward = reward or TaskReward(strict=True)
    right: dict[str, tuple[Tensor, Tensor]] = {}
    for task, asked in prompts.items():
        repeated, _ = pairs(asked, seeds)
        drawn = [generate(model, asked, seeds, **how._asdict()) for how in (base, result)]
        right[task] = (_scores(reward, drawn[0], repeated), _scores(reward, drawn[1], repeated))
    found = {
        task: _score(*values, groups=pairs(prompts[task], seeds)[0], share=torch.ones(len(values[0])))
        for task, values in right.items()
    }
    sizes = [len(values) for values, _ in right.values()]
    share = torch.cat([torch.full((size,), sum(sizes) / len(sizes) / size) for size in sizes])
    before, after = (torch.cat([values[k] for values in right.values()]) for k in range(2))
    groups = [f"{task}: {prompt}" for task in prompts for prompt in pairs(prompts[task], seeds)[0]]
    return found | {"mean": _score(before, after, groups=groups, share=share)}


def _scores(reward: TaskReward, images: Tensor, prompts: Sequence[str], batch: int = 64) -> Tensor:
    parts = [reward(images[k : k + batch], prompts[k : k + batch]) for k in range(0, len(images), batch)]
    return torch.cat(parts)


def _score(base: Tensor, result: Tensor, *, groups: Sequence[str], share: Tensor) -> TaskScore:
    """share: what an image counts for, 1 on average."""
    low, high = bootstrap_interval(result * share, base * share, groups=groups)
    before, after = float((base * share).mean()), float((result * share).mean())
    return TaskScore(before, after, after - before, low, high)


def tasks_json(scores: Mapping[str, TaskScore]) -> dict[str, Any]:
    """As JSON values."""
    return {task: score._asdict() for task, score in scores.items()}

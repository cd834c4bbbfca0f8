"""What the comparison asks of every method: a reward to raise, and how it is judged by what was not optimised.

    style     the preference (1 + k) R("3d. prompt") - R("flat. prompt"); judged by the held-out reward's own
    absolute  the reward of the plain prompt; judged by the held-out reward
    scenes    the embedded GenEval (counting, two objects, position, binding), partly right; judged strictly. Methods
              that differentiate the reward get its soft form; all are judged on mirrored pictures too, which a picture
              that only pleases the detector does not survive
    jpeg      a small file: minus kilobytes, a black box; judged exactly
    unguided  scenes drawn, trained and judged without guidance, as DiffusionNFT's authors do, with the layers and the
              batches that learn there (docs/log.md), for the methods of `fixed`
    taste     what is learned from the votes of one simulated person; judged by that person's own utility

`scenes` and `unguided` need assets whose vocabulary has numbers, places and colours of things. A task without a
gradient and without a soft form is for the methods that need none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import torch

from palate import recipe
from palate.algorithms.table import find
from palate.core import Reward
from palate.models.vocabulary import vocabulary
from palate.recipe.cross_checks import NeedsRewardGradient
from palate.rewards import soft_tasks
from palate.rewards import tasks as geneval
from palate.rewards.combine import semantic_relative
from palate.rewards.simple import jpeg_size
from palate.runtime.errors import InputError

STYLE, NEGATIVE, K = "3d", "flat", 4.0
PERSON, VOTES, CONCEPTS = "warm3d", 60, 24
SCENES = ("counting", "two objects", "position", "binding")
WIDE = [
    "model.lora_rank=16",
    "model.lora_alpha=16",
    "model.lora_targets=[attn1.to_q, attn1.to_k, attn1.to_v, attn1.to_out.0, "
    "attn2.to_q, attn2.to_k, attn2.to_v, attn2.to_out.0, time_emb_proj]",
]  # every attention layer: where a thing stands is no matter of how its word is read
ABSOLUTE = [
    "algorithm.preference=absolute",
    "algorithm.positive=[]",
    "algorithm.negative=[]",
    "algorithm.k_denoise=[0, 0]",
    "algorithm.k_inversion=[0, 0]",
    "algorithm.hinge=null",
]  # SRPO on a reward that has no words


class Task(NamedTuple):
    """`objective` makes of the embedded reward what is optimised. `words`: of SRPO, whose control words take the place
    of an objective where `own_words`. `goal` judges images (B, 3, 64, 64) and prompts, given the held-out reward;
    larger is better. prompts: of training and of judging, None = the recipe's and emoji-eval. `soft`: what methods that
    differentiate optimise in the objective's place. `again`: a second look of the goal, which nothing is chosen by.
    `guidance` of the pictures that are judged, None = the model's own. `fixed`: by method, what takes the place of the
    shared settings and of a search; other methods are not of this task."""

    title: str
    unit: str
    objective: Callable[[Reward], Reward]
    goal: Callable[[Reward], Reward]
    gradient: bool = True
    words: Sequence[str] = ()
    own_words: bool = False
    prompts: Callable[[bool], list[str]] | None = None
    soft: Callable[[], Reward] | None = None
    again: Callable[[], Reward] | None = None
    guidance: float | None = None
    fixed: Mapping[str, Sequence[str]] = MappingProxyType({})


def preference(reward: Reward) -> Reward:
    """The style preference of a reward."""
    return semantic_relative(reward, STYLE, NEGATIVE, K)


def small_file(_: Reward) -> Reward:
    """Minus the kilobytes as a JPEG."""
    return lambda images, prompts: -jpeg_size(images) / 1000


def scene_prompts(training: bool) -> list[str]:
    """Prompts of the four tasks; those of training are drawn with another seed and are none of the others."""
    judged = [prompt for task, told in geneval.task_prompts(seed=0).items() if task in SCENES for prompt in told]
    if not training:
        return judged
    more = [prompt for task, told in geneval.task_prompts(96, seed=1).items() if task in SCENES for prompt in told]
    return [prompt for prompt in more if prompt not in set(judged)]


@cache
def exact(*, strict: bool) -> Reward:
    """The embedded GenEval's score, its detector loaded once a process."""
    return geneval.TaskReward(strict=strict)


def mirrored() -> Reward:
    """What is right in the mirrored pictures, left and right exchanged in their prompts."""
    judge = exact(strict=True)
    return lambda images, prompts: judge(images.flip(-1), [soft_tasks.mirrored(prompt) for prompt in prompts])


@cache
def _person() -> tuple[Reward, Reward]:
    """The taste learned from VOTES random votes, and the utility of who cast them."""
    import taste

    bench = taste.Bench(CONCEPTS, quick=False)
    voter = taste.Voter(bench.people[PERSON], bench.first, bench.scaling, seed=0)
    voter.vote(bench.first, VOTES, bald=False)
    assert voter.posterior is not None
    learned = taste.TasteReward(
        bench.features, bench.scaling, torch.from_numpy(voter.posterior.mean),
        torch.from_numpy(voter.posterior.covariance), bench.reward,
    )  # fmt: skip
    return learned, lambda images, prompts: voter.utility(images, list(prompts))


TASKS = {
    "style": Task(
        "style preference",
        "held-out preference",
        preference,
        preference,
        words=[
            f'algorithm.positive=["{STYLE}"]',
            f'algorithm.negative=["{NEGATIVE}"]',
            f"algorithm.k_denoise=[{K}, {K}]",
            "algorithm.k_inversion=[0, 0]",  # with K it would be K times less of the concept, and none were left in all
            "algorithm.hinge=null",
        ],
        own_words=True,
    ),
    "absolute": Task("absolute reward", "held-out reward", lambda r: r, lambda r: r, words=ABSOLUTE),
    "scenes": Task(
        "embedded GenEval", "fraction right", lambda r: exact(strict=False), lambda r: exact(strict=True),
        gradient=False, words=ABSOLUTE, prompts=scene_prompts, soft=soft_tasks.SoftTaskReward, again=mirrored,
    ),
    "unguided": Task(
        "embedded GenEval without guidance", "fraction right", lambda r: exact(strict=False),
        lambda r: exact(strict=True), gradient=False, prompts=scene_prompts, again=mirrored, guidance=1.0,
        fixed={
            # 64 pictures in an update, and 72 in two; at four times its rate the first wears the pictures out
            "DiffusionNFT": [*WIDE, "trainer.lr=1e-3", "trainer.batch_size=8", "algorithm.kl=1e-3"],
            "Flow-GRPO released": [*WIDE, "trainer.lr=2.5e-3", "trainer.batch_size=3"],
        },
    ),
    "jpeg": Task("small file", "minus kilobytes", small_file, small_file, gradient=False),
    "taste": Task("one person's taste", "that person's utility", lambda r: _person()[0], lambda r: _person()[1],
                  words=ABSOLUTE),
}  # fmt: skip


def missing(task: str) -> str | None:
    """Why these assets cannot show the task; None where they can."""
    if task not in ("scenes", "unguided"):
        return None
    try:
        geneval.task_prompts(1)
        geneval.load_detector()
    except InputError as error:
        return str(error)
    assert vocabulary().counts, "task_prompts would have said so"
    return None


@cache
def needs_gradient(source: str) -> bool:
    """Whether the recipe's algorithm differentiates the reward."""
    kind = find(recipe.read(source).algorithm.name).load_class()
    return isinstance(kind, NeedsRewardGradient) and kind.needs_reward_gradient

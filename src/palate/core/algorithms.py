"""What an algorithm is, what it is given and yields, and what some algorithms can do besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from palate.core.models import Cond, Model
from palate.core.random import Random
from palate.core.rewards import Reward


class Batch(NamedTuple):
    """One step's work. `ids` (B,) are global sample ids: they, not the rank, decide each sample's random numbers."""

    prompts: list[str]
    cond: Cond
    ids: Tensor
    latents: Tensor | None = None  # (B, C, h, w) clean latents of real images (offline training)


class Loss(NamedTuple):
    """What an algorithm yields: a scalar to differentiate, values to log, and which weights it updates."""

    value: Tensor  # scalar; the loop calls backward on it
    metrics: dict[str, Tensor]
    update: str | None = None  # the named weights to step after this backward; None accumulates


class Algorithm(Protocol):
    """A generator of losses; the loop does the rest. Code after a `yield` runs after the update."""

    @property
    def trains(self) -> tuple[str, ...]:
        """The names of the weights that it updates: ("policy",) or ("policy", "assistant")."""

    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]: ...


@runtime_checkable
class Stateful(Protocol):
    """What a checkpoint must hold besides weights: a tree of tensors, numbers and texts with string keys."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Steerable(Stateful, Protocol):
    """An algorithm whose control words may change between two steps."""

    def steer(self, positive: Sequence[str] | None = None, negative: Sequence[str] | None = None) -> None:
        """Replace the control words from the next step on; None keeps a list. ValueError: they cannot be used."""

    def control_texts(self, prompt: str) -> dict[str, list[str]]:
        """What the reward is asked about a prompt, by side ("positive", "negative"), one text for each word."""


@runtime_checkable
class ComparesWords(Steerable, Protocol):
    """A steerable algorithm that may train the difference between positive and negative words."""

    @property
    def relative(self) -> bool:
        """Whether it does: then a reward must know words."""


class Sampler(Protocol):
    """How an algorithm draws from its policy: `steps` evaluations without guidance, each with a noise of its own."""

    @property
    def steps(self) -> int: ...

    def __call__(self, model: Model, cond: Cond, noises: Sequence[Tensor], *, weights: str = "policy") -> Tensor: ...


@runtime_checkable
class TakesAnySize(Protocol):
    """An algorithm that keeps no latents from one step to the next, so that each may draw another image size."""

    any_size: bool


@runtime_checkable
class ReadsImages(Protocol):
    """An algorithm that says whether it learns from given images, `Batch.latents`: if false, none may be given."""

    reads_images: bool


@runtime_checkable
class DrawsOwnSamples(Protocol):
    """An algorithm whose policy is not sampled along a time grid, such as a few-step generator."""

    @property
    def sampler(self) -> Sampler: ...


@runtime_checkable
class DrawsReference(Protocol):
    """An algorithm whose reference is drawn by its sampler too: it is the generator that training began with."""

    @property
    def draws_reference(self) -> bool: ...


@runtime_checkable
class AsksOtherPrompts(Protocol):
    """An algorithm that gives the model prompts of its own making besides the batch's."""

    def other_prompts(self, model: Model, prompts: Sequence[str]) -> list[str]:
        """Those that it makes of the batch's prompts. InputError: they cannot be made."""


@runtime_checkable
class Warns(Protocol):
    """An algorithm that knows when its settings are at odds; the loop says each sentence once."""

    def warnings(self, learning_rates: Mapping[str, float]) -> list[str]: ...


@runtime_checkable
class LogsLater(Protocol):
    """An algorithm whose first updates of the policy lack some metrics, as the reward while something else is learnt;
    `trainer.guard.best` may name them."""

    @property
    def later_metrics(self) -> tuple[str, ...]: ...


@runtime_checkable
class ChecksBatch(Protocol):
    """An algorithm that cannot work with every batch size."""

    def check_batch(self, size: int) -> None:
        """ValueError: a step of `size` samples cannot work; the message says why."""

"""Which prompts, sample ids and clean latents a step works on, and how ranks and micro-batches share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from palate.core import Batch, Model, prompt_order, used_prompts
from palate.runtime.distributed import Ranks
from palate.runtime.errors import InputError


class Samples(NamedTuple):
    """A step's samples, of all ranks together."""

    prompts: list[str]
    ids: Tensor  # (B,)
    latents: Tensor | None  # (B, C, h, w), or (B, 2, C, h, w) of pairs


class Batches:
    """The samples of each step, and this rank's part of them as one `Batch` per micro-batch."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        latents: Tensor | None,
        *,
        seed: int,
        size: int,
        micro_batches: int,
        ranks: Ranks,
    ):
        parts = ranks.size * micro_batches
        if size % parts:
            raise InputError(
                f"trainer.batch_size = {size} cannot be cut into {parts} equal parts "
                f"({ranks.size} ranks x {micro_batches} micro_batches); expected a multiple"
            )
        self.model, self.prompts, self.latents = model, list(prompts), latents
        self.seed, self.size, self.micro_batches, self.ranks = seed, size, micro_batches, ranks

    def samples(self, step: int) -> Samples:
        """What the step works on, on all ranks together."""
        first = (step - 1) * self.size
        chosen = prompt_order(len(self.prompts), self.seed, first, self.size)
        latents = None if self.latents is None else self.latents[chosen]
        return Samples([self.prompts[i] for i in chosen], torch.arange(first, first + self.size), latents)

    def split(self, samples: Samples) -> list[Batch]:
        """This rank's part, with its prompts encoded: a batch for each of its micro-batches."""
        prompts, ids, latents = samples
        size = len(ids) // (self.ranks.size * self.micro_batches)
        batches = []
        for k in range(self.micro_batches):
            start = (self.ranks.rank * self.micro_batches + k) * size
            rows = slice(start, start + size)
            with torch.no_grad():
                cond = self.model.encode_prompts(prompts[rows])
            batches.append(Batch(prompts[rows], cond, ids[rows], None if latents is None else latents[rows]))
        return batches

    def used_prompts(self, steps: int) -> list[str]:
        """The prompts that the first `steps` steps work on, each once, in the order in which they were given."""
        return used_prompts(self.prompts, self.seed, steps * self.size)

"""Which prompts, sample ids and clean latents a step works on, and how ranks and micro-batches share them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from palate.core import Batch, Model, Random, prompt_order, used_prompts
from palate.data.buckets import Bucket
from palate.models.latents import ImageSize
from palate.runtime.distributed import Ranks
from palate.runtime.errors import InputError


class Samples(NamedTuple):
    """A step's samples, of all ranks together."""

    prompts: list[str]
    ids: Tensor  # (B,)
    latents: Tensor | None  # (B, C, h, w), or (B, 2, C, h, w) of pairs
    size: ImageSize | None = None  # that the step draws, in pixels; None = the model's own


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
        self.sizes: list[ImageSize] = []
        self.buckets: list[Bucket] = []
        self._drawn: list[int] = []  # the bucket of each step so far
        parts = ranks.size * micro_batches
        if size % parts:
            raise InputError(
                f"trainer.batch_size = {size} cannot be cut into {parts} equal parts "
                f"({ranks.size} ranks x {micro_batches} micro_batches); expected a multiple"
            )
        self.model, self.prompts, self.latents = model, list(prompts), latents
        self.seed, self.size, self.micro_batches, self.ranks = seed, size, micro_batches, ranks

    def of_sizes(self, sizes: Sequence[ImageSize], buckets: Sequence[Bucket]) -> Self:
        """The same with steps of several image sizes in turn, or with the pictures of several buckets."""
        self.sizes, self.buckets = list(sizes), list(buckets)
        return self

    def samples(self, step: int) -> Samples:
        """What the step works on, on all ranks together."""
        if self.buckets:
            return self._from_bucket(step)
        first = (step - 1) * self.size
        chosen = prompt_order(len(self.prompts), self.seed, first, self.size)
        latents = None if self.latents is None else self.latents[chosen]
        ids = torch.arange(first, first + self.size)
        return Samples([self.prompts[i] for i in chosen], ids, latents, self.size_of(step))

    def size_of(self, step: int) -> ImageSize | None:
        """The image size of a step, drawn evenly from `sizes`: a function of seed and step, the same on all ranks."""
        if not self.sizes:
            return None
        return self.sizes[Random(self.seed, step, ()).shared_integer("image-size", 0, len(self.sizes) - 1)]

    def _from_bucket(self, step: int) -> Samples:
        """A step's pictures, all of one bucket; each picture is as likely as any other, each once an epoch of its own.
        A function of seed and step alone: which buckets the steps before took is drawn again where it is not known."""
        ends = list(itertools.accumulate(len(bucket.rows) for bucket in self.buckets))
        for earlier in range(len(self._drawn) + 1, step + 1):
            picture = Random(self.seed, earlier, ()).shared_integer("bucket", 0, ends[-1] - 1)
            self._drawn.append(bisect.bisect_right(ends, picture))
        mine = self._drawn[step - 1]
        bucket, before = self.buckets[mine], self._drawn[: step - 1].count(mine)
        chosen = prompt_order(len(bucket.rows), self.seed, before * self.size, self.size)
        prompts = [self.prompts[bucket.rows[i]] for i in chosen]
        first = (step - 1) * self.size
        return Samples(prompts, torch.arange(first, first + self.size), bucket.latents[chosen], bucket.size)

    def split(self, samples: Samples) -> list[Batch]:
        """This rank's part, with its prompts encoded: a batch for each of its micro-batches."""
        prompts, ids, latents, _ = samples
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
        if self.buckets:
            return list(dict.fromkeys(self.prompts))
        return used_prompts(self.prompts, self.seed, steps * self.size)

"""Replay of sampler trajectories: a FIFO with bounded memory, and the laws by which states are drawn from it.

A trajectory is the T inputs of the sampler's steps, x_T ... x_1, with its prompt and the reward of its last image.
Trajectory n has index i at noise level T - i. Three laws over (n, i):

    uniform       n uniform without replacement, i uniform
    prioritised   P(n, i) = P(n) P(i),  P(n) ~ max(R_n, 0),  P(i) ~ gamma^(T-1-i),  with replacement
    importance    as prioritised, mixed with a fraction of uniform; each draw weighs 1 / (N T P(n, i)), so that
                  the mean over draws is the mean over the whole buffer

When no reward is positive, P(n) is uniform. The newest trajectories stay in memory, older ones go to safetensors shards
in a scratch folder; the state of the buffer, what is in shards included, goes into the checkpoint.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from palate.runtime.errors import InputError
from palate.runtime.tensors import writing_tensors

Distribution = Literal["uniform", "prioritised", "importance"]
UNIFORM_FRACTION = 0.1  # of importance: no trajectory is left out, and no weight exceeds 1 / UNIFORM_FRACTION


class Draw(NamedTuple):
    """B states of the buffer: x (B, C, h, w) are the inputs of the steps `step` (B,), `weight` (B,) their weights."""

    states: Tensor
    step: Tensor
    weight: Tensor
    prompts: list[str]
    age: Tensor  # (B,) trajectories inserted since


class ReplayBuffer:
    """The newest `capacity` trajectories. At most `memory` bytes of them are held, the others lie in shards on disk.

    Shards are memory-mapped: a draw reads the states it needs, and `state_dict` nothing. Only writing a checkpoint
    reads everything, which needs memory for the whole buffer once.
    """

    def __init__(self, capacity: int, *, memory: int = 1 << 30):
        if capacity < 1 or memory < 0:
            raise InputError(
                f"ReplayBuffer got capacity {capacity}, memory {memory}; expected at least 1 trajectory and 0 bytes"
            )
        self.capacity, self.memory = capacity, memory
        self.end = 0  # the id that the next trajectory gets
        self.prompts: deque[str] = deque()
        self.rewards: deque[float] = deque()
        self._held: dict[int, Tensor] = {}
        self._mapped: dict[int, Tensor] = {}
        self._shards: deque[tuple[int, Path]] = deque()  # the id after its last one, the file
        self._scratch: tempfile.TemporaryDirectory | None = None

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def ids(self) -> range:
        """Ids of what is kept, oldest first: with n inserted so far, max(0, n - capacity) .. n - 1."""
        return range(self.end - len(self), self.end)

    @property
    def held_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._held.values())

    def insert(self, trajectories: Tensor, prompts: Sequence[str], rewards: Iterable[float]) -> int:
        """Add (N, T, C, h, w) with N prompts and rewards; the oldest make room. Returns how many were taken: one whose
        latents or reward are not finite is left out, because it could be neither drawn nor checkpointed."""
        taken = 0
        for x, prompt, reward in zip(trajectories.detach().cpu(), prompts, map(float, rewards), strict=True):
            if not (torch.isfinite(x).all() and abs(reward) < float("inf")):
                continue
            kept = next(iter(self._held.values()), None)
            if kept is not None and kept.shape != x.shape:
                raise InputError(f"the buffer holds trajectories {tuple(kept.shape)}, got {tuple(x.shape)}")
            self._held[self.end] = x.clone()
            self.end += 1
            self.prompts.append(prompt)
            self.rewards.append(reward)
            taken += 1
        self._forget()
        self._spill()
        return taken

    def draw(self, distribution: Distribution, rows: Tensor, steps: Tensor, *, gamma: float = 1.0) -> Draw:
        """B = len(rows) states for uniform random numbers `rows` and `steps` (B,) in [0, 1).

        ValueError when there are too few trajectories.
        """
        size, length = len(self), self._length() if len(self) else 0
        if not size or (distribution == "uniform" and size < len(rows)):
            raise InputError(
                f"the replay buffer holds {size} trajectories, fewer than the {len(rows)} to draw; "
                "expected algorithm.buffer_size >= trainer.batch_size and a finite reward for each"
            )
        if distribution == "uniform":
            chosen, index = without_replacement(rows, size), (steps * length).long()
            weight = torch.ones(len(rows), dtype=torch.float64)
        elif distribution in ("prioritised", "importance"):
            fraction = UNIFORM_FRACTION if distribution == "importance" else 0.0
            of_rows = trajectory_probabilities(torch.tensor(list(self.rewards), dtype=torch.float64))
            of_steps = step_probabilities(length, gamma)
            joint = (1 - fraction) * of_rows[:, None] * of_steps + fraction / (size * length)
            # the mixture drawn by conditionals: the row first, then the step given the row
            marginal = joint.sum(1)
            chosen = inverse_cdf(marginal.expand(len(rows), -1), rows)
            index = inverse_cdf(joint[chosen] / marginal[chosen, None], steps)
            weight = torch.ones(len(rows), dtype=torch.float64)
            if distribution == "importance":
                weight = 1 / (size * length * joint[chosen, index])
        else:
            raise InputError(f"distribution got {distribution!r}; expected uniform, prioritised or importance")
        first = self.end - size
        states = torch.stack([self._trajectory(first + int(n))[int(i)] for n, i in zip(chosen, index, strict=True)])
        return Draw(states, index, weight, [self.prompts[int(n)] for n in chosen], size - 1 - chosen)

    def state_dict(self) -> dict[str, Any]:
        return {
            "end": self.end,
            "prompts": list(self.prompts),
            "rewards": list(self.rewards),
            "trajectories": [self._trajectory(k) for k in self.ids],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["trajectories"]) > self.capacity:
            raise InputError(
                f"the checkpoint holds {len(state['trajectories'])} trajectories, buffer_size is "
                f"{self.capacity}; continue with the settings the run was started with"
            )
        self.end = state["end"] - len(state["trajectories"])
        self.prompts, self.rewards, self._held, self._mapped, self._shards = deque(), deque(), {}, {}, deque()
        self._scratch = None  # what the old shards map stays readable until nobody holds it
        for x, prompt, reward in zip(state["trajectories"], state["prompts"], state["rewards"], strict=True):
            self.insert(x[None], [prompt], [reward])

    def _length(self) -> int:
        return len(self._trajectory(self.end - 1))

    def _trajectory(self, k: int) -> Tensor:
        return self._held[k] if k in self._held else self._mapped[k]

    def _forget(self) -> None:
        while len(self) > self.capacity:
            self._held.pop(self.ids.start, None)
            self._mapped.pop(self.ids.start, None)
            self.prompts.popleft()
            self.rewards.popleft()
        while self._shards and self._shards[0][0] <= self.ids.start:
            self._shards.popleft()[1].unlink()

    def _spill(self) -> None:
        """Past the limit, the oldest half of what is held (more if need be) becomes one shard."""
        size = self.held_bytes
        if size <= self.memory:
            return
        doomed = []
        for k, x in self._held.items():
            if size <= self.memory // 2:
                break
            doomed.append(k)
            size -= x.numel() * x.element_size()
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="palate-replay-")
        path = Path(self._scratch.name) / f"{doomed[0]:08d}.safetensors"
        with writing_tensors(path):
            save_file({str(k): self._held.pop(k) for k in doomed}, str(path))
        self._shards.append((doomed[-1] + 1, path))
        self._mapped |= {int(k): x for k, x in load_file(path).items()}


def trajectory_probabilities(rewards: Tensor) -> Tensor:
    """P(n) = max(R_n, 0) / sum, (N,); uniform when no reward is positive."""
    positive = rewards.clamp_min(0)
    total = positive.sum()
    return positive / total if bool(total > 0) else torch.full_like(rewards, 1 / len(rewards))


def step_probabilities(length: int, gamma: float) -> Tensor:
    """P(i) = gamma^(T-1-i) / sum, (T,) float64; gamma = 0 is all on the last step, gamma = 1 uniform."""
    weights = torch.tensor(gamma, dtype=torch.float64) ** torch.arange(length - 1, -1, -1)
    return weights / weights.sum()


def inverse_cdf(probabilities: Tensor, u: Tensor) -> Tensor:
    """The category (B,) that u (B,) in [0, 1) falls into, probabilities (B, K); never one of probability 0."""
    cdf = probabilities.cumsum(1)
    found = torch.searchsorted(cdf, (u.to(cdf) * cdf[:, -1])[:, None], right=True)[:, 0]
    last = probabilities.shape[1] - 1 - (probabilities.flip(1) > 0).to(torch.uint8).argmax(1)  # rounding at the top end
    return torch.minimum(found, last)


def without_replacement(u: Tensor, size: int) -> Tensor:
    """B = len(u) different numbers below `size`, each subset equally likely, for u (B,) uniform in [0, 1).

    Fisher and Yates: the k-th draw is uniform over what the draws before it left.
    """
    moved: dict[int, int] = {}
    chosen = []
    for k, fraction in enumerate(u.tolist()):
        place = k + int(fraction * (size - k))
        chosen.append(moved.get(place, place))
        moved[place] = moved.get(k, k)
    return torch.tensor(chosen)

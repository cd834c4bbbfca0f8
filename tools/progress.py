"""A training's clock, state and log: the same command goes on where it stopped, and minutes count in all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Stateful(Protocol):
    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> object: ...


class Progress:
    """Iterate over the steps until the minutes are spent; `parts` are read from `path` at the start and kept there.

    State is written every `every` seconds and at the end, to a draft first, so that a kill leaves the older one whole.
    """

    def __init__(self, path: Path, parts: Mapping[str, Stateful], minutes: float, every: float = 180):
        self.path, self.parts, self.seconds, self.every = path, parts, minutes * 60, every
        self.step, self.spent, self._rows = 0, 0.0, []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self.spent = state["step"], state["spent"]
            print(f"goes on from step {self.step}, {self.spent / 60:.1f} min", flush=True)

    @property
    def share(self) -> float:
        """How much of the time is spent, in [0, 1]."""
        return min(1.0, self.spent / self.seconds)

    def __iter__(self) -> Iterator[int]:
        start, saved = time.time() - self.spent, time.time()
        while self.spent < self.seconds:
            self.step += 1
            yield self.step
            self.spent = time.time() - start
            if time.time() - saved > self.every:
                self.save()
                saved = time.time()
        self.save()

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        draft = self.path.with_suffix(".new")
        torch.save(state | {"step": self.step, "spent": self.spent}, draft)
        draft.rename(self.path)

    def log(self, values: Mapping[str, Tensor], every: int = 100) -> None:
        """Remember one step's values; print the means of `every` steps."""
        self._rows.append({name: value.item() for name, value in values.items()})
        if self.step % every == 0:
            means = {name: round(float(np.mean([row[name] for row in self._rows])), 5) for name in values}
            print(f"step {self.step} {self.spent / 60:.1f} min {means}", flush=True)
            self._rows.clear()

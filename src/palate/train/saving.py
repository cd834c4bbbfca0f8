"""A run on the disk: its first files, its checkpoints, and the way back from one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from palate.core import Fingerprinted, GuardMeasure, Model, Stateful
from palate.recipe import TrainerSettings
from palate.runtime import checkpoint, sharding
from palate.runtime.distributed import Ranks
from palate.runtime.environment import environment, versions
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import write_atomically
from palate.runtime.runlog import METRICS, RunLog, read_metrics, rewind
from palate.train.guard import Guard
from palate.train.python_recipe import way_on
from palate.train.state import Counters, Replicas, Weights, copy_into
from palate.train.steering import CONTROL, describe


@dataclass
class Saver:
    """Saves and loads the parts of a run; rank 0 alone writes."""

    folder: Path
    settings: TrainerSettings
    ranks: Ranks
    weights: Weights
    replicas: Replicas
    guard: Guard
    measure: GuardMeasure  # what it remembers of the model of before, where it does, is kept too
    counters: Counters
    log: RunLog
    base: str  # fingerprint of the base weights
    identity: str  # what a resumed run must share
    recipe: str | None = None  # the text of recipe.yaml
    kept: str | None = None  # the text of identity.json
    begun: bool = False  # by this object

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def begin(self) -> None:
        """The files that a run has before its first step. InputError: the folder holds a run."""
        if checkpoint.steps(self.checkpoints) or (self.folder / METRICS).exists():
            raise InputError(
                f"{self.folder} already holds a run: continue it with {way_on(self.folder)}, choose another folder, or "
                "replace it (--fresh on the command line)"
            )
        self.begun = True
        self.write_recipe()
        if self.kept is not None:
            write_atomically(self.folder / "identity.json", self.kept.encode())
        write_atomically(self.folder / "environment.json", json.dumps(environment(self.base), indent=1).encode())
        (self.folder / CONTROL).unlink(missing_ok=True)

    def take_back(self) -> None:
        """Forget the log of a run that this object began and that failed before anything happened, so that the folder
        can be used again."""
        idle = all(row["event"] == "reference" for row in read_metrics(self.folder / METRICS))
        if self.begun and idle and not checkpoint.steps(self.checkpoints):
            (self.folder / METRICS).unlink(missing_ok=True)

    def write_recipe(self) -> None:
        if self.recipe is not None:
            write_atomically(self.folder / "recipe.yaml", self.recipe.encode())

    def check_space(self) -> None:
        """CheckpointError: the disk has no room for the checkpoints that are kept."""
        one = self.weights.size() * (4 if self.settings.ema_decay else 3)  # weights, two moments, the average
        checkpoint.check_space(self.checkpoints, need=one * (self.settings.keep_checkpoints + 2))

    def save(self) -> None:
        """Write the checkpoint of this step; older ones go, but for the newest few and the guard's best."""
        tensors = {}
        for key, value in self.weights.state_dict().items():
            whole = sharding.gather_to_host(value)  # every rank takes part
            if self.ranks.is_main:
                tensors[key] = whole
        state = {
            "trains": list(self.weights.parameters),
            "samples": self.counters.step * self.settings.batch_size,
            **self.counters.state_dict(),
            "guard": self.guard.state_dict(),
            **self.replicas.gather(self.replicas.states(), tensors),
            "identity": self.identity,
            "base_fingerprint": self.base,
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        if isinstance(self.measure, Stateful):
            state["measure"] = checkpoint.flatten_state(self.measure.state_dict(), "guard", tensors)
        best = self.guard.state.best_step

        def write() -> None:
            self.log.sync()
            checkpoint.save(self.checkpoints, self.counters.step, tensors, state)
            checkpoint.prune(
                self.checkpoints, keep=self.settings.keep_checkpoints, also=set() if best is None else {best}
            )

        self.ranks.on_main(write)

    def load_weights(self, step: int) -> None:
        """Weights, average, optimizer and what the algorithm remembers (old policies, a moving reference, a replay
        buffer) of the checkpoint of `step`; words, counters and prompts go on."""
        saved = checkpoint.load(self.checkpoints / checkpoint.name(step))
        self.weights.load_state_dict(saved)
        self.replicas.load(saved, words=False)

    def resume(self, notes: list[str]) -> list[dict[str, Any]]:
        """Load the newest good checkpoint; returns the steering events that come after it. `notes` gets remarks."""
        self.ranks.on_main(lambda: checkpoint.settle(self.checkpoints))
        saved = checkpoint.load_newest(self.checkpoints, warn=notes.append)
        state = saved.state
        if len(found := set(self.ranks.all_gather_json(saved.step))) > 1:
            raise CheckpointError(f"the ranks see different checkpoints ({sorted(found)}); share one folder")
        if state["base_fingerprint"] != self.base:
            raise CheckpointError(
                f"{self.folder} was trained from other base weights ({state['base_fingerprint'][:12]}, "
                f"now {self.base[:12]}); install the version of the model it started from"
            )
        if state["identity"] != self.identity:
            raise InputError(
                f"the settings differ from those {self.folder} was started with; only its length, previews and "
                "checkpoints may change. Start a new run for other settings"
            )
        if not self.settings.threads:
            torch.set_num_threads(state["threads"])
        if changed := {k: v for k, v in state["versions"].items() if versions().get(k) != v}:
            notes.append(f"made with {describe(changed)}, now {describe(versions())}: the last digits may differ")
        self.weights.load_state_dict(saved)
        self.replicas.load(saved)
        self.counters.load_state_dict(saved.step, state)
        self.guard.load_state_dict(state["guard"])
        if isinstance(self.measure, Stateful) and "measure" in state:
            self.measure.load_state_dict(checkpoint.unflatten_state(state["measure"], saved.tensors))
        self.ranks.on_main(self.write_recipe)
        return self.ranks.on_main(lambda: rewind(self.folder, saved.step)) or []


def restore_result(model: Model, folder: Path, *, warn: Callable[[str], None]) -> int:
    """Put the newest good checkpoint's weights (the average, if one was kept) into `model`; returns its step."""
    saved = checkpoint.load_newest(folder / "checkpoints", warn=warn)
    base = model.fingerprint() if isinstance(model, Fingerprinted) else ""
    if saved.state["base_fingerprint"] != base:
        raise CheckpointError(
            f"{folder} was trained from other base weights ({saved.state['base_fingerprint'][:12]}, now {base[:12]}); "
            "its adapter fits those alone: install the version of the model it started from"
        )
    source = "ema" if any(key.startswith("ema/") for key in saved.tensors) else "weights"
    for name in saved.state["trains"]:
        copy_into(model.parameters(name), saved.tensors, f"{source}/{name}")
    return saved.step

"""A step that was not finite: skip it, keep what it started from, and run it again.

A bundle is a checkpoint folder, runs/NAME/failures/step-NNNNNN: the weights that the step started from, its prompts and
sample ids, the algorithm's state, the recipe. All random numbers follow from them, so the step is the same again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.core import Algorithm, Fingerprinted, Model, Random, Reward
from palate.models.sizes import at_size
from palate.recipe import GuardSettings, TrainerSettings, check_trainer
from palate.runtime import checkpoint, sharding
from palate.runtime.distributed import Ranks
from palate.runtime.environment import versions
from palate.runtime.errors import CheckpointError, NonFiniteError
from palate.runtime.files import in_shell
from palate.runtime.runlog import RunLog
from palate.train.batches import Batches, Samples
from palate.train.python_recipe import from_python
from palate.train.state import Counters, Replicas, Weights
from palate.train.update import Stream, Updater, as_trained

MAX_BAD_STEPS = 3  # updates in a row that are not finite, then the run stops


def _kept(value: Tensor) -> Tensor:
    """A copy in the host's memory: beside the weights and their moments a card has no room for a second set. A piece of
    a sharded tensor stays, since it is gathered where it is."""
    return value.detach().clone() if sharding.is_cut(value) else value.detach().to("cpu", copy=True)


class Snapshot(NamedTuple):
    """What a step starts from: tensors (none where the weights are known to stay) and the algorithm's states."""

    tensors: dict[str, Tensor]
    algorithms: list[dict[str, Any]]


@dataclasses.dataclass
class Failures:
    """Keeps what a step needs to be reproduced, and stops a run that fails again and again."""

    folder: Path
    settings: TrainerSettings
    weights: Weights
    replicas: Replicas
    counters: Counters
    ranks: Ranks
    base: str  # fingerprint of the base weights
    note: Callable[[str], None]

    def snapshot(self, updates: int) -> Snapshot:
        """What the coming step starts from; `updates` is how many the last one made.

        A step that makes one update leaves the weights alone when that goes wrong, so only one that makes several, or
        a number not known yet, has them copied now, with the optimizer. Where several names are trained the last step's
        number says nothing of this one's: Diff-Instruct*'s assistant first learns alone.
        """
        state = {} if updates == 1 and len(self.weights.parameters) == 1 else self.weights.state_dict()
        return Snapshot({key: _kept(value) for key, value in state.items()}, self.replicas.states())

    def skip(self, problem: str, before: Snapshot, samples: Samples, log: RunLog, save: Callable[[], None]) -> None:
        """Log the step and write its bundle. NonFiniteError: it was one of several in a row; `save` is called first."""
        counters = self.counters
        counters.skipped += 1
        counters.bad_in_a_row += 1
        log.write({"step": counters.step, "event": "skip", "reason": problem, "in_a_row": counters.bad_in_a_row})
        bundle = self._bundle(problem, before, samples)
        by_hand = f"palate.train.replay({str(bundle)!r}, model, algorithm, reward)"
        where = f"palate replay {in_shell(bundle)}" if self._recipe() else by_hand
        self.note(f"step {counters.step}: {problem}; this update is skipped. To see where: {where}")
        if counters.bad_in_a_row < MAX_BAD_STEPS:
            return
        save()
        raise NonFiniteError(
            f"stopped at step {counters.step}: {problem}, {counters.bad_in_a_row} times in a row. The weights of the "
            f"last good step are in {self.folder / 'checkpoints' / checkpoint.name(counters.step)}. See where it "
            f"arises with `{where}`; lower trainer.lr or trainer.clip_norm, or look at the reward"
        )

    def _recipe(self) -> str | None:
        """The text from which `palate replay` builds the run's parts; None of a run that Python began."""
        file = self.folder / "recipe.yaml"
        return file.read_text("utf-8") if file.is_file() and not from_python(self.folder) else None

    def _bundle(self, problem: str, before: Snapshot, samples: Samples) -> Path:
        """Write what `reproduce_step` needs; the newest bundle replaces the one before."""
        tensors = before.tensors
        if not tensors:
            trained = self.weights.parameters.items()
            tensors = {f"weights/{name}/{i:04d}": p for name, ps in trained for i, p in enumerate(ps)}
        tensors = {key: sharding.gather(value) for key, value in tensors.items()}
        if samples.latents is not None:
            tensors["batch/latents"] = samples.latents
        state = {
            "reason": problem,
            "trains": list(self.weights.parameters),
            "prompts": samples.prompts,
            "ids": samples.ids.tolist(),
            "size": samples.size,
            **self.replicas.gather(before.algorithms, tensors),
            "settings": dataclasses.asdict(self.settings),
            "lr_scale": self.counters.lr_scale,
            "recipe": self._recipe(),
            "base_fingerprint": self.base,
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        folder, step = self.folder / "failures", self.counters.step

        def write() -> None:
            try:
                checkpoint.save(folder, step, tensors, state)
                checkpoint.prune(folder, keep=1, also=set())
            except CheckpointError as error:  # the run can go on without its bundle
                self.note(str(error))

        self.ranks.on_main(write)
        return folder / checkpoint.name(step)


def reproduce_step(
    model: Model,
    algorithm: Algorithm,
    reward: Reward,
    bundle: checkpoint.Checkpoint,
    *,
    watch: Callable[[Stream], Stream] = iter,
) -> tuple[dict[str, float], str]:
    """Run the step of a failure bundle again, exactly as the loop did: (metrics, what was not finite or "").

    Changes the weights of `model` and the state of `algorithm` to those that the step started from. watch: sees the
    losses go by. CheckpointError: the bundle is of other base weights, or of another shape.
    """
    state, ranks = bundle.state, Ranks()
    settings = check_trainer({
        **state["settings"], "guard": GuardSettings(every=0), "threads": state["threads"], "ema_decay": 0.0,
        "micro_batches": state["shares"], "sharding": "none",
    })  # fmt: skip
    if settings.threads:
        torch.set_num_threads(settings.threads)
    batches = Batches(
        model, state["prompts"], None, seed=settings.seed, size=settings.batch_size,
        micro_batches=settings.micro_batches, ranks=ranks,
    )  # fmt: skip
    replicas = Replicas(algorithm, settings.micro_batches, ranks)
    if (model.fingerprint() if isinstance(model, Fingerprinted) else "") != state["base_fingerprint"]:
        raise CheckpointError("the bundle was made with other base weights; install the version it was made with")
    weights = Weights(model, algorithm.trains, settings)
    weights.load_state_dict(bundle)
    replicas.load(bundle)
    samples = Samples(state["prompts"], torch.tensor(state["ids"]), bundle.tensors.get("batch/latents"))
    weights.forget_gradients()
    streams = [
        watch(each.step(model, reward, batch, Random(settings.seed, bundle.step, batch.ids)))
        for each, batch in zip(replicas.algorithms, batches.split(samples), strict=True)
    ]
    updater = Updater(weights, ranks, micro_batches=settings.micro_batches)
    size = state.get("size")
    with as_trained(model), at_size(model, tuple(size) if isinstance(size, list) else size, "prompts.sizes"):
        return updater.step(streams, bundle.step, state["lr_scale"])

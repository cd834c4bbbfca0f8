"""What a checkpoint holds: trained weights, the algorithm's replicas, counters. Each part saves and loads itself.

A checkpoint's tensors are weights/NAME/i, ema/NAME/i, optimizer/NAME/i/MOMENT and algorithm/...; all else is its state.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from palate.core import Algorithm, Model, Stateful, Steerable
from palate.recipe import TrainerSettings
from palate.runtime import checkpoint, sharding
from palate.runtime.distributed import Ranks
from palate.runtime.errors import CheckpointError, InputError
from palate.runtime.files import json_digest
from palate.train.optimizers import load_moments, make_optimizer, moments_of


@dataclasses.dataclass
class Counters:
    """Where a run is."""

    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    lr_scale: float = 1.0
    finished: str = ""  # "", "finished" or "guard: ..."

    def state_dict(self) -> dict[str, Any]:
        """All but the step, which a checkpoint has by itself."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "step"}

    def load_state_dict(self, step: int, state: Mapping[str, Any]) -> None:
        self.step = step
        self.skipped, self.bad_in_a_row = state["skipped"], state["bad_in_a_row"]
        self.lr_scale, self.finished = state["lr_scale"], state["finished"]


def learning_rate(step: int, lr: float, warmup: int) -> float:
    """Constant after a linear rise over `warmup` steps; step counts from 1."""
    return lr * min(1.0, step / warmup) if warmup else lr


class Weights:
    """What is trained: the parameters by name, AdamW over each name, and the running average where one is kept."""

    def __init__(self, model: Model, trains: Sequence[str], settings: TrainerSettings):
        self.settings = settings
        self.parameters = {name: list(model.parameters(name)) for name in trains}
        for name, parameters in self.parameters.items():
            if not parameters:
                raise InputError(
                    f"the model has no trainable {name} parameters; load it with training='lora' or 'full'"
                )
        self.optimizers = {
            name: make_optimizer(parameters, self.rates[name], settings) for name, parameters in self.parameters.items()
        }
        keep = settings.ema_decay > 0
        self.ema = {n: [p.detach().clone() for p in ps] for n, ps in self.parameters.items()} if keep else {}

    @property
    def rates(self) -> dict[str, float]:
        """The settings' learning rate of each name."""
        return {name: (self.settings.lrs or {}).get(name, self.settings.lr) for name in self.parameters}

    def learning_rate(self, name: str, step: int, scale: float) -> float:
        """What the update of a step uses."""
        return learning_rate(step, self.rates[name] * scale, self.settings.warmup)

    def update(self, name: str, step: int, scale: float) -> None:
        """AdamW with the gradients that are there."""
        optimizer = self.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(name, step, scale)
        optimizer.step()

    def forget_gradients(self, *names: str) -> None:
        for name in names or tuple(self.parameters):
            self.optimizers[name].zero_grad(set_to_none=True)

    def average(self, step: int) -> None:
        """Move the running average towards the weights, every `trainer.ema_every` steps."""
        if step % self.settings.ema_every:
            return
        for name, averages in self.ema.items():
            for average, parameter in zip(averages, self.parameters[name], strict=True):
                average.lerp_(parameter.detach(), 1 - self.settings.ema_decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model predicts with the averaged weights, where an average is kept."""
        kept = {name: [p.detach().clone() for p in self.parameters[name]] for name in self.ema}
        try:
            for name, averages in self.ema.items():
                _assign(self.parameters[name], averages)
            yield
        finally:
            for name, values in kept.items():
                _assign(self.parameters[name], values)

    def size(self) -> int:
        """Bytes of the parameters."""
        return sum(p.numel() * p.element_size() for ps in self.parameters.values() for p in ps)

    def digest(self) -> str:
        return tensors_digest(self.parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an update changes, by the names of a checkpoint: weights, averages, optimizer moments."""
        tensors: dict[str, Tensor] = {}
        for name, parameters in self.parameters.items():
            tensors |= {f"weights/{name}/{i:04d}": p for i, p in enumerate(parameters)}
            tensors |= {f"ema/{name}/{i:04d}": p for i, p in enumerate(self.ema.get(name, ()))}
            for i, moments in moments_of(self.optimizers[name]).items():
                tensors |= {f"optimizer/{name}/{i:04d}/{key}": value for key, value in moments.items()}
        return tensors

    def load_state_dict(self, saved: checkpoint.Checkpoint) -> None:
        """Take a checkpoint's. CheckpointError: it trains other names, or has other shapes."""
        if saved.state["trains"] != list(self.parameters):
            raise CheckpointError(f"the checkpoint trains {saved.state['trains']}, this run {list(self.parameters)}")
        for name, parameters in self.parameters.items():
            copy_into(parameters, saved.tensors, f"weights/{name}")
            if self.ema:
                copy_into(self.ema[name], saved.tensors, f"ema/{name}")
            kind = self.settings.optimizer
            load_moments(self.optimizers[name], parameters, saved.tensors, f"optimizer/{name}", kind)


class Replicas:
    """One algorithm object for each of this rank's micro-batches: each keeps a state of its own."""

    def __init__(self, algorithm: Algorithm, micro_batches: int, ranks: Ranks):
        self.algorithms = [algorithm, *(copy.deepcopy(algorithm) for _ in range(micro_batches - 1))]
        self.ranks = ranks

    def states(self) -> list[dict[str, Any]]:
        return [each.state_dict() if isinstance(each, Stateful) else {} for each in self.algorithms]

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        for algorithm, state in zip(self.algorithms, states, strict=True):
            if isinstance(algorithm, Stateful):
                algorithm.load_state_dict(state)

    def check_states(self) -> None:
        """InputError: the algorithm's state holds what no checkpoint can."""
        for state in self.states()[:1]:
            try:
                json.dumps(checkpoint.flatten_state(state, "algorithm", {}))
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{type(self.algorithms[0]).__name__}.state_dict: {error}; a checkpoint holds tensors, numbers, "
                    "texts, and lists and dictionaries of them"
                ) from error

    def gather(self, states: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The algorithm's part of a checkpoint: "algorithm" where all replicas agree, else one each in "algorithms".

        Its tensors are added to `tensors`, on rank 0 those of all ranks.
        """
        total = self.ranks.size * len(states)
        first: dict[str, Tensor] = {}
        plain = checkpoint.flatten_state(states[0], "algorithm", first)
        first = {key: sharding.gather_to_host(value) for key, value in first.items()}
        if total == 1 or len(set(self._of_all([state_digest(state) for state in states]))) == 1:
            tensors |= first
            return {"shares": total, "algorithm": plain}
        own: dict[str, Tensor] = {}
        start = self.ranks.rank * len(states)
        trees = [checkpoint.flatten_state(state, f"algorithm/{start + k}", own) for k, state in enumerate(states)]
        for theirs in self.ranks.gather_tensors(own):
            tensors |= theirs
        return {"shares": total, "algorithm": {}, "algorithms": self._of_all(trees)}

    def load(self, saved: checkpoint.Checkpoint, *, words: bool = True) -> None:
        """Take a checkpoint's. InputError: it is of another number of replicas. words: also of those that are steered;
        without, they keep the words in force."""
        each, mine = saved.state.get("algorithms"), len(self.algorithms)
        if each and len(each) != self.ranks.size * mine:
            raise InputError(
                f"this run's algorithm keeps a state for each of its {len(each)} parts of a batch (ranks x "
                f"trainer.micro_batches), and now there are {self.ranks.size} x {mine}; continue with as many"
            )
        for k, algorithm in enumerate(self.algorithms):
            tree = each[self.ranks.rank * mine + k] if each else saved.state["algorithm"]
            if tree and isinstance(algorithm, Stateful) and (words or not isinstance(algorithm, Steerable)):
                algorithm.load_state_dict(checkpoint.unflatten_state(tree, saved.tensors))

    def _of_all(self, own: list[Any]) -> list[Any]:
        return list(itertools.chain.from_iterable(self.ranks.all_gather_json(own)))


# ------------------------------------------------------------------------------------------------- tensors of a state


def copy_into(targets: Sequence[Tensor], tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Fill `targets` from PREFIX/0000, PREFIX/0001, ...; CheckpointError: another number, shape or type."""
    expected = [f"{prefix}/{i:04d}" for i in range(len(targets))]
    got = sorted(key for key in tensors if key.startswith(f"{prefix}/"))
    if got != expected:
        raise CheckpointError(f"the checkpoint holds {len(got)} tensors of {prefix}, the model {len(expected)}")
    for key, target in zip(expected, targets, strict=True):
        value = tensors[key]
        if value.shape != target.shape or value.dtype != target.dtype:
            raise CheckpointError(
                f"{key} is {value.dtype} {tuple(value.shape)} in the checkpoint, "
                f"{target.dtype} {tuple(target.shape)} here"
            )
    _assign(targets, [tensors[key] for key in expected])


@torch.no_grad()
def _assign(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(sharding.shard_like(value, target))


def state_digest(state: dict[str, Any]) -> str:
    """SHA-256 of a tree of tensors, numbers and texts."""
    tensors: dict[str, Tensor] = {}
    plain = checkpoint.flatten_state(state, "algorithm", tensors)
    return json_digest([plain, tensors_digest({"": [sharding.gather(tensor) for tensor in tensors.values()]})])


def tensors_digest(named: Mapping[str, Sequence[Tensor] | Sequence[nn.Parameter]]) -> str:
    """SHA-256 of names and bytes; sharded tensors are gathered first."""
    digest = hashlib.sha256()
    for name, tensors in named.items():
        digest.update(name.encode())
        for tensor in tensors:
            whole = sharding.gather(tensor.detach())
            digest.update(whole.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

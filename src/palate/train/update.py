"""One step of the algorithm turned into updates: backward, the mean over micro-batches and ranks, clipping, AdamW.

Every micro-batch of every rank has its own run of the algorithm; all of them go on to their next update, then that
update is made. A step of which any loss or gradient norm is not finite makes no further update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from palate.core import Algorithm, Loss, Model, TrainsOtherwise
from palate.runtime import sharding
from palate.runtime.distributed import Ranks
from palate.runtime.errors import InputError
from palate.train.state import Weights

Stream = Iterator[Loss]
KEPT_NAMES = ("step", "event")  # of a row of metrics.jsonl


def as_trained(model: Model) -> AbstractContextManager[None]:
    """Inside, the model is what it trains as; steps and their backward passes run in it."""
    return model.while_training() if isinstance(model, TrainsOtherwise) else nullcontext()


class MetricAverager:
    """The loss and the metrics of one micro-batch's step."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.found: dict[str, list[float]] = {}

    def add(self, loss: Loss) -> None:
        for key, value in loss.metrics.items():
            if key in KEPT_NAMES:
                raise InputError(f"a metric is named {key}, which each row of metrics.jsonl has; give it another name")
            self.found.setdefault(key, []).append(float(value))

    def means(self) -> dict[str, float]:
        return {"loss": self.loss} | {key: sum(values) / len(values) for key, values in self.found.items()}


def mean_of_rows(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    values = {key: [row[key] for row in rows if key in row] for key in keys}
    return {key: sum(found) / len(found) for key, found in values.items()}


class Updater:
    """Makes the updates of a step on `weights`.

    sharded: the networks that are cut over the ranks. diagnose: says why a gradient may be missing; asked in step 1
    only, when `check_gradient` is set.
    """

    def __init__(
        self, weights: Weights, ranks: Ranks, *, micro_batches: int, sharded: Sequence[nn.Module] = (),
        diagnose: Callable[[], str] = str
    ):  # fmt: skip
        self.weights, self.ranks, self.micro_batches = weights, ranks, micro_batches
        self.sharded, self.diagnose = sharded, diagnose
        self.check_gradient = False
        self.losses = 0  # of all steps
        self.updates = 0  # that the last step made; 0 = no step yet

    def step(self, streams: Sequence[Stream], step: int, scale: float = 1.0) -> tuple[dict[str, float], str]:
        """(metrics, "") or, if anything was not finite and no update was made of it, (metrics, what it was).

        streams: the losses of the algorithm, one for each of this rank's micro-batches. scale: of the learning rates.
        """
        averagers = [MetricAverager() for _ in streams]
        norms: dict[str, float] = {}
        problem, self.updates = "", 0
        while True:
            name, problem = self._to_next_update(streams, averagers, problem)
            if name is None:
                break
            self.updates += 1
            norms[name], problem = self._optimize(name, step, scale, problem)
        metrics = mean_of_rows(self.ranks.all_gather_json(mean_of_rows([each.means() for each in averagers])))
        metrics |= {"grad_norm" if name == "policy" else f"grad_norm_{name}": norm for name, norm in norms.items()}
        for name in self.weights.parameters:
            metrics["lr" if name == "policy" else f"lr_{name}"] = self.weights.learning_rate(name, step, scale)
        return metrics, problem

    def require_losses(self, algorithm: Algorithm) -> None:
        """InputError: no step of the run yielded a loss."""
        if not self.losses:
            raise InputError(f"{type(algorithm).__name__}.step yielded no loss in any step, so nothing was trained")

    def _to_next_update(
        self, streams: Sequence[Stream], averagers: Sequence[MetricAverager], problem: str
    ) -> tuple[str | None, str]:
        """Backward through every micro-batch's losses up to its next update: (its weights or None at the end, problem).

        Leaves in p.grad the sum over this rank's micro-batches, each of them added up by itself first, as if it were a
        rank.
        """
        everything = [p for parameters in self.weights.parameters.values() for p in parameters]
        sums: list[Tensor | None] = [None] * len(everything)
        names: set[str | None] = set()
        error = None
        try:
            for stream, averager in zip(streams, averagers, strict=True):
                name, problem = self._one_to_next_update(stream, averager, problem)
                names.add(name)
                if len(streams) == 1:
                    break
                for i, p in enumerate(everything):
                    if p.grad is not None:
                        total = sums[i]
                        sums[i] = p.grad if total is None else total.add_(p.grad)
                        p.grad = None
        except ValueError as caught:
            error = caught
        if error and self.sharded:  # the other ranks wait inside a network, where they cannot hear of it: they lose us
            raise error
        if not self.sharded:
            self.ranks.raise_if_any(error)
        if len(streams) > 1:
            for p, total in zip(everything, sums, strict=True):
                p.grad = total
        gathered = self.ranks.all_gather_json([sorted(names, key=str), problem])
        if len({name for theirs, _ in gathered for name in theirs}) > 1:
            raise InputError(
                f"the micro-batches of a step ask for different updates: {gathered}; an algorithm must not do that"
            )
        return gathered[0][0][0], next((wrong for _, wrong in gathered if wrong), "")

    def _one_to_next_update(self, stream: Stream, averager: MetricAverager, problem: str) -> tuple[str | None, str]:
        unused = False
        for loss in stream:
            unused = loss.value.requires_grad
            if loss.value.ndim:
                raise InputError(f"the loss has shape {tuple(loss.value.shape)}; expected a scalar")
            averager.add(loss)
            self.losses += 1
            if loss.update is not None and loss.update not in self.weights.parameters:
                known = ", ".join(self.weights.parameters)
                raise InputError(f"a loss updates {loss.update!r}; the algorithm's `trains` has {known}")
            if not problem and not torch.isfinite(loss.value):
                problem = f"the loss is {float(loss.value.detach())}"
            if self.sharded:  # their backward reduces over the ranks, so all ranks run it or none
                problem = next((wrong for wrong in self.ranks.all_gather_json(problem) if wrong), "")
                each = self.weights.settings.reduce_gradients == "loss"
                sharding.sync_gradients(self.sharded, each or loss.update is not None)
            if not problem:
                averager.loss += float(loss.value.detach())
            if not problem or self.sharded:  # FSDP would keep an unfinished sum of gradients for the next step
                self._backward(loss)
            if loss.update:
                return loss.update, problem
        if unused:
            raise InputError(
                "the step's last loss names no weights to update, so that its gradient would be thrown away; yield it "
                'as Loss(value, metrics, "policy")'
            )
        return None, problem

    def _backward(self, loss: Loss) -> None:
        if loss.value.requires_grad:
            loss.value.backward()
        elif self.check_gradient:
            cause = self.diagnose() or "its values are detached from the policy"
            raise InputError(f"the loss of step 1 carries no gradient. Likely cause: {cause}")

    def _optimize(self, name: str, step: int, scale: float, problem: str) -> tuple[float, str]:
        """Clip and update the named weights unless something is not finite: (gradient norm, what is wrong or "")."""
        parameters = self.weights.parameters[name]
        self._average_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = sharding.global_norm(gradients)
        if not problem and not math.isfinite(norm):
            problem = f"the norm of the {name} gradient is {norm}"
        if not problem and self.check_gradient and norm == 0.0:
            cause = self.diagnose() or ("" if gradients else "the loss does not depend on these weights")
            if cause:
                raise InputError(
                    f"the {name} gradient of step 1 is zero in all {len(parameters)} tensors. Likely cause: {cause}"
                )
        if not problem:
            clip = self.weights.settings.clip_norm
            if clip and norm > clip:
                for gradient in gradients:
                    gradient.mul_(clip / norm)
            self.weights.update(name, step, scale)
        self.weights.forget_gradients(name)
        return norm, problem

    def _average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """From this rank's sum over micro-batches to the mean over all of them, once, before the norm is taken."""
        if self.micro_batches > 1:
            for p in parameters:
                if p.grad is not None:
                    p.grad /= self.micro_batches
        if self.ranks.size == 1 or self.sharded:  # sharded networks have reduced theirs in backward
            return
        held = self.ranks.all_gather_json("".join("01"[p.grad is not None] for p in parameters))
        for p, marks in zip(parameters, zip(*held, strict=True), strict=True):
            if p.grad is None and "1" in marks:
                p.grad = torch.zeros_like(p)
        self.ranks.average([p.grad for p in parameters if p.grad is not None])

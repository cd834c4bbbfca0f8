"""Reproduce a step whose update was not finite, from the bundle that the loop left, and say where it went wrong first.

A bundle is a checkpoint folder, runs/NAME/failures/step-NNNNNN: the weights that the step started from, its prompts and
sample ids, the algorithm's state, the recipe. All random numbers follow from them, so the step is the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palate.core import Algorithm, Batch, Loss, Model, Random, Reward
from palate.runtime import checkpoint


class Finding(NamedTuple):
    step: int
    reported: str  # what the run said
    reproduced: str  # what is not finite now, or "" if the step no longer fails
    trace: list[str]  # everything that was not finite, in the order in which it was computed
    metrics: dict[str, float]

    def text(self) -> str:
        lines = [f"step {self.step}, in the run: {self.reported}"]
        if not self.reproduced:
            return "\n".join([*lines, "again now: every value is finite, the step no longer fails"])
        lines.append(f"again now: {self.reproduced}")
        if self.trace:
            lines.append(f"first value that is not finite: {self.trace[0]}")
            lines += [f"  then {entry}" for entry in self.trace[1:MOST]]
        if len(self.trace) > MOST:
            lines.append(f"  and {len(self.trace) - MOST} more")
        return "\n".join([*lines, "metrics: " + ", ".join(f"{key} {value:.4g}" for key, value in self.metrics.items())])


MOST = 12  # entries of a trace that are printed


def replay(bundle: str | Path, model: Model, algorithm: Algorithm, reward: Reward) -> Finding:
    """Run the bundle's step again on the objects that the run was started with; their state becomes the bundle's.

    CheckpointError: the bundle is damaged, or of other weights.
    """
    from palate.train import repeat

    saved = checkpoint.load(Path(bundle))
    trace: list[str] = []
    seen: set[str] = set()

    def note(what: str) -> None:
        if what not in seen:
            seen.add(what)
            trace.append(what)

    hooks = [
        parameter.register_hook(lambda gradient, name=name: _look(gradient, f"the gradient of {name}", note))
        for name, parameter in _named(model, saved.state["trains"])
    ]
    watched = _WatchedModel(model, note), _WatchedAlgorithm(algorithm, note), _WatchedReward(reward, note)
    try:
        metrics, problem = repeat(*watched, saved)
    finally:
        for hook in hooks:
            hook.remove()
    return Finding(saved.step, saved.state["reason"], problem, trace, metrics)


class _Watched:
    """Behaves as what it wraps; subclasses look at what some of its methods return."""

    def __init__(self, inner: Any, note: Callable[[str], None]):
        self._inner, self._note = inner, note

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copy.deepcopy asks of an object that has nothing inside yet
            raise AttributeError(name)
        return getattr(self._inner, name)


class _WatchedModel(_Watched):
    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        cond = self._inner.encode_prompts(prompts)
        for name, tensor in _tensors(cond):
            _look_rows(tensor, f"model.encode_prompts{name}", prompts, self._note)
        return cond

    def predict(self, xt: Tensor, t: Tensor, cond: Any, **options: Any) -> Any:
        speaker = options.get("weights", "policy")
        for name, tensor in (("its latents", xt), ("its times", t)):
            _look(tensor, f"{name}, given to model.predict ({speaker})", self._note)
        pred = self._inner.predict(xt, t, cond, **options)
        if not (torch.isfinite(pred.x0).all() and torch.isfinite(pred.eps).all()):
            self._note(f"model.predict ({speaker}) at t = {', '.join(f'{float(x):.3f}' for x in t[:4])}")
        return pred

    def decode(self, latents: Tensor) -> Tensor:
        images = self._inner.decode(latents)
        _look(images, "model.decode", self._note)
        if images.requires_grad:
            what = "the gradient of the reward for the images"
            images.register_hook(lambda gradient: _look(gradient, what, self._note))
        return images


class _WatchedReward(_Watched):
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._seen(self._inner(images, prompts), prompts)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name == "score":  # of a two-tower reward
            return lambda features, prompts: self._seen(found(features, prompts), prompts)
        return found

    def _seen(self, values: Tensor, prompts: Sequence[str]) -> Tensor:
        _look_rows(values, "the reward", prompts, self._note)
        return values


class _WatchedAlgorithm(_Watched):
    def step(self, model: Model, reward: Reward, batch: Batch, rng: Random) -> Iterator[Loss]:
        for number, loss in enumerate(self._inner.step(model, reward, batch, rng), 1):
            for name, value in loss.metrics.items():
                if not torch.isfinite(torch.as_tensor(value)).all():
                    self._note(f"metric {name} of loss {number}, {float(value)}")
            if not torch.isfinite(loss.value).all():
                self._note(f"loss {number} of the step, {float(loss.value.detach())}")
            yield loss


def _look(tensor: Tensor, what: str, note: Callable[[str], None]) -> None:
    bad = int((~torch.isfinite(tensor.detach())).sum())
    if bad:
        note(f"{what}, {bad} of {tensor.numel()} numbers")


def _look_rows(values: Tensor, what: str, prompts: Sequence[str], note: Callable[[str], None]) -> None:
    """`_look` at a batch: names the first prompt whose row is not finite."""
    good = torch.isfinite(values.detach()).flatten(1).all(1) if values.ndim > 1 else torch.isfinite(values.detach())
    if values.ndim and len(values) == len(prompts) and not good.all():
        row = int((~good).nonzero()[0])
        value = f" is {float(values[row].detach())}" if values.ndim == 1 else ""
        note(f"{what} of {prompts[row]!r}{value}")


def _tensors(cond: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(cond, Tensor):
        yield name, cond
    elif isinstance(cond, Mapping):
        for key, value in cond.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(cond, (list, tuple)):
        for i, value in enumerate(cond):
            yield from _tensors(value, f"{name}[{i}]")


def _named(model: Model, trains: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters with their names in the network they belong to, where it can be found."""
    holders = [vars(model), getattr(getattr(model, "weights", None), "networks", {})]
    modules = [module for holder in holders for module in holder.values() if isinstance(module, nn.Module)]
    names = {id(p): name for module in modules for name, p in module.named_parameters()}
    for name in trains:
        for i, parameter in enumerate(model.parameters(name)):
            yield f"{name} {names.get(id(parameter), f'parameter {i}')}", parameter

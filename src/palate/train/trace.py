"""Reproduce a step whose update was not finite, from the bundle of the loop, and say where it went wrong first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palate.core import Algorithm, HasFeatures, HasNetworks, Loss, Model, Reward, TwoTower
from palate.rewards.combine import Towers, WeightedTowers, as_scores
from palate.rewards.learned import BlackBox
from palate.runtime import checkpoint
from palate.train.failure import reproduce_step
from palate.train.update import Stream

MAX_ENTRIES = 12  # of a trace that are printed
Note = Callable[[str], None]


class Finding(NamedTuple):
    """Where a step became not finite when it was run again."""

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
            lines += [f"  then {entry}" for entry in self.trace[1:MAX_ENTRIES]]
        if len(self.trace) > MAX_ENTRIES:
            lines.append(f"  and {len(self.trace) - MAX_ENTRIES} more")
        return "\n".join([*lines, "metrics: " + ", ".join(f"{key} {value:.4g}" for key, value in self.metrics.items())])


def replay(bundle: str | Path, model: Model, algorithm: Algorithm, reward: Reward) -> Finding:
    """Run the bundle's step again on the objects that the run was started with; their state becomes the bundle's.

    CheckpointError: the bundle is damaged, or of other weights.
    """
    saved = checkpoint.load(Path(bundle))
    trace: list[str] = []

    def note(what: str) -> None:
        if what not in trace:
            trace.append(what)

    hooks = [
        parameter.register_hook(lambda gradient, name=name: _note_not_finite(gradient, f"the gradient of {name}", note))
        for name, parameter in _named(model, saved.state["trains"])
    ]
    try:
        with _watched_model(model, note):
            metrics, problem = reproduce_step(
                model,
                algorithm,
                _watched_reward(reward, note),
                saved,
                watch=lambda losses: _watched_losses(losses, note),
            )
    finally:
        for hook in hooks:
            hook.remove()
    return Finding(saved.step, saved.state["reason"], problem, trace, metrics)


@contextlib.contextmanager
def _watched_model(model: Model, note: Note) -> Iterator[None]:
    """Inside, what the model's methods are given and return is looked at."""
    encode_prompts, predict, decode = model.encode_prompts, model.predict, model.decode

    def watched_encode_prompts(prompts: Sequence[str]) -> Any:
        cond = encode_prompts(prompts)
        for name, tensor in _tensors(cond):
            _note_bad_row(tensor, f"model.encode_prompts{name}", prompts, note)
        return cond

    def watched_predict(xt: Tensor, t: Tensor, cond: Any, **options: Any) -> Any:
        weights = options.get("weights", "policy")
        for name, tensor in (("its latents", xt), ("its times", t)):
            _note_not_finite(tensor, f"{name}, given to model.predict ({weights})", note)
        pred = predict(xt, t, cond, **options)
        if not (torch.isfinite(pred.x0).all() and torch.isfinite(pred.eps).all()):
            note(f"model.predict ({weights}) at t = {', '.join(f'{float(x):.3f}' for x in t[:4])}")
        return pred

    def watched_decode(latents: Tensor) -> Tensor:
        images = decode(latents)
        _note_not_finite(images, "model.decode", note)
        if images.requires_grad:
            what = "the gradient of the reward for the images"
            images.register_hook(lambda gradient: _note_not_finite(gradient, what, note))
        return images

    own = vars(model)
    before = dict(own)
    own.update(encode_prompts=watched_encode_prompts, predict=watched_predict, decode=watched_decode)
    try:
        yield
    finally:
        for name in ("encode_prompts", "predict", "decode"):
            own.pop(name)
            if name in before:
                own[name] = before[name]


def _watched_reward(reward: Reward, note: Note) -> Reward:
    """The same reward, whose values are looked at; what an algorithm may ask of it besides stays."""

    def watched(ask: Callable[[Any, Sequence[str]], Any]) -> Callable[[Any, Sequence[str]], Tensor]:
        def seen(images: Any, prompts: Sequence[str]) -> Tensor:
            device = images.device if isinstance(images, Tensor) else torch.device("cpu")
            values: Tensor = as_scores(ask(images, prompts), device)  # as the loop takes them
            _note_bad_row(values, "the reward", prompts, note)
            return values

        return seen

    if isinstance(reward, WeightedTowers):  # of which the parts may be asked
        towers = reward.towers.items()
        return WeightedTowers({name: (weight, look, watched(rate)) for name, (weight, look, rate) in towers})
    if isinstance(reward, TwoTower):
        return Towers(reward.image_features, watched(reward.score))
    return BlackBox(watched(reward), reward.features) if isinstance(reward, HasFeatures) else watched(reward)


def _watched_losses(losses: Stream, note: Note) -> Iterator[Loss]:
    for number, loss in enumerate(losses, 1):
        for name, value in loss.metrics.items():
            if not torch.isfinite(torch.as_tensor(value)).all():
                note(f"metric {name} of loss {number}, {float(value)}")
        if not torch.isfinite(loss.value).all():
            note(f"loss {number} of the step, {float(loss.value.detach())}")
        yield loss


def _note_not_finite(tensor: Tensor, what: str, note: Note) -> None:
    """Note how many numbers of the tensor are not finite, if any."""
    bad = int((~torch.isfinite(tensor.detach())).sum())
    if bad:
        note(f"{what}, {bad} of {tensor.numel()} numbers")


def _note_bad_row(values: Tensor, what: str, prompts: Sequence[str], note: Note) -> None:
    """The same of a batch: names the first prompt whose row is not finite."""
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
    networks = model.weights.networks if isinstance(model, HasNetworks) else {}
    modules = [module for module in (*vars(model).values(), *networks.values()) if isinstance(module, nn.Module)]
    names = {id(p): name for module in modules for name, p in module.named_parameters()}
    for name in trains:
        for i, parameter in enumerate(model.parameters(name)):
            yield f"{name} {names.get(id(parameter), f'parameter {i}')}", parameter

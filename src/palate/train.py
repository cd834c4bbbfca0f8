"""The only training loop; it owns every side effect: backward, clipping, updates, averages, logs, checkpoints.

An algorithm yields losses and touches nothing else. Every random number is a function of (seed, sample id, step,
purpose), so a run continued from a checkpoint equals the uninterrupted one bit for bit, and previews or checks never
disturb it.

Step n is the n-th update (1, 2, ...); checkpoint and samples `step-NNNNNN` hold the weights after n updates.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import operator
import os
import platform
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.core import Algorithm, Batch, GuardMeasure, Loss, Model, Random, Reward, prompt_order
from palate.recipe import RESUMABLE_FIELDS, GuardSettings, TrainerSettings, check_trainer, evenly_spaced
from palate.runtime import checkpoint, distributed
from palate.runtime.errors import CheckpointError, InputError, NonFiniteError, OutOfMemoryError
from palate.runtime.files import new_folder, write_atomically, write_problem
from palate.runtime.progress import Progress
from palate.runtime.runlog import read_metrics as read_metrics
from palate.runtime.runlog import rewind as rewind

MAX_BAD_STEPS = 3  # updates in a row that are not finite, then the run stops
GUARD_SEEDS = 2  # images per guard prompt: diversity needs two, concept accuracy many prompts
Check = GuardMeasure


class Outcome(NamedTuple):
    folder: Path
    step: int
    reason: str  # "finished", "guard: ...", "signal"
    exit_code: int  # 0, or 128 + the signal's number


def train(
    model: Model,
    algorithm: Algorithm,
    reward: Reward,
    prompts: Sequence[str],
    *,
    folder: str | Path,
    steps: int = 40,
    batch_size: int = 16,
    lr: float = 1e-5,
    lrs: dict[str, float] | None = None,
    weight_decay: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    clip_norm: float = 1.0,
    warmup: int = 0,
    ema_decay: float = 0.0,
    seed: int = 0,
    checkpoint_every: int = 20,
    keep_checkpoints: int = 2,
    preview_every: int = 0,
    preview_prompts: int = 16,
    threads: int = 0,
    micro_batches: int = 1,
    sharding: str = "none",
    guard: GuardSettings | None = None,
    preview: Sequence[str] | None = None,
    sample_steps: int | None = None,
    sample_guidance: float | None = None,
    latents: Tensor | None = None,
    check: Check | None = None,
    identity: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Outcome:
    """Train `model` in place and write everything into `folder`. The first group of options is `TrainerSettings`.

    preview: prompts of the previews and, all of them, of the guard (spread over `prompts` if None); sample_steps,
    sample_guidance: how they are drawn (None = the model's default). latents (N, C, h, w): clean latents of N real
    images captioned by `prompts` (offline training). check: what the guard measures (None =
    `palate.evaluate.quick_check`); guard None = off. identity: a hash that a resumed run must share (None = hash of
    the settings). Inside `palate.runtime.distributed.join` every rank calls this with the same arguments, and
    `batch_size` is what all of them work on together. ValueError: what was given cannot work.
    """
    settings = check_trainer({
        "steps": steps, "batch_size": batch_size, "lr": lr, "lrs": lrs, "weight_decay": weight_decay, "betas": betas,
        "clip_norm": clip_norm, "warmup": warmup, "ema_decay": ema_decay, "seed": seed,
        "checkpoint_every": checkpoint_every, "keep_checkpoints": keep_checkpoints, "preview_every": preview_every,
        "preview_prompts": preview_prompts, "threads": threads, "micro_batches": micro_batches, "sharding": sharding,
        "guard": guard or GuardSettings(every=0),
    })  # fmt: skip
    prompts = list(prompts)
    if not prompts:
        raise InputError("got no prompts; give at least one")
    if latents is not None and len(latents) != len(prompts):
        raise InputError(f"got {len(latents)} latents and {len(prompts)} prompts; expected one prompt an image")
    if latents is not None and not torch.isfinite(latents).all():
        bad = int((~torch.isfinite(latents).flatten(1).all(1)).nonzero()[0])
        raise InputError(
            f"the latents of image {bad} ({prompts[bad]!r}) are not finite; expected numbers: encode it again"
        )
    if unknown := sorted(set(lrs or ()) - set(algorithm.trains)):
        raise InputError(f"trainer.lrs.{unknown[0]}: the algorithm trains {', '.join(algorithm.trains)}")
    if hasattr(algorithm, "sampler") and (sample_steps is not None or sample_guidance is not None):
        raise InputError("sample.steps, sample.guidance: a generator draws as it was trained; leave them out")
    run = _Run(model, algorithm, reward, prompts, Path(folder), settings)
    run.guard_prompts = list(preview) if preview else evenly_spaced(prompts)
    run.preview_prompts = run.guard_prompts[: settings.preview_prompts]
    run.sample_steps, run.sample_guidance, run.latents = sample_steps, sample_guidance, latents
    run.check, run.identity = (
        check,
        identity or _hash({**dataclasses.asdict(settings), **dict.fromkeys(RESUMABLE_FIELDS)}),
    )
    run.visible = progress and run.ranks.first
    with _signals() as stop:
        return run.go(stop, resume=resume)


def steer(folder: str | Path, positive: Sequence[str] | None = None, negative: Sequence[str] | None = None) -> None:
    """Change the control words of the run in `folder`, from its next step on; None keeps a list."""
    folder = Path(folder)
    words = {"positive": positive, "negative": negative}
    if positive is None and negative is None:
        raise InputError("steer got neither positive nor negative words; give at least one list")
    for side, given in words.items():
        if given is None:
            continue
        if isinstance(given, str) or not given or not all(isinstance(word, str) and word.strip() for word in given):
            raise InputError(f"{side}: expected a list of words, none empty, got {given!r}")
        words[side] = [word.strip() for word in given]
    if not (folder / "metrics.jsonl").is_file():
        raise InputError(f"{folder} is not a run (it holds no metrics.jsonl); give the folder of one, as runs/NAME")
    if (folder / "recipe.yaml").is_file():  # a run begun from Python has none
        from palate import recipe as recipes

        plan = recipes.read(str(folder / "recipe.yaml"))
        if not hasattr(recipes.build_algorithm(plan), "steer"):
            raise InputError(f"{folder} trains with {plan.algorithm.name}, which has no control words to change")
    control = folder / "control.json"
    with contextlib.suppress(FileNotFoundError, ValueError):  # what still waits for the next step is not lost
        waiting = _control_words(control.read_bytes())
        words = {side: waiting[side] if given is None else given for side, given in words.items()}
    write_atomically(control, json.dumps(words).encode())


def _control_words(text: bytes) -> dict[str, Any]:
    words = json.loads(text)
    if not isinstance(words, dict) or set(words) != {"positive", "negative"}:
        raise InputError("expected the keys positive and negative")
    if not all(v is None or (isinstance(v, list) and all(isinstance(w, str) for w in v)) for v in words.values()):
        raise InputError("expected lists of words, or null")
    return words


def learning_rate(step: int, lr: float, warmup: int) -> float:
    """Constant after a linear rise over `warmup` steps; step counts from 1."""
    return lr * min(1.0, step / warmup) if warmup else lr


def restore_result(model: Model, folder: Path, *, warn: Callable[[str], None]) -> int:
    """Put the newest good checkpoint's weights (the average, if one was kept) into `model`; returns its step."""
    saved = checkpoint.load_newest(folder / "checkpoints", warn=warn)
    source = "ema" if any(key.startswith("ema/") for key in saved.tensors) else "weights"
    for name in saved.state["trains"]:
        _copy_into(model.parameters(name), saved.tensors, f"{source}/{name}")
    return saved.step


def repeat(
    model: Model, algorithm: Algorithm, reward: Reward, bundle: checkpoint.Checkpoint
) -> tuple[dict[str, float], str]:
    """Run the step of a failure bundle again, exactly as the loop did: (metrics, what was not finite or "").

    Changes the weights of `model` and the state of `algorithm` to those that the step started from.
    CheckpointError: the bundle is of other base weights, or of another shape.
    """
    state = bundle.state
    settings = check_trainer({
        **state["settings"], "guard": GuardSettings(every=0), "threads": state["threads"], "ema_decay": 0.0,
        "micro_batches": state["shares"], "sharding": "none",
    })  # fmt: skip
    run = _Run(model, algorithm, reward, state["prompts"], Path(), settings)
    run._prepare()
    if run.base != state["base_fingerprint"]:
        raise CheckpointError("the bundle was made with other base weights; install the version it was made with")
    run.lr_scale = state["lr_scale"]
    run._load_tensors(bundle)
    run._load_algorithms(bundle)
    shares = run._shares(state["prompts"], torch.tensor(state["ids"]), bundle.tensors.get("batch/latents"))
    return run._update(bundle.step, shares, check_gradient=False)


class _Run:
    """One run's mutable state, and the loop."""

    def __init__(
        self,
        model: Model,
        algorithm: Algorithm,
        reward: Reward,
        prompts: list[str],
        folder: Path,
        settings: TrainerSettings,
    ):
        self.model, self.algorithm, self.reward, self.prompts = model, algorithm, reward, prompts
        self.folder, self.settings, self.ranks = folder, settings, distributed.ranks()
        self.step = self.skipped = self.bad_in_a_row = 0
        self.lr_scale = 1.0
        self.finished = ""
        self.guard: dict[str, Any] = {
            "base": None,
            "best_step": None,
            "best_value": None,
            "rollbacks": 0,
            "sums": {},
            "steps": 0,
        }
        self.words: list[dict[str, Any]] = []  # steering events to replay, after a resume
        self.control = b""  # the control file as it was read
        self.best_checked = False  # whether trainer.guard.best is known to be a metric
        self.said: set[str] = set()
        self.sampler = getattr(algorithm, "sampler", None)  # evaluate.Sampler; None = the model is sampled as usual
        self.updates = 0  # made by one step of the algorithm; 0 = not known yet
        self.guard_prompts: list[str] = []
        self.preview_prompts: list[str] = []
        self.sample_steps: int | None = None
        self.sample_guidance: float | None = None
        self.latents: Tensor | None = None
        self.check: Check | None = None
        self.identity, self.visible = "", True

    # ------------------------------------------------------------------------------------------- the loop

    def go(self, stop: _Stop, *, resume: bool) -> Outcome:
        s = self.settings
        self._prepare()
        self._preflight()
        notes: list[str] = []
        self._resume(notes) if resume else self.ranks.on_first(self._begin)
        log = self.folder / "metrics.jsonl" if self.ranks.first else os.devnull
        with (
            open(log, "ab", buffering=0) as self.log,
            Progress(s.steps, done=self.step, visible=self.visible) as self.bar,
        ):
            for text in notes:
                self.bar.note(text)
            if self.finished and not (self.finished == "finished" and self.step < s.steps):
                self.bar.note(f"this run has ended at step {self.step} ({self.finished}); nothing to do")
                return Outcome(self.folder, self.step, self.finished, 0)
            self.finished = ""
            self._advise()
            if self.step == 0:
                self._first_look()
            first = not resume
            while self.step < s.steps and not self.finished:
                with _memory_advice(s, self.parameters), distributed.inside_networks():
                    self._advance(check_gradient=first and self.step == 0)
                number = max(self.ranks.exchange(signal.SIGTERM if distributed.orphaned() else stop.number))
                if number:
                    self._save()
                    self.bar.note(f"stopped by signal {number} after step {self.step}; a checkpoint is saved")
                    return Outcome(self.folder, self.step, "signal", 128 + number)
            self.finished = self.finished or "finished"
            self._result()
            return Outcome(self.folder, self.step, self.finished, 0)

    def _prepare(self) -> None:
        """What is trained, its optimizers and averages, all as they are before the first step."""
        s = self.settings
        if s.threads:
            torch.set_num_threads(s.threads)
        shares = self.ranks.size * s.micro_batches
        if s.batch_size % shares:
            raise InputError(
                f"trainer.batch_size = {s.batch_size} cannot be cut into {shares} equal shares "
                f"({self.ranks.size} ranks x {s.micro_batches} micro_batches); expected a multiple"
            )
        self.algorithms = [self.algorithm, *(copy.deepcopy(self.algorithm) for _ in range(s.micro_batches - 1))]
        fingerprint = getattr(self.model, "fingerprint", None)
        self.base = fingerprint() if fingerprint else ""
        self.sharded = self._shard() if s.sharding != "none" else []
        self.parameters = {name: list(self.model.parameters(name)) for name in self.algorithm.trains}
        for name, parameters in self.parameters.items():
            if not parameters:
                raise InputError(
                    f"the model has no trainable {name} parameters; load it with training='lora' or 'full'"
                )
        self.optimizers = {
            name: torch.optim.AdamW(parameters, lr=self._rate(name), betas=s.betas, weight_decay=s.weight_decay)
            for name, parameters in self.parameters.items()
        }
        self.ema = {n: [p.detach().clone() for p in ps] for n, ps in self.parameters.items()} if s.ema_decay else {}
        if self.ranks.size > 1 and len(set(self.ranks.exchange(self.base + _digest(self.parameters)))) > 1:
            raise InputError("the ranks begin with different weights; expected the same model and seed on all of them")

    def _shard(self) -> list[torch.nn.Module]:
        """Cut the model's networks over the ranks (full training only); returns them."""
        weights = getattr(self.model, "weights", None)
        if getattr(weights, "training", None) != "full":
            raise InputError(
                "trainer.sharding is for model.weights = full; with lora set it to none: ranks hold copies"
            )
        if self.ranks.size == 1:
            raise InputError("trainer.sharding needs more than one rank; add --nproc, or start it with torchrun")
        return distributed.shard(weights.networks.values(), distributed.mesh(self.settings.sharding))

    def _advance(self, *, check_gradient: bool) -> None:
        """One step and everything that belongs to its number: nothing of it is half done in a checkpoint."""
        s, began = self.settings, time.perf_counter()
        step = self.step + 1
        steering, waiting = self._steering(step)
        if steering and not self._steer(step, steering):
            steering = None
            if waiting:
                self._forget_control()
        shares = self._shares(*self._batch(step))
        entry = self._entry()
        metrics, problem = self._update(step, shares, check_gradient)
        self.step = step
        if steering:
            self._write({"step": step, "event": "steer", **steering})
            self.bar.note(f"step {step}: words now {_words(steering)}")
            self._forget_best()
            if waiting:
                self._sync_log()
                self._forget_control()
        if problem:
            self._skip(problem, entry)
        else:
            self.bad_in_a_row = 0
            self._average()
            row = {"step": step, "event": "step", **metrics, "samples": step * s.batch_size}
            self._write({**row, "step_seconds": round(time.perf_counter() - began, 4)})
            self._count_for_guard(metrics)
            self.bar.show(step, {**metrics, "step_seconds": time.perf_counter() - began})
            self._advise()
        if s.guard.every and step % s.guard.every == 0:
            self._guard()
        last = step == s.steps or bool(self.finished)
        if s.preview_every and step % s.preview_every == 0 and not last:
            self._preview()
        if not last and ((s.checkpoint_every and step % s.checkpoint_every == 0) or self.guard["best_step"] == step):
            self._save()

    def _batch(self, step: int) -> tuple[list[str], Tensor, Tensor | None]:
        """Prompts, sample ids and clean latents of a step, of all ranks together."""
        s = self.settings
        first = (step - 1) * s.batch_size
        chosen = prompt_order(len(self.prompts), s.seed, first, s.batch_size)
        latents = None if self.latents is None else self.latents[chosen]
        return [self.prompts[i] for i in chosen], torch.arange(first, first + s.batch_size), latents

    def _shares(self, prompts: list[str], ids: Tensor, latents: Tensor | None) -> list[Batch]:
        """This rank's part of a step, a batch for each of its micro-batches."""
        size = len(ids) // (self.ranks.size * self.settings.micro_batches)
        shares = []
        for k in range(self.settings.micro_batches):
            start = (self.ranks.rank * self.settings.micro_batches + k) * size
            rows = slice(start, start + size)
            with torch.no_grad():
                cond = self.model.encode_prompts(prompts[rows])
            shares.append(Batch(prompts[rows], cond, ids[rows], None if latents is None else latents[rows]))
        return shares

    def _update(self, step: int, shares: list[Batch], check_gradient: bool) -> tuple[dict[str, float], str]:
        """Run the algorithm's step: (metrics, "") or, if anything was not finite and no update was made, (.., why).

        Every share has its own run of the algorithm; all of them go on to their next update, then that update is made.
        """
        s = self.settings
        self._forget_gradients(*self.parameters)
        streams = [
            algorithm.step(self.model, self.reward, batch, Random(s.seed, step, batch.ids))
            for algorithm, batch in zip(self.algorithms, shares, strict=True)
        ]
        tallies = [_Tally() for _ in streams]
        norms: dict[str, float] = {}
        problem, self.updates = "", 0
        while True:
            name, problem = self._to_next_update(streams, tallies, problem, check_gradient)
            if name is None:
                break
            self.updates += 1
            norms[name], problem = self._optimize(name, step, problem, check_gradient)
        metrics = _mean(self.ranks.exchange(_mean([tally.means() for tally in tallies])))
        metrics |= {"grad_norm" if name == "policy" else f"grad_norm_{name}": norm for name, norm in norms.items()}
        for name in self.parameters:
            rate = learning_rate(step, self._rate(name) * self.lr_scale, s.warmup)
            metrics["lr" if name == "policy" else f"lr_{name}"] = rate
        return metrics, problem

    def _rate(self, name: str) -> float:
        """The settings' learning rate of the named weights."""
        return (self.settings.lrs or {}).get(name, self.settings.lr)

    def _advise(self) -> None:
        """What the algorithm wants the user to know; each sentence is said once."""
        advise = getattr(self.algorithm, "advise", None)
        for text in advise({name: self._rate(name) for name in self.parameters}) if advise else ():
            if text not in self.said:
                self.said.add(text)
                self.bar.note(f"step {self.step}: {text}")

    def _to_next_update(
        self, streams: list[Iterator[Loss]], tallies: list[_Tally], problem: str, check_gradient: bool
    ) -> tuple[str | None, str]:
        """Backward through every share's losses up to its next update; which weights that is of, None at the end.

        Leaves in p.grad the sum over this rank's shares, each of them added up by itself first, as if it were a rank.
        """
        everything = [p for parameters in self.parameters.values() for p in parameters]
        sums: list[Tensor | None] = [None] * len(everything)
        names, error = set(), None
        try:
            for stream, tally in zip(streams, tallies, strict=True):
                name, problem = self._share_to_next_update(stream, tally, problem, check_gradient)
                names.add(name)
                if len(streams) == 1:
                    break
                for i, p in enumerate(everything):
                    if p.grad is not None:
                        sums[i] = p.grad if sums[i] is None else sums[i].add_(p.grad)
                        p.grad = None
        except ValueError as caught:
            error = caught
        if error and self.sharded:  # the other ranks wait inside a network, where they cannot hear of it: they lose us
            raise error
        if not self.sharded:
            self.ranks.agree(error)
        if len(streams) > 1:
            for p, total in zip(everything, sums, strict=True):
                p.grad = total
        said = self.ranks.exchange([sorted(names, key=str), problem])
        if len({name for theirs, _ in said for name in theirs}) > 1:
            raise InputError(f"the shares of a batch ask for different updates: {said}; an algorithm must not do that")
        return said[0][0][0], next((wrong for _, wrong in said if wrong), "")

    def _share_to_next_update(
        self, stream: Iterator[Loss], tally: _Tally, problem: str, check_gradient: bool
    ) -> tuple[str | None, str]:
        for loss in stream:
            if loss.value.ndim:
                raise InputError(f"the loss has shape {tuple(loss.value.shape)}; expected a scalar")
            tally.metric(loss)
            if not problem and not torch.isfinite(loss.value):
                problem = f"the loss is {float(loss.value.detach())}"
            if self.sharded:  # their backward reduces over the ranks, so all ranks run it or none
                problem = next((wrong for wrong in self.ranks.exchange(problem) if wrong), "")
                for network in self.sharded:
                    network.set_requires_gradient_sync(loss.update is not None)
            if not problem:
                tally.loss += float(loss.value.detach())
            if not problem or self.sharded:  # FSDP would keep an unfinished sum of gradients for the next step
                self._backward(loss, check_gradient)
            if loss.update:
                return loss.update, problem
        return None, problem

    def _backward(self, loss: Loss, check_gradient: bool) -> None:
        if loss.value.requires_grad:
            loss.value.backward()
        elif check_gradient:
            raise InputError(f"the loss of step 1 carries no gradient. Likely cause: {self._gradient_cause()}")

    def _optimize(self, name: str, step: int, problem: str, check_gradient: bool) -> tuple[float, str]:
        """Clip and update the named weights unless something is not finite: (gradient norm, what is wrong or "")."""
        s, parameters = self.settings, self.parameters[name]
        self._average_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = distributed.global_norm(gradients)
        if not problem and not math.isfinite(norm):
            problem = f"the norm of the {name} gradient is {norm}"
        if not problem and check_gradient and norm == 0.0:
            raise InputError(
                f"the {name} gradient of step 1 is zero in all {len(parameters)} tensors. "
                f"Likely cause: {self._gradient_cause()}"
            )
        if not problem:
            if s.clip_norm and norm > s.clip_norm:
                for gradient in gradients:
                    gradient.mul_(s.clip_norm / norm)
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, self._rate(name) * self.lr_scale, s.warmup)
            optimizer.step()
        self._forget_gradients(name)
        return norm, problem

    def _average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """From this rank's sum over shares to the mean over all shares, once, before the norm is taken."""
        if self.settings.micro_batches > 1:
            for p in parameters:
                if p.grad is not None:
                    p.grad /= self.settings.micro_batches
        if self.ranks.size == 1 or self.sharded:  # sharded networks have reduced theirs in backward
            return
        held = self.ranks.exchange("".join("01"[p.grad is not None] for p in parameters))
        for p, marks in zip(parameters, zip(*held, strict=True), strict=True):
            if p.grad is None and "1" in marks:
                p.grad = torch.zeros_like(p)
        self.ranks.average([p.grad for p in parameters if p.grad is not None])

    def _forget_gradients(self, *names: str) -> None:
        for name in names:
            self.optimizers[name].zero_grad(set_to_none=True)

    def _gradient_cause(self) -> str:
        """Ask the parts, one after the other, which of them loses the gradient."""
        prompts = [self.prompts[0]] * 2
        device = self.parameters["policy"][0].device
        latents = torch.zeros((2, *self.model.latent_shape), device=device, requires_grad=True)
        images = self.model.decode(latents)
        if not images.requires_grad:
            return "model.decode returns images without gradient (run under no_grad, or detached)"
        images = torch.full_like(images, 0.5).requires_grad_()
        if not self.reward(images, prompts).requires_grad:
            return "the reward is not differentiable (a black box such as jpeg_size); use a differentiable one"
        if not any(p.requires_grad for p in self.parameters["policy"]):
            return "no policy parameter requires a gradient (an adapter switched off or frozen)"
        t = torch.full((2,), 0.5, device=device)
        pred = self.model.predict(latents.detach(), t, self.model.encode_prompts(prompts))
        if not pred.x0.requires_grad:
            return "model.predict loses the policy's gradient (run under no_grad, or another adapter left active)"
        if self._same_for_all_words():
            return (
                "the reward does not read the prompt, so the relative preference is always 0: set "
                "algorithm.preference=absolute, with reward.noised (combine.noised_relative) for a negative"
            )
        return "a reward past its hinge, fully saturated pixels, or a step length of zero"

    @torch.no_grad()
    def _same_for_all_words(self) -> bool:
        """Whether a preference between control words is what is trained, and the reward knows no difference."""
        if getattr(getattr(self.algorithm, "settings", None), "preference", None) != "relative":
            return False
        texts = {text for each in self.algorithm.control_texts(self.prompts[0]).values() for text in each}
        image = self._noise_images(1)
        return len(texts) > 1 and len({float(self.reward(image, [text])) for text in texts}) == 1

    def _entry(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """What a step starts from: tensors and the algorithm's states. A bundle holds it, if the step goes wrong.

        A step that makes one update leaves the weights alone when that goes wrong, so only one that makes several, or a
        number not known yet, has them copied now, with the optimizer.
        """
        tensors = {} if self.updates == 1 else {key: value.detach().clone() for key, value in self._moving().items()}
        return tensors, [_state(algorithm) for algorithm in self.algorithms]

    def _skip(self, problem: str, entry: tuple[dict[str, Tensor], list[dict[str, Any]]]) -> None:
        self.skipped += 1
        self.bad_in_a_row += 1
        self._write({"step": self.step, "event": "skip", "reason": problem, "in_a_row": self.bad_in_a_row})
        bundle = self._bundle(problem, *entry)
        self.bar.note(f"step {self.step}: {problem}; this update is skipped. To see where: palate replay {bundle}")
        if self.bad_in_a_row < MAX_BAD_STEPS:
            return
        self._save()
        raise NonFiniteError(
            f"stopped at step {self.step}: {problem}, {self.bad_in_a_row} times in a row. The weights of the last good "
            f"step are in {self.folder / 'checkpoints' / checkpoint.name(self.step)}. See where it arises with "
            f"`palate replay {bundle}`; lower trainer.lr or trainer.clip_norm, or look at the reward"
        )

    def _bundle(self, problem: str, tensors: dict[str, Tensor], algorithms: list[dict[str, Any]]) -> Path:
        """Write what `repeat` needs to run the step again; the newest bundle replaces the one before."""
        if not tensors:
            tensors = {f"weights/{name}/{i:04d}": p for name, ps in self.parameters.items() for i, p in enumerate(ps)}
        tensors = {key: distributed.full(value) for key, value in tensors.items()}
        prompts, ids, latents = self._batch(self.step)
        if latents is not None:
            tensors["batch/latents"] = latents
        recipe = self.folder / "recipe.yaml"
        state = {
            "reason": problem,
            "trains": list(self.parameters),
            "prompts": prompts,
            "ids": ids.tolist(),
            **self._gather_algorithms(algorithms, tensors),
            "settings": dataclasses.asdict(self.settings),
            "lr_scale": self.lr_scale,
            "recipe": recipe.read_text("utf-8") if recipe.is_file() else None,
            "base_fingerprint": self.base,
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        folder = self.folder / "failures"

        def write() -> None:
            try:
                checkpoint.save(folder, self.step, tensors, state)
                checkpoint.prune(folder, keep=1, also=set())
            except CheckpointError as error:  # the run can go on without its bundle
                self.bar.note(str(error))

        self.ranks.on_first(write)
        return folder / checkpoint.name(self.step)

    # --------------------------------------------------------------------------------- before the first step

    def _preflight(self) -> None:
        """Find now what would end the run later: unknown words, a reward of the wrong shape, a full disk."""
        s, used = self.settings, self._used_prompts()
        with torch.no_grad():
            for start in range(0, len(used), 64):
                self.model.encode_prompts(used[start : start + 64])
            if s.preview_every or s.guard.every:
                self.model.encode_prompts(self.guard_prompts)
            check_reward(self.reward, self._noise_images(2), [used[0], used[-1]])
        if problem := self._unknown_words():
            raise InputError(problem)
        sizes = sum(p.numel() * p.element_size() for ps in self.parameters.values() for p in ps)
        one = sizes * (4 if s.ema_decay else 3)  # weights, two moments, the average
        need = one * (s.keep_checkpoints + 2)
        self.ranks.on_first(lambda: checkpoint.check_space(self.folder / "checkpoints", need=need))

    def _used_prompts(self) -> list[str]:
        s, count = self.settings, len(self.prompts)
        order = prompt_order(count, s.seed, 0, min(s.steps * s.batch_size, count))
        return [self.prompts[i] for i in sorted(set(order))]

    def _noise_images(self, count: int) -> Tensor:
        noise = Random(self.settings.seed, 0, range(count)).normal("preflight", self.model.latent_shape)
        return self.model.decode(noise)

    def _unknown_words(self) -> str:
        """Why the reward refuses one of the control words in force, "" if it knows them all."""
        if not hasattr(self.algorithm, "control_texts"):
            return ""

        def ask() -> str:
            longest = max(self._used_prompts(), key=lambda prompt: len(prompt.split()))  # the first to be too long
            image = self._noise_images(1)
            for side, texts in self.algorithm.control_texts(longest).items():
                for text in texts:
                    try:
                        self.reward(image, [text])
                    except ValueError as error:
                        return f"algorithm.{side}: {error}"
            return ""

        with torch.no_grad():
            return self.ranks.exchange(self.ranks.on_first(ask))[0]

    def _begin(self) -> None:
        if checkpoint.steps(self.folder / "checkpoints") or (self.folder / "metrics.jsonl").exists():
            raise InputError(
                f"{self.folder} already holds a run: continue it with `palate resume {self.folder}`, choose another "
                "run.folder, or replace it with --fresh"
            )
        write_atomically(self.folder / "environment.json", json.dumps(environment(self.base), indent=1).encode())
        (self.folder / "control.json").unlink(missing_ok=True)

    def _first_look(self) -> None:
        s = self.settings
        if s.preview_every:
            self._preview()
        if s.guard.every:
            self.guard["base"] = self._measure()
            self._write({"step": 0, "event": "guard", "verdict": "base", **self.guard["base"]})
            self.guard["best_step"] = 0
            self._save()

    # ----------------------------------------------------------------------------------------------- steering

    def _steer(self, step: int, words: dict[str, Any]) -> bool:
        """Take up new words. Words that cannot be used must not end the run: False, and the old ones stay."""
        before = [_state(algorithm) for algorithm in self.algorithms]
        problem = ""
        try:
            for algorithm in self.algorithms:
                algorithm.steer(words["positive"], words["negative"])
        except ValueError as error:
            problem = str(error)
        problem = problem or self._unknown_words()
        if not problem:
            return True
        for algorithm, state in zip(self.algorithms, before, strict=True):
            algorithm.load_state_dict(state)
        self._write({"step": step, "event": "steer_refused", **words, "reason": problem})
        self.bar.note(f"step {step}: the new words are refused and the old ones kept: {problem}")
        return False

    def _steering(self, step: int) -> tuple[dict[str, Any] | None, bool]:
        """(words to take up at this step or None, whether they come from the control file and not from a replay)."""
        words, waiting = self.ranks.exchange(self._words_on_first(step) if self.ranks.first else None)[0]
        return words, waiting

    def _words_on_first(self, step: int) -> tuple[dict[str, Any] | None, bool]:
        while self.words and self.words[0]["step"] < step:
            self.words.pop(0)
        if self.words and self.words[0]["step"] == step:
            row = self.words.pop(0)
            return {"positive": row.get("positive"), "negative": row.get("negative")}, False
        control = self.folder / "control.json"
        try:
            self.control = control.read_bytes()
            words = _control_words(self.control)
            if not hasattr(self.algorithm, "steer"):
                raise InputError("this algorithm has no control words")
            return words, True
        except FileNotFoundError:
            return None, False
        except ValueError as error:
            self.bar.note(f"{control} is ignored: {error}")
            self._forget_control()
            return None, False

    def _forget_control(self) -> None:
        """Delete the control file that was read; words that came since then stay, for the next step."""
        control = self.folder / "control.json"
        with contextlib.suppress(FileNotFoundError):
            if self.ranks.first and control.read_bytes() == self.control:
                control.unlink()

    # -------------------------------------------------------------------------------------------------- guard

    def _measure(self) -> dict[str, float]:
        different = max(1, self.settings.guard.prompts // GUARD_SEEDS)
        prompts = [p for p in evenly_spaced(self.guard_prompts, different) for _ in range(GUARD_SEEDS)]
        if self.check is None:
            from palate.evaluate import embedded_panel, measure_for_guard

            panel = embedded_panel()
            self.check = lambda model, words, ids: measure_for_guard(
                model, words, ids, seed=self.settings.seed, panel=panel, sampler=self.sampler
            )
        with self._averaged(), torch.no_grad():
            values = self.check(self.model, prompts, list(range(len(prompts))))
        return self.ranks.exchange({key: float(value) for key, value in values.items()})[0]  # one verdict for all ranks

    def _count_for_guard(self, metrics: dict[str, float]) -> None:
        if not self.settings.guard.every:
            return
        if not self.best_checked and "grad_norm" in metrics:  # a step that updates the policy: it has all metrics
            self._check_best({**self.guard["base"], **metrics})
            self.best_checked = True
        for key, value in metrics.items():
            self.guard["sums"][key] = self.guard["sums"].get(key, 0.0) + value
        self.guard["steps"] += 1

    def _check_best(self, values: dict[str, float]) -> None:
        best = self.settings.guard.best
        if best is not None and best not in values:
            raise InputError(
                f"trainer.guard.best: there is no metric {best!r}; expected null or one of {', '.join(sorted(values))}"
            )

    def _forget_best(self) -> None:
        """New words make rewards incomparable: the next check inside the limits becomes the best."""
        self.guard["best_value"] = None
        self.guard["sums"], self.guard["steps"] = {}, 0

    def _guard(self) -> None:
        g, state = self.settings.guard, self.guard
        now = self._measure()
        means = {key: value / state["steps"] for key, value in state["sums"].items()} if state["steps"] else {}
        state["sums"], state["steps"] = {}, 0
        broken = broken_limits(now, state["base"], g)
        row = {"step": self.step, "event": "guard", "verdict": "; ".join(broken) or "ok", **now}
        if not broken:
            self._check_best({**means, **now})
            value = float(self.step) if g.best is None else {**means, **now}[g.best]
            if state["best_value"] is None or value >= state["best_value"]:
                state["best_step"], state["best_value"] = self.step, value
            self._write({**row, "best_step": state["best_step"]})
            return
        action = g.action
        if action == "rollback" and state["rollbacks"] >= g.rollbacks:
            action = "stop"
        self._write({**row, "best_step": state["best_step"], "action": action})
        why = f"step {self.step}: guard: {'; '.join(broken)}"
        if action == "warn":
            self.bar.note(why)
            return
        self._restore_best()
        if action == "rollback":
            state["rollbacks"] += 1
            self.lr_scale /= 2
            self.bar.note(f"{why}; back to the weights of step {state['best_step']}, learning rate halved")
        else:
            self.finished = f"guard: {'; '.join(broken)}"
            self.bar.note(f"{why}; stopped, the result is the weights of step {state['best_step']}")

    def _restore_best(self) -> None:
        """Weights, average and optimizer of the best step; words, step and prompts go on."""
        best = self.folder / "checkpoints" / checkpoint.name(self.guard["best_step"])
        self._load_tensors(checkpoint.load(best))

    # -------------------------------------------------------------------------------------------- what is written

    def _write(self, row: dict[str, Any]) -> None:
        line = json.dumps({key: _plain(value) for key, value in row.items()}).encode() + b"\n"
        try:
            if self.log.write(line) < len(line):  # the rest of the line did not fit; a reader ignores a cut one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise CheckpointError(write_problem(self.folder, len(line), error)) from error

    def _average(self) -> None:
        for name, averages in self.ema.items():
            for average, parameter in zip(averages, self.parameters[name], strict=True):
                average.lerp_(parameter.detach(), 1 - self.settings.ema_decay)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model speaks with the averaged weights, where an average is kept."""
        kept = {name: [p.detach().clone() for p in self.parameters[name]] for name in self.ema}
        try:
            for name, averages in self.ema.items():
                _assign(self.parameters[name], averages)
            yield
        finally:
            for name, values in kept.items():
                _assign(self.parameters[name], values)

    def _preview(self) -> None:
        from palate.evaluate import generate, pairs
        from palate.runs import write_samples

        if self.sampler:
            steps, guidance = self.sampler.steps, 1.0
        else:
            steps = self.sample_steps or self.model.default_steps
            guidance = self.model.default_guidance if self.sample_guidance is None else self.sample_guidance
        with self._averaged():
            images = generate(
                self.model, self.preview_prompts, [0], steps=steps, guidance=guidance, sampler=self.sampler
            )
        words, seeds = pairs(self.preview_prompts, [0])

        def write() -> None:
            with new_folder(self.folder / "samples" / checkpoint.name(self.step)) as temporary:
                write_samples(temporary, images, words, seeds, guidance=guidance, steps=steps)

        self.ranks.on_first(write)

    def _result(self) -> None:
        if self.settings.preview_every:
            self._preview()
        with self._averaged():
            if self.sharded:
                networks = {name: self.model.weights.networks[name] for name in self.parameters}
                whole = {name: distributed.whole(network) for name, network in networks.items()}
                self.ranks.on_first(lambda: self._save_networks(networks, whole))
            elif hasattr(self.model, "save_adapter"):
                self.ranks.on_first(self._save_adapter)
        self._save()

    def _save_networks(self, networks: dict[str, torch.nn.Module], whole: dict[str, dict[str, Tensor]]) -> None:
        with new_folder(self.folder / "adapter") as temporary:
            for name, network in networks.items():
                distributed.save_network(network, whole[name], temporary if name == "policy" else temporary / name)

    def _save_adapter(self) -> None:
        with new_folder(self.folder / "adapter") as temporary:
            self.model.save_adapter(temporary)

    def _sync_log(self) -> None:
        if self.ranks.first:
            os.fsync(self.log.fileno())

    def _gather_algorithms(self, states: list[dict[str, Any]], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The algorithm's part of a saved state: "algorithm" where all shares agree, else one for each in "algorithms".

        Its tensors are added to `tensors`, on rank 0 those of all ranks.
        """
        total = self.ranks.size * len(states)
        first: dict[str, Tensor] = {}
        plain = checkpoint.flatten_state(states[0], "algorithm", first)
        first = {key: distributed.full(value) for key, value in first.items()}
        if (
            total == 1
            or len(
                set(
                    functools.reduce(operator.iadd, self.ranks.exchange([_state_digest(state) for state in states]), [])
                )
            )
            == 1
        ):
            tensors |= first
            return {"shares": total, "algorithm": plain}
        own: dict[str, Tensor] = {}
        start = self.ranks.rank * len(states)
        trees = [checkpoint.flatten_state(state, f"algorithm/{start + k}", own) for k, state in enumerate(states)]
        for theirs in self.ranks.collect(own):
            tensors |= theirs
        return {
            "shares": total,
            "algorithm": {},
            "algorithms": functools.reduce(operator.iadd, self.ranks.exchange(trees), []),
        }

    def _moving(self) -> dict[str, Tensor]:
        """Everything that an update changes, by the names of a checkpoint: weights, averages, optimizer moments."""
        tensors: dict[str, Tensor] = {}
        for name, parameters in self.parameters.items():
            tensors |= {f"weights/{name}/{i:04d}": p for i, p in enumerate(parameters)}
            tensors |= {f"ema/{name}/{i:04d}": p for i, p in enumerate(self.ema.get(name, ()))}
            for i, moments in self.optimizers[name].state_dict()["state"].items():
                tensors |= {f"optimizer/{name}/{i:04d}/{key}": value for key, value in moments.items()}
        return tensors

    def _save(self) -> None:
        tensors = {key: distributed.full(value) for key, value in self._moving().items()}
        algorithms = self._gather_algorithms([_state(algorithm) for algorithm in self.algorithms], tensors)
        state = {
            "trains": list(self.parameters),
            "samples": self.step * self.settings.batch_size,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "lr_scale": self.lr_scale,
            "finished": self.finished,
            "guard": self.guard,
            **algorithms,
            "identity": self.identity,
            "base_fingerprint": self.base,
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        folder = self.folder / "checkpoints"
        best = {self.guard["best_step"]} if self.guard["best_step"] is not None else set()

        def write() -> None:
            self._sync_log()
            checkpoint.save(folder, self.step, tensors, state)
            checkpoint.prune(folder, keep=self.settings.keep_checkpoints, also=best)

        self.ranks.on_first(write)

    # ------------------------------------------------------------------------------------------------- resuming

    def _resume(self, notes: list[str]) -> None:
        saved = checkpoint.load_newest(self.folder / "checkpoints", warn=notes.append)
        state = saved.state
        if len(found := set(self.ranks.exchange(saved.step))) > 1:
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
            notes.append(f"made with {_words(changed)}, now {_words(versions())}: not bit-identical for certain")
        self._load_tensors(saved)
        self._load_algorithms(saved)
        self.step, self.skipped, self.bad_in_a_row = saved.step, state["skipped"], state["bad_in_a_row"]
        self.lr_scale, self.finished, self.guard = state["lr_scale"], state["finished"], state["guard"]
        self.words = self.ranks.on_first(lambda: rewind(self.folder, self.step)) or []

    def _load_algorithms(self, saved: checkpoint.Checkpoint) -> None:
        each, mine = saved.state.get("algorithms"), len(self.algorithms)
        if each and len(each) != self.ranks.size * mine:
            raise InputError(
                f"this run's algorithm keeps a state for each of its {len(each)} shares (ranks x "
                "trainer.micro_batches), and "
                f"now there are {self.ranks.size} x {mine}; continue with as many shares"
            )
        for k, algorithm in enumerate(self.algorithms):
            tree = each[self.ranks.rank * mine + k] if each else saved.state["algorithm"]
            if tree:
                algorithm.load_state_dict(checkpoint.unflatten_state(tree, saved.tensors))

    def _load_tensors(self, saved: checkpoint.Checkpoint) -> None:
        if saved.state["trains"] != list(self.parameters):
            raise CheckpointError(f"the checkpoint trains {saved.state['trains']}, this run {list(self.parameters)}")
        for name, parameters in self.parameters.items():
            _copy_into(parameters, saved.tensors, f"weights/{name}")
            if self.ema:
                _copy_into(self.ema[name], saved.tensors, f"ema/{name}")
            moments = _moments(parameters, saved.tensors, f"optimizer/{name}")
            groups = self.optimizers[name].state_dict()["param_groups"]
            self.optimizers[name].load_state_dict({"state": moments, "param_groups": groups})


# ----------------------------------------------------------------------------------------------- pure parts


def broken_limits(now: dict[str, float], base: dict[str, float], guard: GuardSettings) -> list[str]:
    """Which of the guard's limits the values break, a sentence each. A value that is not measured breaks none."""
    broken = []
    for key, limit in (("heldout", guard.heldout_drop), ("concept", guard.concept_drop)):
        if key in now and key in base and not base[key] - now[key] <= limit:
            broken.append(f"{key} fell from {base[key]:.4g} to {now[key]:.4g}, more than {limit:g}")
    if "diversity" in now and "diversity" in base and not now["diversity"] >= guard.diversity_ratio * base["diversity"]:
        broken.append(
            f"diversity fell from {base['diversity']:.4g} to {now['diversity']:.4g}, "
            f"below {guard.diversity_ratio:g} of it"
        )
    return broken


def check_reward(reward: Reward, images: Tensor, prompts: Sequence[str]) -> None:
    """ValueError if `reward` does not return one finite number for each image."""
    values = reward(images, prompts)
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"the reward returned {got} for {len(images)} images; expected a tensor of shape ({len(images)},)"
        )
    if not torch.isfinite(values).all():
        raise InputError(
            f"the reward returned {[round(float(v), 4) for v in values]} for images of noise; expected finite numbers"
        )


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "numpy", "diffusers", "transformers", "peft")}


def environment(base: str) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "base_fingerprint": base,
    }


def _copy_into(targets: Sequence[Tensor], tensors: dict[str, Tensor], prefix: str) -> None:
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


def _moments(parameters: Sequence[Tensor], tensors: dict[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    """AdamW's state in a checkpoint, cut as the parameters are; a parameter that never had a gradient has none."""
    moments: dict[int, dict[str, Tensor]] = {}
    for i, parameter in enumerate(parameters):
        expected = {
            "step": (torch.float32, torch.Size()),
            "exp_avg": (parameter.dtype, parameter.shape),
            "exp_avg_sq": (parameter.dtype, parameter.shape),
        }
        found = {part: f"{prefix}/{i:04d}/{part}" for part in expected}
        parts = {part: tensors[key] for part, key in found.items() if key in tensors}
        if parts and {part: (value.dtype, value.shape) for part, value in parts.items()} != expected:
            raise CheckpointError(f"{prefix}/{i:04d} of the checkpoint does not fit the model's parameter")
        if parts:
            moments[i] = {
                part: value if part == "step" else distributed.like(value, parameter) for part, value in parts.items()
            }
    if sum(map(len, moments.values())) != sum(key.startswith(f"{prefix}/") for key in tensors):
        raise CheckpointError(f"the checkpoint holds tensors of {prefix} for which there is no parameter")
    return moments


@torch.no_grad()
def _assign(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(distributed.like(value, target))


class _Tally:
    """The loss and the metrics of one share's step."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.found: dict[str, list[float]] = {}

    def metric(self, loss: Loss) -> None:
        for key, value in loss.metrics.items():
            self.found.setdefault(key, []).append(float(value))

    def means(self) -> dict[str, float]:
        return {"loss": self.loss} | {key: sum(values) / len(values) for key, values in self.found.items()}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the shares that have it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    values = {key: [row[key] for row in rows if key in row] for key in keys}
    return {key: sum(found) / len(found) for key, found in values.items()}


def _state(algorithm: Algorithm) -> dict[str, Any]:
    state = getattr(algorithm, "state_dict", None)
    return state() if state else {}


def _state_digest(state: dict[str, Any]) -> str:
    tensors: dict[str, Tensor] = {}
    plain = checkpoint.flatten_state(state, "algorithm", tensors)
    return _hash([plain, _digest({"": [distributed.full(tensor) for tensor in tensors.values()]})])


def _digest(named: dict[str, list[Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensors in named.items():
        digest.update(name.encode())
        for tensor in tensors:
            local = tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
            digest.update(local.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def _memory_advice(s: TrainerSettings, parameters: dict[str, list[torch.nn.Parameter]]) -> Iterator[None]:
    """Turns an out-of-memory error inside into one that says which settings need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        signs = ("out of memory", "can't allocate memory", "not enough memory")
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in signs)
        if not known:
            raise
        raise OutOfMemoryError(memory_levers(s, parameters, str(error) or "the machine has no more")) from error


def memory_levers(s: TrainerSettings, parameters: dict[str, list[torch.nn.Parameter]], error: str) -> str:
    """A message for a step that did not fit: what was asked for, and each setting that needs less, with its GiB."""
    trained = sum(p.numel() * p.element_size() for ps in parameters.values() for p in ps) / 2**30
    finer = next((m for m in range(s.micro_batches + 1, s.batch_size + 1) if s.batch_size % m == 0), None)
    lines = [f"out of memory: {error.splitlines()[0][:200]}. No update was made. What needs less:"]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    if finer:
        taken = 0 if peak is None else max(peak - 4 * trained, 0)
        share = "" if peak is None else f", of the {taken:.1f} GiB that images and activations took"
        lines.append(
            f"trainer.micro_batches={finer}: {s.micro_batches / finer:.0%} of a step's activations at a time{share}"
        )
    else:
        lines.append(
            "a smaller image, fewer differentiated steps, or gradient checkpointing: one image at a time is reached"
        )
    lines.append(
        f"model.weights=lora, or a smaller model.lora_rank: training holds {4 * trained:.2f} GiB now "
        "(weights, gradients, two moments)"
    )
    if s.ema_decay:
        lines.append(f"trainer.ema_decay=0: {trained:.2f} GiB")
    lines.append(
        "--nproc N: each rank works on 1/N of the batch; with model.weights=full and trainer.sharding=full each "
        f"holds 1/N of the {4 * trained:.2f} GiB"
    )
    return "\n".join(lines)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON has no NaN: such values are written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v if isinstance(v, str) else ', '.join(v)}" for k, v in values.items() if v is not None)


class _Stop:
    number = 0
    since = 0.0  # time.monotonic() of the first signal


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """The first SIGTERM or SIGINT is noted, for the end of the step; a second one has its usual effect at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _frame: object) -> None:
        if stop.number:
            if "RANK" in os.environ and time.monotonic() - stop.since < 1:
                return  # of one signal, one copy comes from the launcher and one from what signals whole process groups
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.number, stop.since = number, time.monotonic()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Callable(types.ModuleType):
    """`palate.train` is this module and, for users, the function: both `palate.train(...)` and `palate.train.train`."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _Callable

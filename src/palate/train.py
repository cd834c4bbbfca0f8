"""The only training loop; it owns every side effect: backward, clipping, updates, averages, logs, checkpoints, previews.

An algorithm yields losses and touches nothing else. Every random number is a function of (seed, sample id, step, purpose),
so a run continued from a checkpoint equals the uninterrupted one bit for bit, and previews or checks never disturb it.

Step n is the n-th update (1, 2, ...); checkpoint and samples `step-NNNNNN` hold the weights after n updates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from palate import checkpoint
from palate.core import Algorithm, Batch, Loss, Model, Random, Reward
from palate.progress import Progress
from palate.recipe import GuardSettings, TrainerSettings, check_trainer, spread

MAX_BAD_STEPS = 3  # updates in a row that are not finite, then the run stops
GUARD_SEEDS = 2  # images per guard prompt: diversity needs two, concept accuracy many prompts
Check = Callable[[Model, list[str], list[int]], dict[str, float]]


class NonFinite(RuntimeError):
    """Losses or gradients were not finite several times in a row; the weights of the last good step are saved."""


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
    sample_guidance: how they are drawn (None = the model's default). latents (N, C, h, w): clean latents of N real images
    captioned by `prompts` (offline training). check: what the guard measures (None = `palate.evaluate.quick_check`);
    guard None = off. identity: a hash that
    a resumed run must share (None = hash of the settings). ValueError: what was given cannot work.
    """
    settings = check_trainer({
        "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "betas": betas,
        "clip_norm": clip_norm, "warmup": warmup, "ema_decay": ema_decay, "seed": seed,
        "checkpoint_every": checkpoint_every, "keep_checkpoints": keep_checkpoints, "preview_every": preview_every,
        "preview_prompts": preview_prompts, "threads": threads, "guard": guard or GuardSettings(every=0),
    })  # fmt: skip
    prompts = list(prompts)
    if not prompts:
        raise ValueError("got no prompts; give at least one")
    if latents is not None and len(latents) != len(prompts):
        raise ValueError(f"got {len(latents)} latents and {len(prompts)} prompts; expected one prompt an image")
    if latents is not None and not torch.isfinite(latents).all():
        bad = int((~torch.isfinite(latents).flatten(1).all(1)).nonzero()[0])
        raise ValueError(f"the latents of image {bad} ({prompts[bad]!r}) are not finite; expected numbers: encode it again")
    run = _Run(model, algorithm, reward, prompts, Path(folder), settings)
    run.guard_prompts = list(preview) if preview else spread(prompts)
    run.preview_prompts = run.guard_prompts[: settings.preview_prompts]
    run.sample_steps, run.sample_guidance, run.latents = sample_steps, sample_guidance, latents
    run.check, run.identity = check, identity or _hash({**dataclasses.asdict(settings), "steps": 0})
    run.visible = progress
    with _signals() as stop:
        return run.go(stop, resume=resume)


def steer(
    folder: str | Path, positive: Sequence[str] | None = None, negative: Sequence[str] | None = None
) -> None:
    """Change the control words of the run in `folder` from its next step on; None keeps a list. Takes effect if it runs."""
    folder = Path(folder)
    words = {"positive": positive, "negative": negative}
    if positive is None and negative is None:
        raise ValueError("steer got neither positive nor negative words; give at least one list")
    for side, given in words.items():
        if given is None:
            continue
        if isinstance(given, str) or not given or not all(isinstance(word, str) and word.strip() for word in given):
            raise ValueError(f"{side}: expected a list of words, none empty, got {given!r}")
        words[side] = [word.strip() for word in given]
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is not a run (it holds no metrics.jsonl); give the folder of one, as runs/NAME")
    checkpoint.write_atomically(folder / "control.json", json.dumps(words).encode())


def prompt_order(count: int, seed: int, first: int, size: int) -> list[int]:
    """Which of `count` prompts the samples first .. first + size - 1 use: each once an epoch, shuffled anew every epoch."""
    order: dict[int, np.ndarray] = {}
    chosen = []
    for i in range(first, first + size):
        epoch, place = divmod(i, count)
        if epoch not in order:
            order[epoch] = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
        chosen.append(int(order[epoch][place]))
    return chosen


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


def repeat(model: Model, algorithm: Algorithm, reward: Reward, bundle: checkpoint.Checkpoint) -> tuple[dict[str, float], str]:
    """Run the step of a failure bundle again, exactly as the loop did: (metrics, what was not finite or "").

    Changes the weights of `model` and the state of `algorithm` to those that the step started from.
    CheckpointError: the bundle is of other base weights, or of another shape.
    """
    state = bundle.state
    settings = check_trainer({**state["settings"], "guard": GuardSettings(every=0), "threads": state["threads"], "ema_decay": 0.0})
    run = _Run(model, algorithm, reward, state["prompts"], Path(), settings)
    run._prepare()
    if run.base != state["base_fingerprint"]:
        raise checkpoint.CheckpointError("the bundle was made with other base weights; install the version it was made with")
    run.lr_scale = state["lr_scale"]
    run._load_tensors(bundle)
    if state["algorithm"]:
        algorithm.load_state_dict(checkpoint.join(state["algorithm"], bundle.tensors))
    with torch.no_grad():
        cond = model.encode_prompts(state["prompts"])
    batch = Batch(state["prompts"], cond, torch.tensor(state["ids"]), bundle.tensors.get("batch/latents"))
    return run._update(bundle.step, batch, check_gradient=False)


class _Run:
    """One run's mutable state, and the loop."""

    def __init__(
        self, model: Model, algorithm: Algorithm, reward: Reward, prompts: list[str], folder: Path, settings: TrainerSettings
    ):
        self.model, self.algorithm, self.reward, self.prompts = model, algorithm, reward, prompts
        self.folder, self.settings = folder, settings
        self.step = self.skipped = self.bad_in_a_row = 0
        self.lr_scale = 1.0
        self.finished = ""
        self.guard: dict[str, Any] = {"base": None, "best_step": None, "best_value": None, "rollbacks": 0, "sums": {}, "steps": 0}
        self.words: list[dict[str, Any]] = []  # steering events to replay, after a resume
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
        self._resume(notes) if resume else self._begin()
        log = self.folder / "metrics.jsonl"
        with open(log, "a", encoding="utf-8") as self.log, Progress(s.steps, done=self.step, visible=self.visible) as self.bar:
            for text in notes:
                self.bar.note(text)
            if self.finished and not (self.finished == "finished" and self.step < s.steps):
                self.bar.note(f"this run has ended at step {self.step} ({self.finished}); nothing to do")
                return Outcome(self.folder, self.step, self.finished, 0)
            self.finished = ""
            if self.step == 0:
                self._first_look()
            first = not resume
            while self.step < s.steps and not self.finished:
                self._advance(check_gradient=first and self.step == 0)
                if stop.number:
                    self._save()
                    self.bar.note(f"stopped by signal {stop.number} after step {self.step}; a checkpoint is saved")
                    return Outcome(self.folder, self.step, "signal", 128 + stop.number)
            self.finished = self.finished or "finished"
            self._result()
            return Outcome(self.folder, self.step, self.finished, 0)

    def _prepare(self) -> None:
        """What is trained, its optimizers and averages, all as they are before the first step."""
        s = self.settings
        if s.threads:
            torch.set_num_threads(s.threads)
        self.parameters = {name: list(self.model.parameters(name)) for name in self.algorithm.trains}
        for name, parameters in self.parameters.items():
            if not parameters:
                raise ValueError(f"the model has no trainable {name} parameters; load it with training='lora' or 'full'")
        self.optimizers = {
            name: torch.optim.AdamW(parameters, lr=s.lr, betas=s.betas, weight_decay=s.weight_decay)
            for name, parameters in self.parameters.items()
        }
        self.ema = {n: [p.detach().clone() for p in ps] for n, ps in self.parameters.items()} if s.ema_decay else {}
        fingerprint = getattr(self.model, "fingerprint", None)
        self.base = fingerprint() if fingerprint else ""

    def _advance(self, *, check_gradient: bool) -> None:
        """One step and everything that belongs to its number; nothing of it is half done when a checkpoint is written."""
        s, began = self.settings, time.perf_counter()
        step = self.step + 1
        steering, waiting = self._steering(step)
        before = self._algorithm_state()
        batch = self._batch(step)
        try:
            if steering:
                self.algorithm.steer(steering["positive"], steering["negative"])
            entry = self._entry()
            metrics, problem = self._update(step, batch, check_gradient)
        except ValueError as error:
            if not waiting:
                raise
            waiting.unlink(missing_ok=True)  # words that the model or the reward does not know must not end the run
            self.bar.note(f"step {step}: the new words are refused and the old ones kept: {error}")
            self.algorithm.load_state_dict(before)
            steering = waiting = None
            entry = self._entry()
            metrics, problem = self._update(step, batch, check_gradient)
        self.step = step
        if steering:
            self._write({"step": step, "event": "steer", **steering})
            self.bar.note(f"step {step}: words now {_words(steering)}")
            self._forget_best()
            if waiting:
                os.fsync(self.log.fileno())
                waiting.unlink(missing_ok=True)
        if problem:
            self._skip(problem, batch, entry)
        else:
            self.bad_in_a_row = 0
            self._average()
            row = {"step": step, "event": "step", **metrics, "samples": step * s.batch_size}
            self._write({**row, "step_seconds": round(time.perf_counter() - began, 4)})
            self._count_for_guard(metrics)
            self.bar.show(step, {**metrics, "step_seconds": time.perf_counter() - began})
        if s.guard.every and step % s.guard.every == 0:
            self._guard()
        last = step == s.steps or bool(self.finished)
        if s.preview_every and step % s.preview_every == 0 and not last:
            self._preview()
        if not last and (
            (s.checkpoint_every and step % s.checkpoint_every == 0) or self.guard["best_step"] == step
        ):
            self._save()

    def _batch(self, step: int) -> Batch:
        s = self.settings
        first = (step - 1) * s.batch_size
        chosen = prompt_order(len(self.prompts), s.seed, first, s.batch_size)
        prompts = [self.prompts[i] for i in chosen]
        with torch.no_grad():
            cond = self.model.encode_prompts(prompts)
        ids = torch.arange(first, first + s.batch_size)
        return Batch(prompts, cond, ids, None if self.latents is None else self.latents[chosen])

    def _update(self, step: int, batch: Batch, check_gradient: bool) -> tuple[dict[str, float], str]:
        """Run the algorithm's step: (metrics, "") or, if anything was not finite and no update was made, (.., why)."""
        s = self.settings
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        found: dict[str, list[float]] = {}
        norms: dict[str, float] = {}
        total, problem, self.updates = 0.0, "", 0
        for loss in self.algorithm.step(self.model, self.reward, batch, Random(s.seed, step, batch.ids)):
            for key, value in loss.metrics.items():
                found.setdefault(key, []).append(float(value))
            if loss.value.ndim:
                raise ValueError(f"the loss has shape {tuple(loss.value.shape)}; expected a scalar")
            if not problem and not torch.isfinite(loss.value):
                problem = f"the loss is {float(loss.value.detach())}"
            if not problem:
                total += float(loss.value.detach())
                self._backward(loss, check_gradient)
            if loss.update:
                self.updates += 1
                norms[loss.update], wrong = self._optimize(loss.update, step, problem, check_gradient)
                problem = problem or wrong
        metrics = {"loss": total} | {key: sum(values) / len(values) for key, values in found.items()}
        metrics |= {"grad_norm" if name == "policy" else f"grad_norm_{name}": norm for name, norm in norms.items()}
        return metrics | {"lr": learning_rate(step, s.lr * self.lr_scale, s.warmup)}, problem

    def _backward(self, loss: Loss, check_gradient: bool) -> None:
        if loss.value.requires_grad:
            loss.value.backward()
        elif check_gradient:
            raise ValueError(
                f"the loss of step 1 carries no gradient. Likely cause: {self._gradient_cause()}"
            )

    def _optimize(self, name: str, step: int, problem: str, check_gradient: bool) -> tuple[float, str]:
        """Clip and update the named weights unless something is not finite: (gradient norm, what is wrong or "")."""
        s, parameters = self.settings, self.parameters[name]
        gradients = [p.grad for p in parameters if p.grad is not None]
        # distributed training averages these gradients over the ranks here, once, before the norm is taken
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not problem and not math.isfinite(norm):
            problem = f"the norm of the {name} gradient is {norm}"
        if not problem and check_gradient and norm == 0.0:
            raise ValueError(
                f"the {name} gradient of step 1 is zero in all {len(parameters)} tensors. "
                f"Likely cause: {self._gradient_cause()}"
            )
        if not problem:
            if s.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, s.clip_norm, torch.tensor(norm))
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, s.lr * self.lr_scale, s.warmup)
            optimizer.step()
        self.optimizers[name].zero_grad(set_to_none=True)
        return norm, problem

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
        return "a reward past its hinge, fully saturated pixels, or a step length of zero"

    def _entry(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a step starts from: tensors and the algorithm's state. A bundle holds it, if the step goes wrong.

        A step that makes one update leaves the weights alone when that goes wrong, so only one that makes several, or a
        number not known yet, has them copied now, with the optimizer.
        """
        tensors = {} if self.updates == 1 else {key: value.detach().clone() for key, value in self._moving().items()}
        return tensors, self._algorithm_state()

    def _skip(self, problem: str, batch: Batch, entry: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        self.skipped += 1
        self.bad_in_a_row += 1
        self._write({"step": self.step, "event": "skip", "reason": problem, "in_a_row": self.bad_in_a_row})
        bundle = self._bundle(problem, batch, *entry)
        self.bar.note(f"step {self.step}: {problem}; this update is skipped. To see where: palate replay {bundle}")
        if self.bad_in_a_row < MAX_BAD_STEPS:
            return
        self._save()
        raise NonFinite(
            f"stopped at step {self.step}: {problem}, {self.bad_in_a_row} times in a row. The weights of the last good "
            f"step are in {self.folder / 'checkpoints' / checkpoint.name(self.step)}. See where it arises with "
            f"`palate replay {bundle}`; lower trainer.lr or trainer.clip_norm, or look at the reward"
        )

    def _bundle(self, problem: str, batch: Batch, tensors: dict[str, Tensor], algorithm: dict[str, Any]) -> Path:
        """Write what `repeat` needs to run the step again; the newest bundle replaces the one before."""
        if not tensors:
            tensors = {f"weights/{name}/{i:04d}": p for name, ps in self.parameters.items() for i, p in enumerate(ps)}
        if batch.latents is not None:
            tensors["batch/latents"] = batch.latents
        recipe = self.folder / "recipe.yaml"
        state = {
            "reason": problem,
            "trains": list(self.parameters),
            "prompts": batch.prompts,
            "ids": batch.ids.tolist(),
            "algorithm": checkpoint.split(algorithm, "algorithm", tensors),
            "settings": dataclasses.asdict(self.settings),
            "lr_scale": self.lr_scale,
            "recipe": recipe.read_text("utf-8") if recipe.is_file() else None,
            "base_fingerprint": self.base,
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        folder = self.folder / "failures"
        try:
            checkpoint.save(folder, self.step, tensors, state)
            checkpoint.prune(folder, keep=1, also=set())
        except checkpoint.CheckpointError as error:  # the run can go on without its bundle
            self.bar.note(str(error))
        return folder / checkpoint.name(self.step)

    # --------------------------------------------------------------------------------- before the first step

    def _preflight(self) -> None:
        """Find now what would end the run later: unknown words, a reward of the wrong shape, a full or read-only disk."""
        s = self.settings
        total = s.steps * s.batch_size
        used = sorted(set(prompt_order(len(self.prompts), s.seed, 0, min(total, len(self.prompts)))))
        with torch.no_grad():
            for start in range(0, len(used), 64):
                self.model.encode_prompts([self.prompts[i] for i in used[start : start + 64]])
            if s.preview_every or s.guard.every:
                self.model.encode_prompts(self.guard_prompts)
            noise = Random(s.seed, 0, [0, 1]).normal("preflight", self.model.latent_shape)
            check_reward(self.reward, self.model.decode(noise), [self.prompts[used[0]], self.prompts[used[-1]]])
        sizes = sum(p.numel() * p.element_size() for ps in self.parameters.values() for p in ps)
        one = sizes * (4 if s.ema_decay else 3)  # weights, two moments, the average
        checkpoint.check_space(self.folder / "checkpoints", need=one * (s.keep_checkpoints + 2))

    def _begin(self) -> None:
        if checkpoint.steps(self.folder / "checkpoints") or (self.folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{self.folder} already holds a run: continue it with `palate resume {self.folder}`, choose another "
                "run.folder, or replace it with --fresh"
            )
        checkpoint.write_atomically(self.folder / "environment.json", json.dumps(environment(self.base), indent=1).encode())
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

    def _steering(self, step: int) -> tuple[dict[str, Any] | None, Path | None]:
        """(words to take up at this step or None, the control file they came from or None for a replay)."""
        while self.words and self.words[0]["step"] < step:
            self.words.pop(0)
        if self.words and self.words[0]["step"] == step:
            row = self.words.pop(0)
            return {"positive": row.get("positive"), "negative": row.get("negative")}, None
        control = self.folder / "control.json"
        try:
            words = json.loads(control.read_bytes())
            if not isinstance(words, dict) or set(words) != {"positive", "negative"}:
                raise ValueError("expected the keys positive and negative")
            if not all(v is None or isinstance(v, list) and all(isinstance(w, str) for w in v) for v in words.values()):
                raise ValueError("expected lists of words, or null")
            return words, control
        except FileNotFoundError:
            return None, None
        except ValueError as error:
            self.bar.note(f"{control} is ignored: {error}")
            control.unlink(missing_ok=True)
            return None, None

    # -------------------------------------------------------------------------------------------------- guard

    def _measure(self) -> dict[str, float]:
        different = max(1, self.settings.guard.prompts // GUARD_SEEDS)
        prompts = [p for p in spread(self.guard_prompts, different) for _ in range(GUARD_SEEDS)]
        if self.check is None:
            from palate.evaluate import embedded_referee, quick_check

            referee = embedded_referee()
            self.check = lambda model, words, ids: quick_check(model, words, ids, seed=self.settings.seed, referee=referee)
        with self._averaged(), torch.no_grad():
            return {key: float(value) for key, value in self.check(self.model, prompts, list(range(len(prompts)))).items()}

    def _count_for_guard(self, metrics: dict[str, float]) -> None:
        if self.settings.guard.every:
            for key, value in metrics.items():
                self.guard["sums"][key] = self.guard["sums"].get(key, 0.0) + value
            self.guard["steps"] += 1

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
            value = float(self.step) if g.best is None else {**means, **now}.get(g.best)
            if value is None:
                known = ", ".join(sorted({**means, **now}))
                raise ValueError(f"trainer.guard.best: there is no metric {g.best!r}; known: {known}")
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
        self.log.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        self.log.flush()

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
        from palate.evaluate import generate, pairs, write_samples

        steps = self.sample_steps or self.model.default_steps
        guidance = self.model.default_guidance if self.sample_guidance is None else self.sample_guidance
        with self._averaged():
            images = generate(self.model, self.preview_prompts, [0], steps=steps, guidance=guidance)
        words, seeds = pairs(self.preview_prompts, [0])
        target = self.folder / "samples" / checkpoint.name(self.step)
        with _new_folder(target) as temporary:
            write_samples(temporary, images, words, seeds, guidance=guidance, steps=steps)

    def _result(self) -> None:
        if self.settings.preview_every:
            self._preview()
        if hasattr(self.model, "save_adapter"):
            with self._averaged(), _new_folder(self.folder / "adapter") as temporary:
                self.model.save_adapter(temporary)
        self._save()

    def _algorithm_state(self) -> dict[str, Any]:
        state = getattr(self.algorithm, "state_dict", None)
        return state() if state else {}

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
        tensors = self._moving()
        state = {
            "trains": list(self.parameters),
            "samples": self.step * self.settings.batch_size,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "lr_scale": self.lr_scale,
            "finished": self.finished,
            "guard": self.guard,
            "algorithm": checkpoint.split(self._algorithm_state(), "algorithm", tensors),
            "identity": self.identity,
            "base_fingerprint": self.base,
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        os.fsync(self.log.fileno())
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, self.step, tensors, state)
        best = {self.guard["best_step"]} if self.guard["best_step"] is not None else set()
        checkpoint.prune(folder, keep=self.settings.keep_checkpoints, also=best)

    # ------------------------------------------------------------------------------------------------- resuming

    def _resume(self, notes: list[str]) -> None:
        saved = checkpoint.load_newest(self.folder / "checkpoints", warn=notes.append)
        state = saved.state
        if state["base_fingerprint"] != self.base:
            raise checkpoint.CheckpointError(
                f"{self.folder} was trained from other base weights ({state['base_fingerprint'][:12]}, "
                f"now {self.base[:12]}); install the version of the model it started from"
            )
        if state["identity"] != self.identity:
            raise ValueError(
                f"the settings differ from those {self.folder} was started with; only its length, previews and "
                "checkpoints may change. Start a new run for other settings"
            )
        if not self.settings.threads:
            torch.set_num_threads(state["threads"])
        if changed := {k: v for k, v in state["versions"].items() if versions().get(k) != v}:
            notes.append(f"made with {_words(changed)}, now {_words(versions())}: not bit-identical for certain")
        self._load_tensors(saved)
        if state["algorithm"]:
            self.algorithm.load_state_dict(checkpoint.join(state["algorithm"], saved.tensors))
        self.step, self.skipped, self.bad_in_a_row = saved.step, state["skipped"], state["bad_in_a_row"]
        self.lr_scale, self.finished, self.guard = state["lr_scale"], state["finished"], state["guard"]
        self.words = rewind(self.folder, self.step)

    def _load_tensors(self, saved: checkpoint.Checkpoint) -> None:
        if saved.state["trains"] != list(self.parameters):
            raise checkpoint.CheckpointError(f"the checkpoint trains {saved.state['trains']}, this run {list(self.parameters)}")
        for name, parameters in self.parameters.items():
            _copy_into(parameters, saved.tensors, f"weights/{name}")
            if self.ema:
                _copy_into(self.ema[name], saved.tensors, f"ema/{name}")
            moments: dict[int, dict[str, Tensor]] = {}
            prefix = f"optimizer/{name}/"
            for key, value in saved.tensors.items():
                if key.startswith(prefix):
                    index, part = key[len(prefix) :].split("/")
                    moments.setdefault(int(index), {})[part] = value
            for i, parts in moments.items():
                for part, value in parts.items():
                    if part != "step" and (i >= len(parameters) or value.shape != parameters[i].shape):
                        raise checkpoint.CheckpointError(f"optimizer/{name}/{i:04d}/{part} has shape {tuple(value.shape)}")
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
            f"diversity fell from {base['diversity']:.4g} to {now['diversity']:.4g}, below {guard.diversity_ratio:g} of it"
        )
    return broken


def check_reward(reward: Reward, images: Tensor, prompts: Sequence[str]) -> None:
    """ValueError if `reward` does not return one finite number for each image."""
    values = reward(images, prompts)
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"the reward returned {got} for {len(images)} images; expected a tensor of shape ({len(images)},)")
    if not torch.isfinite(values).all():
        raise ValueError(f"the reward returned {[round(float(v), 4) for v in values]} for images of noise; expected finite numbers")


def rewind(folder: Path, step: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl back to `step`; returns the steering events after it, which the resumed run replays.

    They are first made durable in steering.json, so that a crash while resuming does not lose them.
    """
    log, waiting = folder / "metrics.jsonl", folder / "steering.json"
    rows = read_metrics(log)
    events = {row["step"]: row for row in rows if row.get("event") == "steer" and row["step"] > step}
    with contextlib.suppress(FileNotFoundError):
        events = {row["step"]: row for row in json.loads(waiting.read_bytes()) if row["step"] > step} | events
    replay = [events[number] for number in sorted(events)]
    checkpoint.write_atomically(waiting, json.dumps(replay).encode())
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    checkpoint.write_atomically(log, kept.encode())
    return replay


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a crash cut short does not count."""
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number}: expected an object with a whole number as step")
        rows.append(row)
    return rows


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
        raise checkpoint.CheckpointError(f"the checkpoint holds {len(got)} tensors of {prefix}, the model {len(expected)}")
    for key, target in zip(expected, targets, strict=True):
        value = tensors[key]
        if value.shape != target.shape or value.dtype != target.dtype:
            raise checkpoint.CheckpointError(
                f"{key} is {value.dtype} {tuple(value.shape)} in the checkpoint, {target.dtype} {tuple(target.shape)} here"
            )
    _assign(targets, [tensors[key] for key in expected])


@torch.no_grad()
def _assign(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON has no NaN: such values are written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v if isinstance(v, str) else ', '.join(v)}" for k, v in values.items() if v is not None)


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` when the block ends well."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Stop:
    number = 0


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """The first SIGTERM or SIGINT is noted, for the end of the step; a second one has its usual effect at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _frame: object) -> None:
        if stop.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.number = number

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

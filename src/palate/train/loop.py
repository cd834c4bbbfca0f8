"""The only training loop; it owns every side effect: backward, clipping, updates, averages, logs, checkpoints.

An algorithm yields losses and touches nothing else. Every random number is a function of (seed, sample id, step,
purpose), so a run continued from a checkpoint equals the uninterrupted one bit for bit, and previews or checks never
disturb it.

Step n (1, 2, ...) makes one update, or the several that an algorithm asks for; checkpoint and samples `step-NNNNNN`
hold the weights after n steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch

from palate.core import AsksOtherPrompts, Fingerprinted, LogsLater, Random
from palate.models.sizes import at_size
from palate.runtime import distributed, sharding
from palate.runtime.errors import InputError
from palate.runtime.images import encode_png, grid
from palate.runtime.progress import Progress
from palate.runtime.result import forget_adapter
from palate.runtime.runlog import RunLog
from palate.runtime.signals import Stop
from palate.train.batches import Batches
from palate.train.checks import check_reward, checked_images, encode_all, gradient_cause, memory_advice, shard_networks
from palate.train.failure import Failures
from palate.train.guard import Guard, Measurer, measure_of
from palate.train.guard_action import carry_out
from palate.train.job import Job, Outcome, identity_of
from palate.train.notes import Warnings, how_to_continue
from palate.train.preview import Previews, write_adapter
from palate.train.saving import Saver
from palate.train.state import Counters, Replicas, Weights
from palate.train.steering import Steering, noise_images, unknown_words
from palate.train.tracking import Trackers, tracking
from palate.train.update import Updater, as_trained


class Run:
    """One run: parts that each own their state, and the order in which a step uses them."""

    def __init__(self, job: Job, *, progress: bool = True):
        self.job, self.settings, self.ranks = job, job.trainer, distributed.ranks()
        self.reward = job.reward
        s = self.settings
        if s.threads:
            torch.set_num_threads(s.threads)
        self.batches = Batches(
            job.model, job.prompts, job.latents, seed=s.seed, size=s.batch_size, micro_batches=s.micro_batches,
            ranks=self.ranks,
        ).of_sizes(job.sizes, job.buckets)  # fmt: skip
        self.counters = Counters()
        self.replicas = Replicas(job.algorithm, s.micro_batches, self.ranks)
        self.base = job.model.fingerprint() if isinstance(job.model, Fingerprinted) else ""
        self.sharded = shard_networks(job.model, s.sharding, self.ranks) if s.sharding != "none" else []
        self.weights = Weights(job.model, job.algorithm.trains, s)
        if self.ranks.size > 1 and len(set(self.ranks.all_gather_json(self.base + self.weights.digest()))) > 1:
            raise InputError("the ranks begin with different weights; expected the same model and seed on all of them")
        self.updater = Updater(
            self.weights, self.ranks, micro_batches=s.micro_batches, sharded=self.sharded, diagnose=self._gradient_cause
        )
        self.guard = Guard(s.guard, job.algorithm.later_metrics if isinstance(job.algorithm, LogsLater) else ())
        self.log = RunLog(job.folder, writes=self.ranks.is_main)
        self.progress = Progress(s.steps, visible=progress and self.ranks.is_main)
        self.previews = Previews(
            job.model, job.algorithm, self.weights, job.preview[: s.preview_prompts], job.sample, folder=job.folder,
            ranks=self.ranks,
        )  # fmt: skip
        self.steering = Steering(
            job.folder, self.replicas, self.ranks, unknown_words=self._unknown_words, note=self.progress.note
        )
        self.failures = Failures(
            job.folder, s, self.weights, self.replicas, self.counters, self.ranks, self.base, self.progress.note
        )
        measure = measure_of(job, self.previews.sampler)
        self.measure = Measurer(
            job.model, job.preview, s.guard, measure, self.weights, self.ranks, job.sample.image_size
        )
        self.saver = Saver(
            job.folder, s, self.ranks, self.weights, self.replicas, self.guard, measure, self.counters, self.log,
            self.base, job.identity or identity_of(s, job.sample.image_size), job.recipe, job.kept,
        )  # fmt: skip
        self.trackers = Trackers({}, self.progress.note)
        self.warnings = Warnings(job.algorithm, self.weights, self.progress.note)

    # --------------------------------------------------------------------------------------------------- the loop

    def go(self, stop: Stop, *, resume: bool) -> Outcome:
        """From the start, or from the newest checkpoint, to the end or to a signal."""
        self._preflight()
        notes: list[str] = []
        if resume:
            self.steering.replay = self.saver.resume(notes)
        else:
            self.ranks.on_main(self.saver.begin)
        counters, steps, folder = self.counters, self.settings.steps, self.job.folder
        self.progress.begin(counters.step)
        with self.log, self.progress, _tracked(self) as self.trackers:
            for text in notes:
                self.progress.note(text)
            if counters.finished and not (counters.finished == "finished" and counters.step < steps):
                ended = f"this run has ended at step {counters.step} ({counters.finished})"
                self.progress.note(f"{ended}; {how_to_continue(counters, folder)}")
                return Outcome(folder, counters.step, counters.finished, 0)
            counters.finished = ""
            self.ranks.on_main(lambda: forget_adapter(folder))
            self.warnings.say(counters.step)
            if counters.step == 0 and not resume:  # a checkpoint of step 0 was saved after this
                if self.job.reference:
                    self.log.write({"step": 0, "event": "reference", "reference": self.job.reference})
                self._first_look()
            while counters.step < steps and not counters.finished:
                self.updater.check_gradient = counters.step == 0
                with memory_advice(self.weights), sharding.inside_networks():
                    self.advance()
                stop.stepped = True
                asked = signal.SIGTERM if distributed.orphaned() else stop.number
                number = max(self.ranks.all_gather_json(asked))
                if number:
                    self._hand_over()
                    self.progress.note(f"stopped by signal {number} after step {counters.step}; a checkpoint is saved")
                    return Outcome(folder, counters.step, "signal", 128 + number)
            if counters.step and not resume:
                self.updater.require_losses(self.job.algorithm)
            counters.finished = counters.finished or "finished"
            self._finish()
            return Outcome(folder, counters.step, counters.finished, 0)

    def advance(self) -> None:
        """One step and everything that belongs to its number: nothing of it is half done in a checkpoint."""
        began, step = time.perf_counter(), self.counters.step + 1
        words = self.steering.take(step, self.log)
        samples = self.batches.samples(step)
        batches = self.batches.split(samples)
        before = self.failures.snapshot(self.updater.updates)
        with at_size(self.job.model, samples.size, "prompts.sizes"):
            metrics, problem = self._update(step, batches)
        self.counters.step = step
        if words:
            self.steering.confirm(step, words, self.log)
            self.guard.forget_best()
        if problem:
            self.failures.skip(problem, before, samples, self.log, self.saver.save)
        else:
            self.counters.bad_in_a_row = 0
            self.weights.average(step)
            row = {"step": step, "event": "step", **metrics, "samples": step * self.settings.batch_size}
            self.log.write({**row, "step_seconds": round(time.perf_counter() - began, 4)})
            self.guard.add(metrics)
            self.progress.show(step, {**metrics, "step_seconds": time.perf_counter() - began})
            self.warnings.say(step)
        self._scheduled(step)

    def _update(self, step: int, batches: list[Any]) -> tuple[dict[str, float], str]:
        self.weights.forget_gradients()
        streams = [
            algorithm.step(self.job.model, self.reward, batch, Random(self.settings.seed, step, batch.ids))
            for algorithm, batch in zip(self.replicas.algorithms, batches, strict=True)
        ]
        with as_trained(self.job.model):
            return self.updater.step(streams, step, self.counters.lr_scale)

    def _scheduled(self, step: int) -> None:
        """Guard, preview, checkpoint, in this order: a checkpoint holds what the guard decided."""
        s = self.settings
        if s.guard.every and step % s.guard.every == 0 and step >= s.guard.after:
            self._guard(step)
        last = step == s.steps or bool(self.counters.finished)
        if s.preview_every and step % s.preview_every == 0 and not last:
            self._preview(step)
        due = s.checkpoint_every and step % s.checkpoint_every == 0
        if not last and (due or self.guard.state.best_step == step):
            self.progress.phase("saving")
            self.saver.save()

    def _preview(self, step: int) -> None:
        self.progress.phase("previews", 0, len(self.previews.prompts))
        images = self.previews.draw(step)
        sheet = grid(images, max(1, round(len(images) ** 0.5)), gap=2)
        self.trackers.image(step, "previews", sheet)
        self.progress.picture(encode_png(sheet), f"previews of step {step}")

    def _guard(self, step: int) -> None:
        decision = self.guard.decide(step, self.measure())
        self.log.write(decision.row)
        carry_out(decision, step, guard=self.guard, saver=self.saver, counters=self.counters, note=self.progress.note)

    def _finish(self) -> None:
        if self.settings.preview_every:
            self._preview(self.counters.step)
        if self.guard.state.base and self.settings.tracker:
            first, last = self.guard.state.base, self.measure()
            rows = [{"metric": key, "base": first[key], "result": last.get(key)} for key in first]
            self.trackers.table(self.counters.step, "result", rows)
        self._hand_over()

    def _hand_over(self) -> None:
        """The checkpoint, and the trained weights in the form in which others read them: a copy, so it comes second."""
        self.progress.phase("saving")
        self.saver.save()
        write_adapter(self.job.folder, self.job.model, self.weights, self.sharded, self.ranks)

    # ------------------------------------------------------------------------------------------ before the first step

    def _preflight(self) -> None:
        """Find now what would end the run later: unknown words, a reward of the wrong shape, a full disk."""
        s, job = self.settings, self.job
        used = self.batches.used_prompts(s.steps)
        preview = job.preview if s.preview_every or s.guard.every else []
        other = job.algorithm.other_prompts(job.model, used) if isinstance(job.algorithm, AsksOtherPrompts) else []
        encode_all(job.model, [*used, *other], preview)
        job.check_sizes()
        with torch.no_grad():
            images = checked_images(noise_images(job.model, s.seed, 2))
            self.reward = check_reward(job.reward, images, [used[0], used[-1]])
        self.replicas.check_states()
        if problem := self._unknown_words():
            raise InputError(problem)
        self.ranks.on_main(self.saver.check_space)

    def _unknown_words(self) -> str:
        job, s = self.job, self.settings
        used = self.batches.used_prompts(s.steps)
        return unknown_words(job.algorithm, job.model, job.reward, used, seed=s.seed, ranks=self.ranks)

    def _gradient_cause(self) -> str:
        job, policy = self.job, self.weights.parameters["policy"]
        return gradient_cause(job.model, job.algorithm, self.reward, job.prompts[0], policy, self.settings.seed)

    def _first_look(self) -> None:
        if self.settings.preview_every:
            self._preview(0)
        if self.settings.guard.every:
            for row in self.guard.begin(*self.measure.before()):
                self.log.write(row)
            self.progress.phase("saving")
            self.saver.save()


@contextlib.contextmanager
def _tracked(run: Run) -> Iterator[Trackers]:
    """Inside, what is logged and previewed also goes to the trackers."""
    names = run.settings.tracker if run.ranks.is_main else []
    config = {"algorithm": type(run.job.algorithm).__name__, **dataclasses.asdict(run.settings)}
    at, note = run.counters.step, run.progress.note
    with tracking(names, run.job.folder, config, resumed_at=at, note=note) as trackers:
        run.log.listener = trackers.row
        yield trackers

"""Draws the pictures that are voted on, ahead of time, in a thread of its own; and any picture that a page asks for.

Pictures of one concept are drawn half plainly and half with words of style, size and background in a hidden prompt:
plain pictures of a one-step generator are too much alike to be told apart. Each is stored, with a row in pool.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from palate.core import Model, Random, Reward, Sampler
from palate.export import load_one_step, one_step_folder
from palate.models.vocabulary import vocabulary
from palate.rewards.emoji import load_reward
from palate.runs.folder import trained_model
from palate.runtime import checkpoint, runlock
from palate.runtime.errors import InputError, PalateError
from palate.runtime.files import split_lines
from palate.runtime.images import UNREADABLE, encode_png, from_pixels, quantise, read_pixels, to_pixels
from palate.studio.workspace import Workspace
from palate.taste.features import Features, features_of
from palate.taste.learner import Array
from palate.taste.pictures import raw_features
from palate.taste.staging import bring_in, staging
from palate.taste.votes import Picture
from palate.taste.words import hidden_prompt

GENERATOR = "emoji-1step"
PER_CONCEPT = 8  # pictures of a concept that are drawn together
POOL = 480  # pictures of a round; then the thread rests
LOADING = threading.Lock()  # weights are filled in under a setting of the whole process: one thread at a time


class Drawn(NamedTuple):
    """A picture of the pool: the prompt that is shown, and how it was drawn."""

    prompt: str
    picture: Picture
    features: Array  # (D,), not standardised


class Artist:
    """One thread draws; the model is used by one caller at a time."""

    def __init__(self, workspace: Workspace, *, pool: int = POOL):
        self.workspace, self.size = workspace, pool
        self.pool: list[Drawn] = []
        self.problem = ""
        self.ready, self.changed = threading.Event(), threading.Condition()
        self._using, self._stop = threading.Lock(), threading.Event()
        self._wanted: list[str] = []  # prompts of the person's own, drawn first
        self._source: str | None = None
        self._step: int | None = None  # of the source: a run that went on, or back, is drawn from anew
        self._thread = threading.Thread(target=self._work, name="artist", daemon=True)
        self.model: Model
        self.sampler: Sampler
        self.reward: Reward
        self.features: Features
        self.fingerprint = ""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        with self.changed:
            self.changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=20)

    def wake(self, prompts: Sequence[str] = ()) -> None:
        """Look at the settings again; `prompts` are drawn before anything else."""
        with self.changed:
            self._wanted += [prompt for prompt in prompts if prompt not in self._wanted]
            self.changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Whether model and reward are loaded, within the time."""
        return self.ready.wait(seconds)

    @property
    def works(self) -> bool:
        """Whether model and reward are loaded, and nothing is wrong with them."""
        return self.ready.is_set() and not self.problem

    @property
    def silence(self) -> str:
        """Why there is nothing to say or to draw yet."""
        return self.problem or "the model is still loading; try again in a moment"

    def rows(self, prompts: Sequence[str] = ()) -> list[Drawn]:
        """What can be voted on now: pictures by the model in use that are still there; of `prompts`, if any."""
        source, pictures = self.workspace.settings()["source"], self.workspace.store.pictures
        any_step = source != self._source  # its model is not loaded yet
        return [
            drawn
            for drawn in list(self.pool)
            if drawn.picture.run == source
            and (any_step or drawn.picture.step == self._step)
            and (not prompts or drawn.prompt in prompts)
            and (pictures / drawn.picture.file).is_file()
        ]

    def look(self, images: Tensor, prompts: Sequence[str]) -> Array:
        with self._using:
            return raw_features(self.features, images, prompts)

    # ------------------------------------------------------------------------------------------------- drawing

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Images (N, 3, H, W) in [0, 1]; the noise is a function of the seed alone, so runs are compared in pairs."""
        with self._using, torch.no_grad():
            model, sampler, parts = self.model, self.sampler, []  # read inside: the two change together
            for i in range(0, len(prompts), 16):
                rng = Random(0, 0, seeds[i : i + 16])
                noises = [rng.normal(f"studio-{k}", model.latent_shape) for k in range(sampler.steps)]
                cond = model.encode_prompts(list(prompts[i : i + 16]))
                parts.append(model.decode(sampler(model, cond, noises)))
        return torch.cat(parts).float()

    def _work(self) -> None:
        try:
            self._go_on()
        except Exception:  # a fault of ours: the pages say that nothing more comes, the terminal where it happened
            self.problem = "No more pictures are drawn after a fault of palate: its terminal shows it. Start it again"
            self.ready.set()
            raise

    def _go_on(self) -> None:
        try:
            self._load()
            self._recall()
        except (PalateError, OSError) as error:
            self.problem = str(error)
            self.ready.set()
            return
        self.ready.set()
        rng = np.random.default_rng([int(time.time()), len(self.pool)])
        while not self._stop.is_set():
            try:
                self._follow_source()
                drew, self.problem = self._draw_some(rng), ""
            except (PalateError, OSError) as error:
                self.problem, drew = str(error), False
            if not drew:
                with self.changed:
                    self.changed.wait(timeout=2.0)

    def _load(self) -> None:
        with LOADING:
            model, self.sampler = generator()
            self.reward = load_reward("emoji")
        self.model, self.fingerprint = model, model.fingerprint()
        self.features = features_of(self.reward, "emoji")
        self._source = ""

    def _follow_source(self) -> None:
        """Draw with the model of the run that the settings name, as it is now; while it trains on, as it was."""
        source = self.workspace.settings()["source"]
        step = self._step_of(source)
        if source == self._source and step == self._step:
            return
        with LOADING:
            if source:
                model, sampler = trained_model(self.workspace.run(source), warn=lambda text: None)
            else:
                model, sampler = generator()
        if sampler is None:
            raise InputError(f"{source} is no run of a one-step generator; pictures are drawn by one")
        with self._using:
            self.model, self.sampler = model, sampler
        self._source, self._step = source, step

    def _step_of(self, source: str) -> int | None:
        """The newest step of the run; None for the plain model."""
        if not source:
            return None
        try:
            folder = self.workspace.run(source)
        except InputError as error:
            raise InputError(f"{source}, which drew these pictures, is gone; choose others under Settings") from error
        if source == self._source and runlock.status(folder).state == "running":
            return self._step
        return max(checkpoint.steps(folder / "checkpoints"), default=None)

    def _draw_some(self, rng: np.random.Generator) -> bool:
        """A few pictures more of one concept; False when there are enough."""
        with self.changed:
            wanted = self._wanted.pop(0) if self._wanted else None
        own = self.workspace.settings()["prompts"]
        if wanted is None and len(self.rows(own)) >= self.size:
            return False
        prompt = wanted or str(rng.choice(own if own else vocabulary().concepts))
        hidden = [prompt if k < PER_CONCEPT // 2 else hidden_prompt(prompt, rng) for k in range(PER_CONCEPT)]
        seeds = [int(seed) for seed in rng.integers(2**31, size=PER_CONCEPT)]
        images = self.draw(hidden, seeds)
        self.add([prompt] * PER_CONCEPT, images, hidden, seeds)
        return True

    def add(self, prompts: Sequence[str], images: Tensor, hidden: Sequence[str], seeds: Sequence[int]) -> None:
        """Store pictures and put them into the pool."""
        features, rows, store = self.look(quantise(images), prompts), [], self.workspace.store
        with staging(store) as staged:
            for prompt, image, text, seed, row in zip(prompts, images, hidden, seeds, features, strict=True):
                picture = Picture(staged.keep(png_of(image)), text, self.fingerprint, seed, 1.0, self.sampler.steps,
                                  self._source or "", self._step)  # fmt: skip
                rows.append(Drawn(prompt, picture, row))

            def record() -> None:
                with open(self.workspace.home / "pool.jsonl", "a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"shown": d.prompt, **d.picture.__dict__}) + "\n" for d in rows)

            bring_in(staged, store, record)
        with self.changed:
            self.pool += rows
            self.changed.notify_all()

    def _recall(self) -> None:
        """The pool of an earlier start, as far as its pictures and the model are still the same."""
        path = self.workspace.home / "pool.jsonl"
        found: list[tuple[str, Picture]] = []
        for line in split_lines(path.read_text("utf-8")) if path.is_file() else ():
            try:
                row = json.loads(line)
                prompt = str(row["shown"])
                picture = Picture(**{key: row[key] for key in Picture.__dataclass_fields__ if key in row})
            except (ValueError, TypeError, KeyError):
                continue  # a line that was cut short
            if picture.model == self.fingerprint and (self.workspace.store.pictures / picture.file).is_file():
                found.append((prompt, picture))
        for i in range(0, len(found), 64):
            part: list[tuple[str, Picture, Tensor]] = []
            for prompt, picture in found[i : i + 64]:
                with contextlib.suppress(*UNREADABLE):  # damaged since; the others can be chosen among
                    part.append((prompt, picture, read_picture(self.workspace.store.path_of(picture))))
            rows = self.look(torch.stack([x for *_, x in part]), [prompt for prompt, *_ in part]) if part else ()
            self.pool += [Drawn(p, picture, row) for (p, picture, _), row in zip(part, rows, strict=True)]


def generator() -> tuple[Any, Any]:
    """(model, sampler): the package's one-step generator."""
    folder = one_step_folder(GENERATOR)
    assert folder is not None, "it is in the package"
    return load_one_step(folder)


def png_of(image: Tensor) -> bytes:
    return encode_png(to_pixels(image))


def read_picture(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return from_pixels(read_pixels(path))

"""Control words that change while a run trains: `steer` leaves them in control.json, the loop takes them up.

Each change is an event of metrics.jsonl, and of steering.json when a resumed run has to replay it, so a run that was
steered and interrupted ends bit for bit as one that was only steered.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from palate import recipe as recipes
from palate.core import Model, Random, Reward, Steerable
from palate.recipe.prompts import check_control_words, longest_of
from palate.runtime.distributed import Ranks
from palate.runtime.errors import InputError
from palate.runtime.exclusive import exclusive
from palate.runtime.files import parse_json, write_atomically
from palate.runtime.runlog import METRICS, RunLog, read_metrics
from palate.train.python_recipe import from_python
from palate.train.state import Replicas

CONTROL = "control.json"
STEERABLE_MEMBERS = ("steer", "control_texts", "state_dict", "load_state_dict")
Words = dict[str, Any]  # {"positive": list or None, "negative": list or None}; None keeps a list


def steer(folder: str | Path, positive: Sequence[str] | None = None, negative: Sequence[str] | None = None) -> None:
    """Change the control words of the run in `folder`, from its next step on; None keeps a list.

    Of a run that is stopped or has finished they wait until it goes on, for more steps if need be. InputError: they are
    no words, or the run trains without any.
    """
    folder = Path(folder)
    words: Words = {"positive": positive, "negative": negative}
    if positive is None and negative is None:
        raise InputError("steer got neither positive nor negative words; give at least one list")
    for side, given in words.items():
        if given is None:
            continue
        if isinstance(given, str) or not all(isinstance(word, str) and word.strip() for word in given):
            raise InputError(f"{side}: expected a list of words, none empty, got {given!r}")
        words[side] = [word.strip() for word in given]
    if not (folder / METRICS).is_file():
        raise InputError(f"{folder} is not a run (it holds no {METRICS}); give a run, for example runs/NAME")
    if (folder / "recipe.yaml").is_file() and not from_python(folder):
        recipe = recipes.read(str(folder / "recipe.yaml"), stored=True)
        algorithm = recipes.build_algorithm(recipe)
        if not isinstance(algorithm, Steerable):
            raise InputError(f"{folder} trains with {recipe.algorithm.name}, which has no control words to change")
        for row in read_metrics(folder / METRICS):
            if row.get("event") == "steer":  # the words in force are those of the recipe, changed since
                algorithm.steer(row.get("positive"), row.get("negative"))
        together = _with_waiting(words, folder / CONTROL)
        algorithm.steer(together["positive"], together["negative"])
        given = [side for side, side_words in together.items() if side_words is not None]
        check_control_words(recipe, algorithm, "a dog", sides=given)
    with exclusive(folder):
        write_atomically(folder / CONTROL, json.dumps(_with_waiting(words, folder / CONTROL)).encode())


def _with_waiting(words: Words, control: Path) -> Words:
    """The words, and on a side that they leave as it is those that still wait for the next step."""
    try:
        waiting = parse_control(control.read_bytes())
    except (FileNotFoundError, ValueError):
        return words
    return {side: waiting[side] if given is None else given for side, given in words.items()}


def await_words(folder: Path, seen: int, seconds: float) -> dict[str, Any] | None:
    """The event by which a running run took or refused new words, of the rows after the first `seen`; None: not yet."""
    deadline = time.monotonic() + seconds
    while True:
        for row in read_metrics(folder / METRICS)[seen:]:
            if row.get("event") in ("steer", "steer_refused"):
                return row
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)


def parse_control(text: bytes) -> Words:
    """The content of a control file. ValueError: it is something else."""
    words = parse_json(text)
    if not isinstance(words, dict) or set(words) != {"positive", "negative"}:
        raise InputError("expected the keys positive and negative")
    if not all(v is None or (isinstance(v, list) and all(isinstance(w, str) for w in v)) for v in words.values()):
        raise InputError("expected lists of words, or null")
    return words


def describe(values: dict[str, Any]) -> str:
    """ "positive 3d, negative flat": what is set, in words."""
    return ", ".join(f"{k} {v if isinstance(v, str) else ', '.join(v)}" for k, v in values.items() if v is not None)


class Steering:
    """Takes up new words between two steps, on all ranks alike.

    unknown_words: why the reward refuses one of the words in force, "" if it knows them all. note: says a sentence.
    """

    def __init__(
        self, folder: Path, replicas: Replicas, ranks: Ranks, *,
        unknown_words: Callable[[], str], note: Callable[[str], None]
    ):  # fmt: skip
        self.control, self.replicas, self.ranks = folder / CONTROL, replicas, ranks
        self.unknown_words, self.note = unknown_words, note
        self.replay: list[dict[str, Any]] = []  # events of before a resume, in the order of their steps
        self._replayed: Words | None = None  # the last of them that was replayed
        self._read = b""  # the control file as it was read
        self._ignored = ""  # what was last said of one that is none
        self._from_file = False  # whether the words of this step came from it and not from a replay

    def take(self, step: int, log: RunLog) -> Words | None:
        """The words that this step is the first to use, or None. Words that cannot be used must not end the run."""
        words, self._from_file = self.ranks.all_gather_json(self._next(step) if self.ranks.is_main else None)[0]
        if not words:
            return None
        problem = self._apply(words)
        if not problem:
            return words
        log.write({"step": step, "event": "steer_refused", **words, "reason": problem})
        self.note(f"step {step}: the new words are refused and the old ones kept: {problem}")
        if self._from_file:
            self._forget_control()
        return None

    def confirm(self, step: int, words: Words, log: RunLog) -> None:
        """The step that used them is done: from now on they are part of the run's history."""
        log.write({"step": step, "event": "steer", **words})
        self.note(f"step {step}: words now {describe(words)}")
        if self._from_file:
            if self.ranks.is_main:
                log.sync()
            self._forget_control()

    def _apply(self, words: Words) -> str:
        """Give the words to every replica; if one of them or the reward refuses, the old ones are back: why."""
        before = self.replicas.states()
        problem = ""
        try:
            for algorithm in self.replicas.algorithms:
                assert isinstance(algorithm, Steerable), "words are taken for steerable algorithms only"
                algorithm.steer(words["positive"], words["negative"])
        except ValueError as error:
            problem = str(error)
        problem = problem or self.unknown_words()
        if problem:
            self.replicas.restore(before)
        return problem

    def _next(self, step: int) -> tuple[Words | None, bool]:
        """(words for this step or None, whether they come from the control file); asked on the main rank."""
        while self.replay and self.replay[0]["step"] < step:
            self.replay.pop(0)
        if self.replay:  # older than what waits in the control file, so they come first, each at its own step
            if self.replay[0]["step"] > step:
                return None, False
            row = self.replay.pop(0)
            self._replayed = {"positive": row.get("positive"), "negative": row.get("negative")}
            return self._replayed, False
        try:
            self._read = self.control.read_bytes()
            words = parse_control(self._read)
            if words == self._replayed:  # a kill came after they were taken and before their file was deleted
                self._forget_control()
                return None, False
            if not isinstance(self.replicas.algorithms[0], Steerable):
                lacks = [name for name in STEERABLE_MEMBERS if name not in dir(self.replicas.algorithms[0])]
                raise InputError(f"this algorithm has no control words (it lacks {', '.join(lacks)})")
            return words, True
        except FileNotFoundError:
            return None, False
        except (ValueError, OSError) as error:
            if str(error) != self._ignored:  # a file that cannot be read cannot always be deleted either
                self._ignored = str(error)
                self.note(f"{self.control} is ignored: {error}")
            self._forget_control()
            return None, False

    def _forget_control(self) -> None:
        """Delete the control file that was read; words that came since then stay, for the next step."""
        if self.ranks.is_main:
            with contextlib.suppress(OSError), exclusive(self.control.parent):
                if self.control.read_bytes() == self._read:
                    os.unlink(self.control)


@torch.no_grad()
def unknown_words(
    algorithm: Any, model: Model, reward: Reward, prompts: Sequence[str], *, seed: int, ranks: Ranks
) -> str:
    """Why the reward refuses one of the control words in force, "" if it knows them all. All ranks must ask."""
    if not isinstance(algorithm, Steerable):
        return ""

    def ask() -> str:
        image = noise_images(model, seed, 1)
        for side, texts in algorithm.control_texts(longest_of(prompts)).items():
            for text in texts:
                try:
                    reward(image, [text])
                except ValueError as error:
                    return f"algorithm.{side}: {error}"
        return ""

    return ranks.all_gather_json(ranks.on_main(ask))[0]


def noise_images(model: Model, seed: int, count: int) -> torch.Tensor:
    """(count, 3, H, W): what the model decodes from noise, to try a reward on."""
    noise = Random(seed, 0, range(count)).normal("preflight", model.latent_shape)
    return model.decode(noise)

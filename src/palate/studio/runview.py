"""A run as the pages show it, read from its folder each time: state, step, curves, words, pictures, the guard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate import recipe as recipes
from palate.algorithms.direct import DirectSettings
from palate.algorithms.srpo import SRPOSettings
from palate.evaluate import read_index
from palate.recipe import Recipe
from palate.report import sentence
from palate.runs.stored import ended_by_guard, trained_to
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.files import folder_size
from palate.runtime.progress import counted
from palate.runtime.result import evaluation_of
from palate.runtime.runlog import read_metrics, words_after
from palate.studio.process import SILENT, Processes

SIDES = ("positive", "negative")  # of control words
STATES = {"waiting": "Starting", "running": "Running", "stopped": "Stopped", "died": "Died", "finished": "Finished"}
LOST = {  # figure of the guard -> what a person lost when it broke its limit
    "concept": "pictures that show the right thing",
    "background": "the backgrounds that were asked for",
    "fit": "what the prompts ask for",
    "heldout": "the fit to the prompt, as a second judge sees it",
    "heldout_fall": "the fit to the prompt, as a second judge sees it",
    "diversity": "variety",
    "variety": "variety",
}
RECENT = 10  # steps whose time tells how long the rest takes


def _left(key: str, row: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """What is left of a figure of the guard, in brackets; "" where it has no unit that says anything."""
    now, base = row.get(key), before.get(key)
    if not isinstance(now, (int, float)):  # not measured, or not a number, which a log holds as a word
        return ""
    if key in ("fit", "variety"):  # ratios already
        return f" ({100 * now:.0f} % is left)"
    if not isinstance(base, (int, float)):
        return ""
    if key in ("concept", "background"):
        return f" ({100 * now:.0f} of 100 now, {100 * base:.0f} before)"
    return f" ({100 * now / base:.0f} % is left)" if key == "diversity" and base else ""


@dataclass(frozen=True)
class Words:
    """Control words in force, each with the step from which it holds."""

    positive: dict[str, int] = field(default_factory=dict)
    negative: dict[str, int] = field(default_factory=dict)

    def of(self, side: str) -> dict[str, int]:
        """Those of a side, "positive" or "negative"."""
        return {"positive": self.positive, "negative": self.negative}[side]


@dataclass(frozen=True)
class RunView:
    name: str
    folder: Path
    state: str  # a key of STATES
    message: str
    recipe: Recipe
    rows: list[dict[str, Any]]
    previews: list[int]

    @property
    def state_text(self) -> str:
        return STATES[self.state]

    @property
    def busy(self) -> bool:
        """Whether a process trains it, or loads its model."""
        return self.state in ("running", "waiting")

    @property
    def step(self) -> int:
        return max((int(row.get("step", 0)) for row in self.rows), default=0)

    @property
    def steps(self) -> int:
        return self.recipe.trainer.steps

    def of(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("event") == event]

    @property
    def time_left(self) -> str:
        times = [float(row["step_seconds"]) for row in self.of("step")[-RECENT:] if "step_seconds" in row]
        if not times or self.state != "running" or self.step >= self.steps:
            return ""
        seconds = sum(times) / len(times) * (self.steps - self.step)
        left = counted(math.ceil(seconds), "second") if seconds < 90 else f"{round(seconds / 60)} minutes"
        return f"{left} left"

    @property
    def waits_for(self) -> str:
        """What goes on while no step ends; "" while steps do."""
        if self.state == "waiting":
            return "Loading the model; the first step follows."
        if self.state != "running" or 0 < self.step < self.steps:
            return ""
        return "Looking at the pictures before the first step." if self.step == 0 else "A last look; then it is saved."

    @property
    def steerable(self) -> bool:
        algorithm = self.recipe.algorithm
        return isinstance(algorithm, DirectSettings) or (
            isinstance(algorithm, SRPOSettings) and algorithm.preference == "relative"
        )

    @property
    def one_step(self) -> bool:
        """Whether its model is a one-step generator, which can draw the pictures to choose among."""
        return isinstance(self.recipe.algorithm, DirectSettings)

    @property
    def page(self) -> str:
        """Where it is watched: with its words where it has some."""
        return "/steer" if self.steerable and self.recipe.reward.name != "taste" else "/align"

    @property
    def aim(self) -> str:
        """What it trains for, in a few words: your taste, the words in force, or a reward's name."""
        words = self.words()
        said = [f"+ {word}" for word in words.positive] + [f"− {word}" for word in words.negative]
        return f"Your words: {', '.join(said)}" if said and self.page == "/steer" else self.reward_name

    @property
    def reward_name(self) -> str:
        return {"taste": "Your taste", None: "Weighted reward"}.get(
            self.recipe.reward.name, self.recipe.reward.name or ""
        )

    def words(self) -> Words:
        """Those of the recipe, then those of each steering event that the result of a run ended by its guard has seen;
        a word that stays keeps its step."""
        now = {side: dict.fromkeys(getattr(self.recipe.algorithm, side, ()), 0) for side in SIDES}
        last = trained_to(self.rows, self.step) if ended_by_guard(self.rows) else self.step
        for row in self.of("steer"):
            for side in now if row["step"] <= last else ():
                if row.get(side) is not None:
                    now[side] = {word: now[side].get(word, int(row["step"])) for word in row[side]}
        return Words(**now)

    def refusal(self) -> str:
        """Why the newest words were refused by the run; "" once others were taken up."""
        last = [row for row in self.rows if row.get("event") in ("steer", "steer_refused")][-1:]
        return str(last[0].get("reason", "")) if last and last[0]["event"] == "steer_refused" else ""

    @property
    def silent(self) -> bool:
        """Whether the message is the studio's own, of a process that said nothing."""
        return self.message == SILENT

    @property
    def ended_by_guard(self) -> bool:
        """Whether the guard ended it, so that it does not go on."""
        return self.state == "finished" and self.message.startswith("guard")

    @property
    def began_with(self) -> str:
        """The run whose result this one goes on from, or the path where it lies elsewhere; "" for one that begins with
        the plain model, or one of the package."""
        start, runs = self.recipe.model.start, self.folder.parent.resolve()
        if start is None or "/" not in start:
            return ""
        places = (place for place in (Path(start).absolute(), Path(start).resolve()) if runs in place.parents)
        return next((place.relative_to(runs).parts[0] for place in places), start)

    def needs(self, folder: Path) -> bool:
        """Whether the result that it began with lies in that run's folder."""
        start = self.recipe.model.start
        return start is not None and Path(start).resolve().is_relative_to(folder.resolve())

    def guard_sentence(self) -> str:
        rows = self.of("guard")
        if not rows:
            waits = "The guard, which ends a run that loses too much, has not looked yet."
            return waits if self.recipe.trainer.guard.every else "This run has no guard."
        last = rows[-1]
        kept = f"{100 * last['concept']:.0f} of 100 pictures show the right thing" if "concept" in last else ""
        if last["verdict"] in ("ok", "base"):
            when = "before training" if last["step"] == 0 else f"at step {last['step']}"
            return f"Guard {when}: all is well; {kept}." if kept else f"Guard {when}: all is well."
        back = f" The run ended there; its result is step {last['best_step']}." if last.get("action") == "stop" else ""
        if back and last["best_step"] == 0:
            back = " The run ended there, and changed nothing." + (
                " More rounds of this taste would cost more than they give." if self.began_with else ""
            )
        broken = [part.partition(" ")[0] for part in last["verdict"].split("; ")]
        base: dict[str, Any] = next((row for row in rows if row["verdict"] == "base"), {})
        lost = {LOST[key]: LOST[key] + _left(key, last, base) for key in broken if key in LOST}
        too_much = f"too much was lost of {' and of '.join(lost.values())}"
        what = too_much if lost else "the pictures changed more than they may"
        since = " over all rounds" if self.began_with and self.recipe.trainer.guard.base == "reference" else ""
        return f"The guard at step {last['step']}{since}: {what}.{back}"

    def drawn(self, step: int) -> tuple[str, int, int]:
        """What tells these pictures of a step from others: a run that went back draws the same step anew."""
        folder = self.folder / "samples" / checkpoint.name(step)
        try:
            return str(self.folder), step, (folder / "index.jsonl").stat().st_mtime_ns
        except OSError:
            return str(self.folder), step, 0

    def pictures(self, step: int) -> list[dict[str, Any]]:
        try:
            return read_index(self.folder / "samples" / checkpoint.name(step))
        except InputError:
            return []

    def marks(self) -> list[tuple[int, str]]:
        """Steps from which other words hold, with what was added (+) and taken away (-)."""
        found, before = [], {side: list(getattr(self.recipe.algorithm, side, ())) for side in SIDES}
        for row in self.of("steer"):
            now = words_after(before, row)
            said = [
                f"{sign}{title} {word}"
                for side, title in (("positive", "wanted"), ("negative", "unwanted"))
                for sign, here, there in (("+", now, before), ("-", before, now))
                for word in here[side]
                if word not in there[side]
            ]
            found.append((int(row["step"]), ", ".join(said)))
            before = now
        return found

    def checkpoints(self) -> list[int]:
        return checkpoint.steps(self.folder / "checkpoints")

    def verdict(self) -> str:
        """What its evaluation says, if there is one, in words."""
        try:
            found = evaluation_of(self.folder)
            said = [sentence(found), *found["verdict"]["warnings"], found["outdated"]] if found else []
            return " ".join(part for part in said if part)
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def size(self) -> str:
        total = folder_size(self.folder)
        return f"{total / 1e6:.0f} MB" if total >= 1e6 else f"{total / 1e3:.0f} kB"


def view_of(folder: Path, processes: Processes) -> RunView:
    """The run in `folder` as it is now."""
    recipe = recipes.read(str(folder / "recipe.yaml"), stored=True)
    rows = read_rows(folder / "metrics.jsonl")
    state, message = processes.state(folder)
    previews = checkpoint.steps(folder / "samples")
    return RunView(folder.name, folder, state, message, recipe, rows, previews)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a line that is being written, or was cut, is left out."""
    try:
        return read_metrics(path)
    except (InputError, OSError):
        return []

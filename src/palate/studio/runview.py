"""A run as the pages show it, read from its folder each time: state, step, curves, words, pictures, the guard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate import recipe as recipes
from palate.algorithms.direct import DirectSettings
from palate.algorithms.srpo import SRPOSettings
from palate.evaluate import read_index
from palate.recipe import Recipe
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.files import folder_size
from palate.runtime.result import evaluation_of
from palate.runtime.runlog import read_metrics
from palate.studio.process import Processes

STATES = {"waiting": "Starting", "running": "Running", "stopped": "Stopped", "died": "Died", "finished": "Finished"}
LOST = {  # figure of the guard -> what a person lost when it broke its limit
    "concept": "pictures that show what was asked for",
    "background": "the backgrounds that were asked for",
    "fit": "what the prompts ask for",
    "heldout": "the held-out reward",
    "heldout_fall": "the held-out reward",
    "diversity": "variety",
    "variety": "variety",
}
RECENT = 10  # steps whose time tells how long the rest takes


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
    def step(self) -> int:
        return max((int(row.get("step", 0)) for row in self.rows), default=0)

    @property
    def steps(self) -> int:
        return self.recipe.trainer.steps

    def of(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("event") == event]

    @property
    def seconds_left(self) -> float | None:
        times = [float(row["step_seconds"]) for row in self.of("step")[-RECENT:] if "step_seconds" in row]
        return None if not times or self.state != "running" else sum(times) / len(times) * (self.steps - self.step)

    @property
    def time_left(self) -> str:
        seconds = self.seconds_left
        if seconds is None:
            return ""
        return f"{math.ceil(seconds)} seconds left" if seconds < 90 else f"{round(seconds / 60)} minutes left"

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
    def reward_name(self) -> str:
        return {"taste": "Your taste", None: "Weighted reward"}.get(
            self.recipe.reward.name, self.recipe.reward.name or ""
        )

    def words(self) -> Words:
        """Those of the recipe, then those of each steering event; a word that stays keeps its step."""
        now = {side: dict.fromkeys(getattr(self.recipe.algorithm, side, ()), 0) for side in ("positive", "negative")}
        for row in self.of("steer"):
            for side in now:
                if row.get(side) is not None:
                    now[side] = {word: now[side].get(word, int(row["step"])) for word in row[side]}
        return Words(**now)

    def refusal(self) -> str:
        """Why the newest words were refused by the run; "" once others were taken up."""
        last = [row for row in self.rows if row.get("event") in ("steer", "steer_refused")][-1:]
        return str(last[0].get("reason", "")) if last and last[0]["event"] == "steer_refused" else ""

    @property
    def began_with(self) -> str:
        """The run whose result this one goes on from; "" for one that begins with the plain model."""
        start = self.recipe.model.start
        return Path(start).parent.name if start else ""

    def needs(self, folder: Path) -> bool:
        """Whether the result that it began with lies in that run's folder."""
        start = self.recipe.model.start
        return start is not None and Path(start).resolve().is_relative_to(folder.resolve())

    def guard_sentence(self) -> str:
        rows = self.of("guard")
        if not rows:
            return "The guard has not looked yet." if self.recipe.trainer.guard.every else "This run has no guard."
        last = rows[-1]
        kept = f"{100 * last['concept']:.0f} of 100 pictures show what was asked for" if "concept" in last else ""
        if last["verdict"] in ("ok", "base"):
            when = "before training" if last["step"] == 0 else f"at step {last['step']}"
            return f"Guard {when}: all is well; {kept}." if kept else f"Guard {when}: all is well."
        back = f" The run ended there; its result is step {last['best_step']}." if last.get("action") == "stop" else ""
        if back and last["best_step"] == 0:
            back = " The run ended there, and changed nothing." + (
                " More rounds of this taste would cost more than they give." if self.began_with else ""
            )
        broken = [part.partition(" ")[0] for part in last["verdict"].split("; ")]
        lost = list(dict.fromkeys(LOST[key] for key in broken if key in LOST))
        what = f"too much was lost of {' and of '.join(lost)}" if lost else "the pictures changed more than they may"
        since = " over all rounds" if self.began_with and self.recipe.trainer.guard.base == "reference" else ""
        return f"The guard at step {last['step']}: {what}{since} ({last['verdict']}).{back}"

    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.pictures(self.previews[0])] if self.previews else []

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
        found, before = [], {side: tuple(getattr(self.recipe.algorithm, side, ())) for side in ("positive", "negative")}
        for row in self.of("steer"):
            now = {side: before[side] if row.get(side) is None else tuple(row[side]) for side in before}
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

    def curves(self, liking: Sequence[tuple[int, float]] = ()) -> list[dict[str, Any]]:
        """Charts: the objective, and what is not optimised as a ratio to the base; [{"title", "lines", ...}].

        `liking`: (step, taste) on the fixed pictures, which then takes the place of the training batches' reward.
        `marks`: from there other words are optimised, so that values before and after do not compare.
        """
        steps, guard = self.of("step"), self.of("guard")
        reward = [(r["step"], r[key]) for r in steps for key in ("reward", "reward_denoise") if _number(r.get(key))]
        lines = []
        base = guard[0] if guard else {}
        for key, label in (("heldout", "held-out reward"), ("concept", "right thing shown"), ("diversity", "variety")):
            if _number(base.get(key)) and base[key] > 0:
                lines.append(
                    {"label": label, "points": [(r["step"], r[key] / base[key]) for r in guard if _number(r.get(key))]}
                )
        return [
            {
                "title": "Your taste of these pictures, in standard deviations (optimised)"
                if liking
                else f"{'Your words' if self.page == '/steer' else self.reward_name} (optimised)",
                "lines": [{"label": "", "points": list(liking) or smooth(reward)}],
                "ratio": False,
                "marks": self.marks(),
            },
            {"title": "Not optimised, 1 = before", "lines": lines, "ratio": True, "marks": self.marks()},
        ]

    def checkpoints(self) -> list[int]:
        return checkpoint.steps(self.folder / "checkpoints")

    def verdict(self) -> str:
        try:
            found = evaluation_of(self.folder)
            return f"{found['verdict']['text']} {found['outdated']}".strip() if found else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def size(self) -> str:
        total = folder_size(self.folder)
        return f"{total / 2**20:.0f} MB" if total >= 2**20 else f"{total / 2**10:.0f} kB"


def view_of(folder: Path, processes: Processes) -> RunView:
    """The run in `folder` as it is now."""
    recipe = recipes.read(str(folder / "recipe.yaml"))
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


def smooth(points: Sequence[tuple[int, float]], window: int = 5) -> list[tuple[int, float]]:
    """The running mean of the last `window` values: single batches are noisy."""
    values = [value for _, value in points]
    return [(step, sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1]))
            for i, (step, _) in enumerate(points)]  # fmt: skip


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

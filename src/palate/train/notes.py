"""What a run tells its user besides numbers: warnings of the algorithm, and how to go on after the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from palate.core import Algorithm, Warns
from palate.runtime.files import in_shell
from palate.train.python_recipe import way_on
from palate.train.state import Counters, Weights


class Warnings:
    """What the algorithm wants the user to know; each sentence is said once."""

    def __init__(self, algorithm: Algorithm, weights: Weights, note: Callable[[str], None]):
        self.algorithm, self.weights, self.note = algorithm, weights, note
        self.said: set[str] = set()

    def say(self, step: int) -> None:
        """Note those that are new at this step."""
        if not isinstance(self.algorithm, Warns):
            return
        for text in self.algorithm.warnings(self.weights.rates):
            if text not in self.said:
                self.said.add(text)
                self.note(f"step {step}: {text}")


def how_to_continue(counters: Counters, folder: Path) -> str:
    """What may be done with a run that has ended."""
    if counters.finished != "finished":
        return f"its result can begin a new run with other settings: {in_shell(f'model.start={folder}')}"
    if not (folder / "recipe.yaml").is_file():
        return "with more steps it goes on"  # a round of a search, whose recipe is above it
    return f"train on with {way_on(folder, counters.step * 2)}"

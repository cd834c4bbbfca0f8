"""A run that Python began: its recipe names objects that it cannot rebuild, so its evaluation is given them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from palate.core import Algorithm, Model, Reward
from palate.data import evenly_spaced, listed
from palate.evaluate.panel import EvaluationPanel, embedded_panel
from palate.models import families
from palate.recipe import EvaluateSettings, SampleSettings
from palate.recipe.names import PYTHON
from palate.recipe.objective import Objective, Term
from palate.runs.folder import RunFolder
from palate.runs.stored import steered, tree_words
from palate.runtime.errors import InputError
from palate.runtime.result import result_of


def begun_in_python(run: RunFolder) -> bool:
    """Whether the run's model is an object, which its recipe cannot rebuild."""
    return str((run.tree.get("model") or {}).get("name", "")).startswith(PYTHON)


class _Given(Term):
    """A reward that is an object, which the panel holds."""

    def digest(self) -> None:
        """Nothing tells it from another of its name."""


class PythonRun(RunFolder):
    """The folder of such a run, with the objects of which an evaluation is to know. reward: what it optimised."""

    def __init__(self, path: str | Path, model: Model, *, reward: Reward | None, algorithm: Algorithm | None):
        super().__init__(path)
        self.trained, self.reward, self.given = model, reward, algorithm

    @property
    def sample(self) -> SampleSettings:
        known = {field.name for field in dataclasses.fields(SampleSettings)}
        return SampleSettings(**{key: value for key, value in (self.tree.get("sample") or {}).items() if key in known})

    @property
    def algorithm(self) -> Any:
        return self.given

    @property
    def may_fall(self) -> float:
        return 0.0

    @property
    def reference(self) -> str | None:
        return None

    def words(self, step: int | None = None) -> tuple[list[str], list[str]]:
        if step is None and (result := result_of(self.path)):
            step = result.step
        return steered(tree_words(self.tree), self.metrics, step)

    def objective(self) -> Objective:
        terms = () if self.reward is None else (_Given(self.label),)
        return Objective(terms).with_words(*self.words())

    @property
    def label(self) -> str:
        """What the reward is called: its class or function."""
        return str((self.tree.get("reward") or {}).get("name", PYTHON)).rpartition(".")[2] or "reward"

    def panel(self, panel: EvaluationPanel | None) -> EvaluationPanel:
        """Who judges: the panel, or the embedded model's own, and the run's reward beside them. InputError: nobody."""
        if panel is None and not isinstance(self.trained, families.find("emoji").load_class()):
            raise InputError(
                "panel: a model other than the embedded one has no judges of its own; give one, for example "
                "palate.evaluate.published_panel('clip', palate.load_reward('clip', 'weights/clip'))"
            )
        panel = panel or embedded_panel()
        return panel if self.reward is None else panel._replace(rewards={**panel.rewards, self.label: self.reward})

    def prompts(self) -> list[str]:
        """Those of the run, as many as an evaluation draws where nothing is said."""
        return evenly_spaced(listed(self.tree["prompts"]["list"]), EvaluateSettings().prompts)

    def seeds(self) -> list[int]:
        """As many as an evaluation draws where nothing is said."""
        return list(range(EvaluateSettings().seeds))

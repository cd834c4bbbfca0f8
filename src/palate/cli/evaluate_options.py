"""The options of `palate evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, and how it is shown, as the options say; None = as each recipe says."""

    prompts_file: str | None = None
    count: int | None = None
    seeds: int | None = None
    stored: bool = False
    overrides: Sequence[str] = ()
    tasks: bool = False
    questions: str | None = None
    judge: str | None = None
    protocol: str | None = None
    out: Path | None = None
    strengths: Sequence[float] | None = None
    as_json: bool = False
    quiet: bool = False

    @property
    def seed_range(self) -> range | None:
        """The seeds 0, 1, ...; None = as each recipe says."""
        return None if self.seeds is None else range(self.seeds)

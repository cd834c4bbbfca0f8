"""Which weights are a run's result now, and whether what was measured is of them: read from its folder alone.

They are those of the newest good checkpoint, its average where one is kept; of `palate optimize`, of the newest round.
evaluation.json names the checkpoint that it measured, and keeps the digest of its manifest: a run that went back comes
to the same step with other weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.files import file_digest, in_shell, parse_json
from palate.runtime.runlock import RunStatus, status

ADAPTER = "adapter"  # in a run's folder: a copy of the result for other programs, `runs.result`
EVALUATION = "evaluation.json"
NEEDED = {"rows": list, "prompts": int, "seeds": list}  # by a page of an evaluation
KNOWN = {"verdict": dict, "words": dict, "drift": dict, "optimised": list}  # shown where they are there
CHANGES = ("base_low", "base_high", "change", "change_low", "change_high")  # beside a metric's base


def forget_adapter(run: Path) -> None:
    """Take RUN/adapter away: it is about to be no copy of the result any more."""
    shutil.rmtree(run / ADAPTER, ignore_errors=True)


class Result(NamedTuple):
    """The newest checkpoint of a run, by name: its bytes are verified when they are loaded."""

    run: Path
    folder: Path  # that holds the checkpoints: the run, or a round of it
    step: int
    status: RunStatus

    @property
    def checkpoint(self) -> str:
        """Its path inside the run's folder, as evaluation.json keeps it."""
        return (self.folder / "checkpoints" / checkpoint.name(self.step)).relative_to(self.run).as_posix()

    def measured(self) -> dict[str, Any]:
        """What evaluation.json keeps of it: "checkpoint", and "manifest" where it has one."""
        manifest = self.run / self.checkpoint / checkpoint.MANIFEST
        return {"checkpoint": self.checkpoint} | ({"manifest": file_digest(manifest)} if manifest.is_file() else {})


def result_of(run: Path) -> Result | None:
    """The result of the run in that folder as it is now; None where nothing was saved so far."""
    rounds = sorted(run.glob("round-*"))
    saved = [folder for folder in (rounds or [run]) if checkpoint.steps(folder / "checkpoints")]
    if not saved:
        return None
    step = checkpoint.steps(saved[-1] / "checkpoints")[-1]
    return Result(run, saved[-1], step, status(run))


def step_of(name: str) -> int:
    """The step of a checkpoint, by its path inside the run's folder."""
    return int(name.rpartition("-")[2])


def evaluation_of(run: Path) -> dict[str, Any] | None:
    """What evaluation.json holds, and "outdated": a sentence where the result has changed since, else "". None without
    one. InputError: it is not JSON."""
    path = run / EVALUATION
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); write it again with palate evaluate") from error
    metrics = found.get("metrics") if isinstance(found, dict) else None
    known = isinstance(metrics, dict) and all(isinstance(metric, dict) for metric in metrics.values())
    if not known or any(not isinstance(found.get(key) or kind(), kind) for key, kind in KNOWN.items()):
        raise InputError(f"{path} is no evaluation; write it again with palate evaluate {in_shell(run)}")
    return {**found, "outdated": _outdated(run, found.get("checkpoint"), found.get("manifest"))}


def _outdated(run: Path, measured: str | None, manifest: str | None) -> str:
    for side in (run / "evaluation" / "base", run / "evaluation" / "result"):
        if side.is_dir() and not (side / "index.jsonl").is_file():
            return f"A later evaluation broke off: palate evaluate {in_shell(run)} makes its pictures whole."
    now = result_of(run)
    if measured is None or now is None:
        return ""
    again = f"palate evaluate {in_shell(run)} measures it again"
    if measured == now.checkpoint:
        if manifest is None or now.measured().get("manifest", manifest) == manifest:
            return ""
        return f"Measured at step {step_of(measured)}, to which the run came anew since, with other weights: {again}."
    return f"Measured at step {step_of(measured)}, and the run is at step {now.step} now: {again}."


def whole_evaluation_of(run: Path) -> dict[str, Any] | None:
    """`evaluation_of` with all that its page shows. InputError names what is missing: somebody changed the file."""
    found = evaluation_of(run)
    if found is not None and (missing := _missing(found)):
        raise InputError(
            f"{run / EVALUATION}: {missing} is missing or of another kind; write it again with palate evaluate "
            f"{in_shell(run)}"
        )
    return found


def _missing(found: dict[str, Any]) -> str:
    """What a page needs and does not find, by its path in the file; "" where all is there."""
    for key, kind in (NEEDED | {key: kind for key, kind in KNOWN.items() if found.get(key) is not None}).items():
        if not isinstance(found.get(key), kind):
            return key
    for i, row in enumerate(found["rows"]):
        if not isinstance(row, dict) or not isinstance(row.get("base", {}), dict):
            return f"rows[{i}]"
        if lacking := [key for key in ("prompt", "seed") if key not in row]:
            return f"rows[{i}].{lacking[0]}"
    for name, metric in found["metrics"].items():
        needed = ("value", "low", "high", *(CHANGES if metric.get("base") is not None else ()))
        if lacking := [key for key in needed if key not in metric]:
            return f"metrics.{name}.{lacking[0]}"
    return ""

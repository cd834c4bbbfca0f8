"""What `palate checkpoints` does: list, verify and delete a run's checkpoints."""

from __future__ import annotations

from pathlib import Path

from palate.runtime import checkpoint
from palate.runtime.errors import CheckpointError
from palate.runtime.progress import printable
from palate.runtime.runlock import require_free
from palate.runtime.runlog import METRICS, read_metrics


def print_checkpoints(run: Path) -> tuple[int, int]:
    """Print a line of each checkpoint; (how many there are, how many are damaged)."""
    folder = run / "checkpoints"
    found = checkpoint.steps(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint")
    damaged = 0
    for step in found:
        path = folder / checkpoint.name(step)
        problem = checkpoint.verify(path)
        damaged += problem is not None
        size = sum(part.stat().st_size for part in path.iterdir()) / 2**20
        print(f"{path.name}  {size:8.1f} MiB  {printable(problem) if problem else 'ok'}")
    return len(found), damaged


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete checkpoints: the newest `keep` good ones stay, the guard's best, and all newer than these."""
    folder = run / "checkpoints"
    require_free(run, "its checkpoints stay as they are")
    steps = checkpoint.steps(folder)
    good = [step for step in steps if checkpoint.verify(folder / checkpoint.name(step)) is None]
    if not good:
        raise CheckpointError(f"every checkpoint of {run} is damaged; nothing is deleted")
    guard = [row["best_step"] for row in read_metrics(run / METRICS) if row.get("best_step") is not None]
    first = good[-keep:][0]
    checkpoint.prune(folder, keep=sum(step >= first for step in steps), also={int(guard[-1])} if guard else set())
    left = checkpoint.steps(folder)
    print(f"deleted {len(steps) - len(left)} of {len(steps)}; left: {', '.join(map(str, left))}")

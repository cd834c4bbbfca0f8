"""What `palate steer` does: leave new words for a run, and wait until it has taken them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palate.runs.stored import ended_by_guard
from palate.runtime.errors import InputError
from palate.runtime.files import in_shell
from palate.runtime.progress import say
from palate.runtime.runlock import status
from palate.runtime.runlog import METRICS, read_metrics
from palate.train.python_recipe import way_on
from palate.train.steering import await_words, steer


def steer_and_wait(run: Path, positive: Sequence[str] | None, negative: Sequence[str] | None) -> None:
    """Say at which step the run took the words, or what they wait for. InputError where it refused them."""
    seen = read_metrics(run / METRICS)
    steer(run, *(None if words is None else list(words) for words in (positive, negative)))
    state = status(run).state
    if state != "running":
        if state == "finished" and ended_by_guard(seen):
            begin = in_shell(f"model.start={run}")
            say(f"{run}: its guard has ended this run, so nothing takes the words; begin another with {begin}")
            return
        done = max((row["step"] for row in seen), default=0)
        way = way_on(run, 2 * done if state == "finished" else None)
        say(
            f"{run}: this run is not running ({state}), so the words wait; {way} takes them at its first step, or "
            "after the words that it has to replay"
        )
        return
    longest = max([row["step_seconds"] for row in seen[-20:] if "step_seconds" in row], default=10.0)
    found = await_words(run, len(seen), min(2 * longest + 5, 120))
    if found is None:
        say(f"{run}: the running step is still at work; a later one takes the words, and metrics.jsonl says so")
    elif found["event"] == "steer":
        say(f"{run}: step {found['step']} took the words")
    else:
        raise InputError(f"step {found['step']} refused the words and keeps the old ones: {found['reason']}")

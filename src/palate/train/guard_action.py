"""What the guard's decision does to a run."""

from __future__ import annotations

from collections.abc import Callable

from palate.train.guard import Decision, Guard
from palate.train.saving import Saver
from palate.train.state import Counters


def carry_out(
    decision: Decision, step: int, *, guard: Guard, saver: Saver, counters: Counters, note: Callable[[str], None]
) -> None:
    """Warn, return to the best weights with half the learning rate, or stop with the best weights as the result."""
    if not decision.action:
        return
    why, best = f"step {step}: guard: {'; '.join(decision.broken)}", guard.state.best_step
    if decision.action == "warn":
        note(why)
        return
    assert best is not None, "a guard that compares has seen the base"
    saver.load_weights(best)
    if decision.action == "rollback":
        counters.lr_scale /= 2
        note(f"{why}; back to the weights of step {best}, learning rate halved")
    else:
        counters.finished = f"guard: {'; '.join(decision.broken)}"
        note(f"{why}; stopped, the result is the weights of step {best}")

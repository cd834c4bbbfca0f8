"""Training: `palate.train(...)` runs one job; the package's parts are its loop, updates, state, guard and steering.

`palate.train` is this package and, for users, the function: `palate.train(...)` is `palate.train.train(...)`.
"""

from __future__ import annotations

import inspect
import sys
import types

from palate.core import GuardMeasure, prompt_order
from palate.runtime.deprecated import old_names
from palate.runtime.environment import environment, versions
from palate.runtime.errors import CheckpointError, InputError, NonFiniteError, OutOfMemoryError
from palate.runtime.runlog import read_metrics, rewind
from palate.train.checks import check_reward, memory_savings
from palate.train.failure import reproduce_step
from palate.train.guard import broken_limits
from palate.train.job import Job, Outcome
from palate.train.loop import Run
from palate.train.saving import restore_result
from palate.train.start import run_job, train
from palate.train.state import learning_rate
from palate.train.steering import steer
from palate.train.trace import Finding, replay

__all__ = [
    "CheckpointError", "Finding", "GuardMeasure", "InputError", "Job", "NonFiniteError", "OutOfMemoryError", "Outcome",
    "Run", "broken_limits", "check_reward", "environment", "learning_rate", "memory_savings", "prompt_order",
    "read_metrics", "replay", "reproduce_step", "restore_result", "rewind", "run_job", "steer", "train", "versions",
]  # fmt: skip

__getattr__ = old_names(
    __name__,
    {
        "Check": GuardMeasure,
        "NonFinite": NonFiniteError,
        "OutOfMemory": OutOfMemoryError,
        "memory_levers": memory_savings,
        "repeat": reproduce_step,
    },
)


class _Callable(types.ModuleType):  # not `callable_as`: warnings of `train` name the line that called it
    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _Callable
__doc__ = (
    f"{__doc__}\npalate.train{inspect.signature(train)}\n\n{inspect.getdoc(train)}\n"  # what help(palate.train) shows
)

"""The exceptions that Palate raises on purpose. Each class knows the exit code of the command line.

    PalateError 1 <- InputError 2, NonFiniteError 3, CheckpointError 4, RewardServiceError 5, OutOfMemoryError 6,
                     RankLostError 7, PeerAbortedError (the exit code that the other rank told)

Any other exception is an error of our own: it keeps its traceback, exit code 1. This file imports nothing, so that the
command line can tell exceptions apart without loading torch.
"""

from __future__ import annotations


class PalateError(Exception):
    """A failure that the message explains in full; nobody needs the traceback."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """What an error says first, at most 200 characters; the name of its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class InputError(PalateError, ValueError):
    """What the user gave cannot work. The message names the key or the file and the remedy."""

    exit_code = 2


class NonFiniteError(PalateError, RuntimeError):
    """Losses or gradients were not finite several times in a row; the weights of the last good step are saved."""

    exit_code = 3


class CheckpointError(PalateError, RuntimeError):
    """A checkpoint cannot be read, or it belongs to another model."""

    exit_code = 4


class RewardServiceError(PalateError, RuntimeError):
    """A reward behind a URL, or a black-box objective, does not answer as it should."""

    exit_code = 5


class OutOfMemoryError(PalateError, RuntimeError):
    """A step did not fit. The weights are those of the step before; the message lists what would make it fit."""

    exit_code = 6


class RankLostError(PalateError, RuntimeError):
    """Another rank ended, or did not answer in time."""

    exit_code = 7


class PeerAbortedError(PalateError, RuntimeError):
    """Another rank stopped with a message that it has already printed; this one ends with the same exit code."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code

"""Moved to `palate.algorithms.replay_buffer`; this name ends with the next release."""

import sys
import warnings

from palate.algorithms import replay_buffer

warnings.warn("palate.replay is now palate.algorithms.replay_buffer", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = replay_buffer

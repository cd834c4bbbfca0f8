"""Moved to `palate.runtime.checkpoint`; this name ends with the next release."""

import sys
import warnings

from palate.runtime import checkpoint

warnings.warn("palate.checkpoint is now palate.runtime.checkpoint", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = checkpoint

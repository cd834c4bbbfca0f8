"""Moved to `palate.train.trace`; this name ends with the next release."""

import warnings

from palate.train.trace import Finding, replay

__all__ = ["Finding", "replay"]
warnings.warn("palate.failure is now palate.train.trace", DeprecationWarning, stacklevel=2)

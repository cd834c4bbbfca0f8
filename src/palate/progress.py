"""Moved to `palate.runtime.progress`; this name ends with the next release."""

import sys
import warnings

from palate.runtime import progress

warnings.warn("palate.progress is now palate.runtime.progress", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = progress

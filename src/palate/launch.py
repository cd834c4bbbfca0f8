"""Moved to `palate.runtime.launch`; this name ends with the next release."""

import sys
import warnings

from palate.runtime import launch

warnings.warn("palate.launch is now palate.runtime.launch", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = launch

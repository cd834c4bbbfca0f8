"""Moved to `palate.runtime.distributed`; this name ends with the next release."""

import sys
import warnings

from palate.runtime import distributed

warnings.warn("palate.distributed is now palate.runtime.distributed", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = distributed

"""Moved to `palate.report.study`; this name ends with the next release."""

import sys
import warnings

from palate.report import study

warnings.warn("palate.blind is now palate.report.study", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = study

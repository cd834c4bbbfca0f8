"""Moved to `palate.cli.doctor`; this name ends with the next release."""

import sys
import warnings

from palate.cli import doctor

warnings.warn("palate.doctor is now palate.cli.doctor", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = doctor

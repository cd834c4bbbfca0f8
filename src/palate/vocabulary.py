"""Moved to `palate.models.vocabulary`; this name ends with the next release."""

import sys
import warnings

from palate.models import vocabulary

warnings.warn("palate.vocabulary is now palate.models.vocabulary", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = vocabulary

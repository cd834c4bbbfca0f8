"""Moved to `palate.rewards.vlm`; this name ends with the next release."""

from palate.rewards.vlm import VLMReward, load_vlm
from palate.runtime.deprecated import old_names

__getattr__ = old_names(__name__, {"JudgeReward": VLMReward, "load_judge": load_vlm})

"""The protocols that models, rewards and algorithms meet at, and the one source of randomness.

A model hides its parametrisation behind `predict`, a reward is a function, an algorithm is a generator of losses.

`Model`, `Reward` and `Algorithm` are what every one of them must do. What some can do besides has a protocol of its
own, with its name: it is enough to have the members, nothing needs to be inherited. Nothing outside this package asks
an object for a member that no protocol lists.

    a model may be      Sampleable, EncodesPictures, HasPosterior, PublishedGrid, Fingerprinted, TextCached,
                        SavesAdapter, TakesConsistency, TrainsOtherwise, DrawsOtherSizes, HasStrength,
                        HasNetworks, PutsWords                                          models.py
    a reward may be     TwoTower, EmbedsImages, HasFeatures                                rewards.py
    an algorithm may be Stateful, Steerable, ComparesWords, DrawsOwnSamples, DrawsReference, Warns,
                        ChecksBatch, TakesAnySize, ReadsImages, AsksOtherPrompts, LogsLater  algorithms.py
"""

from __future__ import annotations

from palate.core.algorithms import (
    Algorithm,
    AsksOtherPrompts,
    Batch,
    ChecksBatch,
    ComparesWords,
    DrawsOwnSamples,
    DrawsReference,
    LogsLater,
    Loss,
    ReadsImages,
    Sampler,
    Stateful,
    Steerable,
    TakesAnySize,
    Warns,
)
from palate.core.models import (
    Cond,
    DrawsOtherSizes,
    EncodesPictures,
    Fingerprinted,
    GuardMeasure,
    HasNetworks,
    HasPosterior,
    HasStrength,
    Model,
    Networks,
    PublishedGrid,
    PutsWords,
    Sampleable,
    SavesAdapter,
    TakesConsistency,
    TextCached,
    TrainsOtherwise,
)
from palate.core.random import Random, prompt_order, used_prompts
from palate.core.rewards import EmbedsImages, HasFeatures, Reward, TwoTower
from palate.core.settings import require

__all__ = [
    "Algorithm", "AsksOtherPrompts", "Batch", "ChecksBatch", "ComparesWords", "Cond", "DrawsOtherSizes",
    "DrawsOwnSamples", "DrawsReference", "EmbedsImages", "EncodesPictures", "Fingerprinted", "GuardMeasure",
    "HasFeatures", "HasNetworks", "HasPosterior", "HasStrength", "LogsLater", "Loss", "Model",
    "Networks", "PublishedGrid", "PutsWords", "Random", "ReadsImages", "Reward", "Sampleable", "Sampler",
    "SavesAdapter", "Stateful", "Steerable", "TakesAnySize", "TakesConsistency", "TextCached", "TrainsOtherwise",
    "TwoTower", "Warns", "prompt_order", "require", "used_prompts",
]  # fmt: skip

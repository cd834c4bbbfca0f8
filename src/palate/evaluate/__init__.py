"""Fixed prompts x seeds, judged: rewards, what the prompt asks for, diversity in a prompt, drift from the base.

Everything is measured per image or per prompt first, so that two models that drew from the same noise are compared in
pairs and every mean has an interval. The optimised reward stands beside those that were not optimised: when the
first rises and the others fall, the run is over-optimised. The run folders themselves are `palate.runs`.

`palate.evaluate(run)` calls `palate.api.evaluate`, which measures a run's result against its base;
`help(palate.api.evaluate)` has its arguments.
"""

from __future__ import annotations

from palate.core import Sampler
from palate.evaluate.measurement import (
    Evaluation,
    evaluate_images,
    evaluate_model,
    evaluate_samples,
    mean_and_interval,
    measure_for_guard,
    round_floats,
    to_json,
)
from palate.evaluate.metrics import (
    CLOSED_FORM,
    SIDES,
    bootstrap_interval,
    cross_prompt_duplicates,
    diversity,
    drift,
    frechet_distance,
    label_correct,
    position_correct,
    vendi,
)
from palate.evaluate.panel import (
    Caption,
    EvaluationPanel,
    ImageClassifier,
    concept_accuracy,
    embedded_panel,
    published_panel,
)
from palate.evaluate.samples import (
    check_same,
    generate,
    pairs,
    read_index,
    read_samples,
    write_samples,
)
from palate.evaluate.verdicts import CONCEPT_LIMIT, DIVERSITY_LIMIT, verdict
from palate.runtime.callable_module import callable_as
from palate.runtime.deprecated import old_names
from palate.runtime.images import quantise

__all__ = [
    "CLOSED_FORM", "CONCEPT_LIMIT", "DIVERSITY_LIMIT", "SIDES", "Caption", "Evaluation", "EvaluationPanel",
    "ImageClassifier", "Sampler", "bootstrap_interval", "check_same", "concept_accuracy", "cross_prompt_duplicates",
    "diversity", "drift", "embedded_panel", "evaluate_images", "evaluate_model", "evaluate_samples",
    "frechet_distance", "generate", "label_correct", "mean_and_interval", "measure_for_guard", "pairs",
    "position_correct", "published_panel", "quantise", "read_index", "read_samples", "round_floats", "to_json",
    "vendi", "verdict", "write_samples",
]  # fmt: skip

__getattr__ = old_names(
    __name__,
    {
        "Judge": ImageClassifier,
        "Referee": EvaluationPanel,
        "copies": cross_prompt_duplicates,
        "embedded_referee": embedded_panel,
        "matches": label_correct,
        "measured": mean_and_interval,
        "placed": position_correct,
        "plain": round_floats,
        "published_referee": published_panel,
        "quick_check": measure_for_guard,
    },
)

callable_as(__name__, "palate.api", "evaluate")

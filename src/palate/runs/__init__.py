"""Run folders: what lies on disk, judged by `palate.evaluate` and written beside it.

A sample folder holds 0000.png ... and index.jsonl, one row per image. `palate evaluate` leaves two of them in a run,
evaluation/base and evaluation/result, with evaluation.json: the same prompts and noise before and after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from palate.evaluate import check_same, evaluate_samples, read_index, read_samples, write_samples
from palate.runs.stored import read_recipe, run_names, trained_to, tree_words
from palate.runtime.code import imported

if TYPE_CHECKING:
    from palate.runs.checklist import evaluate_runs_by_questions
    from palate.runs.comparison import between, common_rows, common_to_all, on_common_rows, same_meaning
    from palate.runs.evaluation import evaluate_run, evaluate_runs, evaluation_key
    from palate.runs.folder import RunFolder, trained_model
    from palate.runs.protocol import evaluate_protocol
    from palate.runs.result import adapter_of, load_result, write_adapter

# These need the libraries of networks; what lies in a run is listed and shown without them.
_LATER = {
    "RunFolder": "palate.runs.folder",
    "adapter_of": "palate.runs.result",
    "between": "palate.runs.comparison",
    "common_rows": "palate.runs.comparison",
    "common_to_all": "palate.runs.comparison",
    "evaluate_protocol": "palate.runs.protocol",
    "evaluate_run": "palate.runs.evaluation",
    "evaluate_runs": "palate.runs.evaluation",
    "evaluate_runs_by_questions": "palate.runs.checklist",
    "evaluation_key": "palate.runs.evaluation",
    "load_result": "palate.runs.result",
    "on_common_rows": "palate.runs.comparison",
    "same_meaning": "palate.runs.comparison",
    "trained_model": "palate.runs.folder",
    "write_adapter": "palate.runs.result",
}
__all__ = [
    "RunFolder", "adapter_of", "between", "check_same", "common_rows", "common_to_all",
    "evaluate_protocol", "evaluate_run", "evaluate_runs",
    "evaluate_runs_by_questions", "evaluate_samples", "evaluation_key", "load_result",
    "on_common_rows", "read_index", "read_recipe", "read_samples", "run_names", "same_meaning", "trained_model",
    "trained_to", "tree_words", "write_adapter", "write_samples",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return imported(_LATER[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Run folders: what lies on disk, judged by `palate.evaluate` and written beside it.

A sample folder holds 0000.png ... and index.jsonl, one row per image. `palate evaluate` leaves two of them in a run,
evaluation/base and evaluation/result, with evaluation.json: the same prompts and noise before and after.
"""

from __future__ import annotations

from palate.evaluate import check_same, evaluate_samples, read_index, read_samples, write_samples
from palate.runs.checklist import evaluate_runs_by_questions
from palate.runs.comparison import between, common_rows, common_to_all, on_common_rows, same_meaning
from palate.runs.evaluation import evaluate_run, evaluate_runs, evaluation_key
from palate.runs.folder import (
    RunFolder,
    read_recipe,
    run_names,
    trained_model,
    trained_to,
    tree_words,
)
from palate.runs.protocol import evaluate_protocol
from palate.runs.result import adapter_of, load_result, write_adapter

__all__ = [
    "RunFolder", "adapter_of", "between", "check_same", "common_rows", "common_to_all",
    "evaluate_protocol", "evaluate_run", "evaluate_runs",
    "evaluate_runs_by_questions", "evaluate_samples", "evaluation_key", "load_result",
    "on_common_rows", "read_index", "read_recipe", "read_samples", "run_names", "same_meaning", "trained_model",
    "trained_to", "tree_words", "write_adapter", "write_samples",
]  # fmt: skip

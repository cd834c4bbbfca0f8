"""The short form of benchmarks/same_numbers.py: equal runs are equal bit for bit, and a known run keeps its numbers.

A redesign changes no number. When one is meant to change, say so in CHANGELOG.md and write the new values here.
"""

from __future__ import annotations

import sys

import pytest
from support import ROOT
from support.loop import rows, run

sys.path.insert(0, str(ROOT / "benchmarks"))

import same_numbers

# steps 1, 2, 4 and 8 of `support.loop.run`, on the tiny model; bits depend on the machine, five digits do not
KNOWN = {
    "loss": [-0.004455, -0.003643, 0.011310, -0.006945],
    "reward_denoise": [0.009376, -0.137756, -0.114699, -0.040043],
    "reward_inversion": [-0.000467, 0.145041, 0.092078, 0.053932],
    "grad_norm": [0.046502, 0.032921, 0.054833, 0.074637],
}


@pytest.mark.slow
def test_two_processes_train_the_same_bits(tmp_path):
    overrides = ["trainer.steps=2", "trainer.batch_size=2", "trainer.preview_every=2", "trainer.preview_prompts=1",
                 "trainer.guard.every=0"]  # fmt: skip
    first, second = (same_numbers.run_recipe("srpo-emoji", overrides, tmp_path / name, 1) for name in ("a", "b"))
    assert same_numbers.differences({"srpo-emoji": first}, {"srpo-emoji": second}) == []
    assert {name.split("/")[0] for name in first} >= {"metrics.jsonl", "checkpoints", "samples"}
    other = same_numbers.run_recipe("srpo-emoji", [*overrides, "trainer.seed=1"], tmp_path / "c", 1)
    assert len(same_numbers.differences({"srpo-emoji": first}, {"srpo-emoji": other})) >= 3


def test_a_known_run_keeps_its_numbers(tmp_path):
    run(tmp_path)
    steps = {row["step"]: row for row in rows(tmp_path) if row["event"] == "step"}
    for name, known in KNOWN.items():
        assert [steps[step][name] for step in (1, 2, 4, 8)] == pytest.approx(known, abs=1e-5), name

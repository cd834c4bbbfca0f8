"""benchmarks/gpu_step.py on shrunken networks: every model and every way, so that nothing is left to find on a card."""

from __future__ import annotations

import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_step

from palate.models import families

SMALL = ["--small", "--device=cpu", "--size=64", "--updates=1", "--rollout=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["sana"], ["flux", "--quantize=nf4"], ["flux2", "--offload", "--nccl"], ["sdxl"]],
    ids=lambda words: " ".join(words),
)
def test_an_update_of_every_model_runs(words):
    found = gpu_step.run(gpu_step.read([*words, *SMALL]))
    assert found["seconds"] > 0 and found["first_seconds"] > 0


def test_the_table_has_every_model_whole_in_four_bits_and_compiled_where_it_can_be():
    rows = {(name, *how) for name, *how in gpu_step.ROWS}
    for name in ("sdxl", "flux", "flux2", "sana"):
        assert {(name,), (name, "--quantize", "nf4")} <= rows
        network = families.find(name).load_class().facts.network
        assert ((name, "--compile") in rows) == bool(network._repeated_blocks)
    assert ("flux2", "--nccl") in rows and all(gpu_step.read([*row]).model == row[0] for row in rows)
    assert gpu_step.read(["--all"]).minutes == 10
    for name in gpu_step.RECIPES:
        made = gpu_step.settings(gpu_step.read([name]))
        assert made.algorithm.name == "srpo" and made.trainer.batch_size == 1 and made.model.image_size == 1024

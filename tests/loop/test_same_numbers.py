"""The short form of benchmarks/same_numbers.py: equal runs are equal bit for bit, and a known run keeps its numbers.

A redesign changes no number. When one is meant to change, say so in CHANGELOG.md and write the new values here.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
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


OVERRIDES = ["trainer.steps=2", "trainer.batch_size=2", "trainer.preview_every=2", "trainer.preview_prompts=1",
             "trainer.guard.every=0", "algorithm.rollout_steps=2"]  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_the_same_bits(tmp_path):
    first, second = (same_numbers.run_recipe("srpo-emoji", OVERRIDES, tmp_path / name, 1) for name in ("a", "b"))
    assert same_numbers.differences({"srpo-emoji": first}, {"srpo-emoji": second}) == []
    assert {name.split("/")[0] for name in first} >= {"metrics.jsonl", "checkpoints", "samples"}


def test_the_smallest_change_of_anything_is_a_difference(tmp_path):
    """A digit of the log, a bit of a tensor, a level of a pixel: one line each, and a time is none."""
    run(tmp_path)
    before = same_numbers.digests(tmp_path)

    def changed() -> list[str]:
        return same_numbers.differences({"tiny": before}, {"tiny": same_numbers.digests(tmp_path)})

    log = tmp_path / "metrics.jsonl"
    text = log.read_text("utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    found[-1]["step_seconds"] = 99.0
    log.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    assert changed() == []
    found[0]["step"] = 7
    log.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    assert changed() == ["tiny: metrics.jsonl"]
    log.write_text(text, "utf-8")
    file = sorted(tmp_path.rglob("*.safetensors"))[0]
    held = load_file(file)
    name = sorted(held)[0]
    bits = held[name].contiguous().view(torch.uint8).clone()
    bits.view(-1)[0] ^= 1
    save_file(held | {name: bits.view(held[name].dtype).view(held[name].shape)}, file)
    assert changed() == [f"tiny: {file.relative_to(tmp_path).as_posix()}"]
    picture = tmp_path / "samples" / "extra.png"
    picture.parent.mkdir(exist_ok=True)
    Image.new("RGB", (2, 2)).save(picture)
    before = same_numbers.digests(tmp_path)
    Image.new("RGB", (2, 2), (1, 0, 0)).save(picture)
    assert changed() == ["tiny: samples/extra.png"]


def test_a_known_run_keeps_its_numbers(tmp_path):
    run(tmp_path)
    steps = {row["step"]: row for row in rows(tmp_path) if row["event"] == "step"}
    for name, known in KNOWN.items():
        assert [steps[step][name] for step in (1, 2, 4, 8)] == pytest.approx(known, abs=1e-5), name

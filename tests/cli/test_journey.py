"""A newcomer's way through the command line, on the embedded model."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from palate import cli

pytestmark = pytest.mark.slow

SMALL = [
    "trainer.batch_size=2",
    "trainer.preview_prompts=2",
    "trainer.preview_every=2",
    "trainer.checkpoint_every=2",
    "trainer.guard.every=2",
    "trainer.guard.prompts=2",
    "trainer.guard.action=warn",
    "trainer.ema_decay=0.5",
    "algorithm.rollout_steps=2",
    "algorithm.reference_penalty=0.1",
    "model.lora_rank=2",
    "trainer.threads=1",
]


@pytest.fixture(scope="module")
def palate():
    def call(*arguments: str) -> None:
        before, sys.argv = sys.argv, ["palate", *arguments]
        threads = torch.get_num_threads()
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code in (0, None), f"palate {' '.join(arguments)} ended with {stop.code}"
        finally:
            sys.argv = before
            torch.set_num_threads(threads)

    return call


@pytest.fixture(scope="module")
def runs(tmp_path_factory, palate):
    """`whole` was never stopped; `halves` stopped after two steps and went on. Both get new words at step 3."""
    folder = tmp_path_factory.mktemp("runs")
    whole, halves = folder / "whole", folder / "halves"
    palate("train", "srpo-emoji", f"run.folder={halves}", "trainer.steps=2", *SMALL)
    palate("steer", str(halves), "--positive", "outline", "--negative", "3d, cartoon")
    palate("resume", str(halves), "trainer.steps=4")
    palate("train", "srpo-emoji", f"run.folder={whole}", "trainer.steps=2", *SMALL)
    palate("steer", str(whole), "--positive", "outline", "--negative", "3d, cartoon")
    palate("resume", str(whole), "trainer.steps=6")
    palate("resume", str(halves), "trainer.steps=6")
    return whole, halves


def rows(run) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in found]


def test_a_run_in_more_parts_ends_bit_identical(runs):
    whole, halves = runs
    first, second = (load_file(run / "adapter/pytorch_lora_weights.safetensors") for run in runs)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert any(float(value.abs().sum()) > 0 for key, value in first.items() if "lora_B" in key)
    steps = [[row for row in rows(run) if row["event"] in ("step", "steer")] for run in (whole, halves)]
    assert steps[0] == steps[1]
    assert [row["step"] for row in rows(whole) if row["event"] == "steer"] == [3]


def test_evaluate_report_sample_and_compare(runs, palate, tmp_path, capsys):
    whole, halves = runs
    for run in runs:
        palate("evaluate", str(run), "--count", "3", "--seeds", "2")
    assert "heldout" in capsys.readouterr().out
    first = json.loads((whole / "evaluation.json").read_text())
    # equal weights, equal words
    assert first["metrics"] == json.loads((halves / "evaluation.json").read_text())["metrics"]
    assert first["images"] == 6 and "emoji-relative" in first["optimised"]
    assert "reward/emoji-heldout-relative" in first["metrics"]
    palate("report", str(whole))
    page = (whole / "report.html").read_text()
    assert "data:image/png;base64" in page and page.count("<script") == 1 and "script-src 'sha256-" in page
    palate("compare", str(whole), str(halves))
    palate(
        "sample",
        str(whole),
        "--prompt",
        "a puppy on a blue background",
        "--seeds",
        "0-1",
        "--out",
        str(tmp_path / "out"),
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "0000.png",
        "0001.png",
        "grid.png",
        "index.html",
        "index.jsonl",
    ]

"""A run that is older than a rule about settings without an effect: every command takes it."""

from __future__ import annotations

import json

import torch

from palate.algorithms.draft import DRaFT
from palate.runtime.images import encode_png


def test_a_run_of_draft_with_images_is_judged_reported_and_resumed(palate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        picture = (torch.rand(64, 64, 3) * 255).byte().numpy()
        (tmp_path / f"{name}.png").write_bytes(encode_png(picture))
        (tmp_path / f"{name}.txt").write_text("a dog")
    small = [
        "algorithm.steps=2", "trainer.batch_size=2", "trainer.guard.every=0", "trainer.preview_every=0",
        "model.lora_rank=2", f"prompts={{images: {tmp_path}}}", "run.folder=run",
    ]  # fmt: skip
    code, _, error = palate("train", "draft-emoji", "trainer.steps=1", *small)
    assert code == 2 and "prompts.images: draft draws its own images" in error
    with monkeypatch.context() as before:
        before.setattr("palate.recipe.checks.check_effects", lambda recipe, mistakes: None)
        before.setattr(DRaFT, "reads_images", True)
        assert palate("train", "draft-emoji", "trainer.steps=1", *small)[0] == 0
    code, _, error = palate("resume", "run", "trainer.steps=2")
    assert code == 0, error
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2]
    assert palate("evaluate", "run", "--count", "1", "--seeds", "1")[0] == 0
    assert palate("report", "run")[0] == 0
    assert palate("export", "run", "--out", "out")[0] == 0

"""Which weights are the result: those of the newest checkpoint, in every form in which they are handed over."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from support.loop import rows, run, tensors

import palate
from palate.testing import TinyFlow, tiny_reward


def handed_over(folder):
    saved = load_file(folder / "adapter" / "tiny.safetensors")
    return [saved[key] for key in sorted(saved, key=int)]


def stopping_at(step):
    def reward(images, prompts):
        if images.requires_grad and not stopped and len(calls) >= step:
            stopped.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return tiny_reward(images, prompts)

    calls: list[int] = []
    stopped: list[int] = []
    return reward


def test_a_stopped_run_hands_over_its_newest_weights_and_not_older_ones(tmp_path):
    run(tmp_path, steps=2)
    finished = handed_over(tmp_path)
    _, outcome = run(tmp_path, steps=40, resume=True, reward=stopping_at(6))
    assert outcome.reason == "signal" and outcome.exit_code == 143 and 2 < outcome.step < 40
    now = tensors(tmp_path, outcome.step)
    assert all(torch.equal(a, now[f"weights/policy/{i:04d}"]) for i, a in enumerate(handed_over(tmp_path)))
    assert any(not torch.equal(a, b) for a, b in zip(finished, handed_over(tmp_path), strict=True))
    loaded = palate.load(tmp_path, model=TinyFlow())
    assert loaded.step == outcome.step


def test_a_run_that_dies_while_it_goes_on_leaves_no_older_adapter(tmp_path):
    run(tmp_path, steps=2)

    def dying(images, prompts):
        if images.requires_grad:
            raise KeyboardInterrupt
        return tiny_reward(images, prompts)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, steps=4, resume=True, reward=dying)
    assert not (tmp_path / "adapter").exists()


def test_two_trainings_in_one_folder_at_once_are_refused(tmp_path):
    seen = []

    def nosy(images, prompts):
        if images.requires_grad and not seen:
            with pytest.raises(ValueError, match="already holds a run"):
                run(tmp_path, steps=1)
            seen.append(palate.train.Run)
        return tiny_reward(images, prompts)

    run(tmp_path, steps=1, reward=nosy)
    assert seen and [row["step"] for row in rows(tmp_path) if row["event"] == "step"] == [1]  # its log is its own

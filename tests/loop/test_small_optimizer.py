"""AdamW with moments in a byte each: near AdamW, saved and resumed to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from palate.recipe import TrainerSettings
from palate.runtime.errors import CheckpointError
from palate.train.optimizers import load_moments, make_optimizer, moments_of

SETTINGS = {kind: TrainerSettings(optimizer=kind, weight_decay=0.01) for kind in ("adamw", "adamw8bit")}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (16, 16))]  # one small


def steps(optimizer, weights, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in weights:
            p.grad = 0.1 * torch.randn(p.shape, generator=generator) + 0.05 * p.detach()
        optimizer.step()


def test_it_moves_the_weights_as_adamw_does():
    pytest.importorskip("bitsandbytes")
    moved = {}
    for kind, settings in SETTINGS.items():
        weights = parameters()
        before = [p.detach().clone() for p in weights]
        steps(make_optimizer(weights, 1e-3, settings), weights, 0, 20)
        moved[kind] = [a.detach() - b for a, b in zip(weights, before, strict=True)]
    for ours, theirs in zip(moved["adamw8bit"], moved["adamw"], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.05
    assert torch.allclose(moved["adamw8bit"][1], moved["adamw"][1], atol=1e-6)  # below 4096 numbers: float32


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_goes_on_as_if_it_had_not_stopped(kind):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings, weights = SETTINGS[kind], parameters()
    optimizer = make_optimizer(weights, 1e-3, settings)
    steps(optimizer, weights, 0, 5)
    saved = {f"optimizer/{i:04d}/{k}": v.clone() for i, part in moments_of(optimizer).items() for k, v in part.items()}
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    assert (kind == "adamw8bit") == any(value.dtype == torch.uint8 for value in saved.values())
    again = [nn.Parameter(p.detach().clone()) for p in weights]
    resumed = make_optimizer(again, 1e-3, settings)
    load_moments(resumed, again, saved, "optimizer", kind)
    steps(optimizer, weights, 5, 9)
    steps(resumed, again, 5, 9)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    for other in (saved | {"optimizer/0007/step": torch.tensor(1.0)}, {"optimizer/0000/step": torch.tensor(1.0)}):
        with pytest.raises(CheckpointError):
            load_moments(resumed, again, other, "optimizer", kind)

"""Counted Gaussian models and a linear black box in float64: the ground of the baselines' theorems."""

from __future__ import annotations

import torch

from palate.path import flow_schedule
from palate.testing import VP_SCHEDULE as VP
from palate.testing import CountingGaussian as Counted

__all__ = ["VP", "C", "Counted", "D", "linear", "model_of"]

D = torch.float64
C = torch.randn(1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(7))


def linear(images, prompts):
    return (images * C).sum((1, 2, 3)).detach()  # a black box: no gradient may be needed


def model_of(schedule=flow_schedule, trains=("velocity",)):
    return Counted(torch.full((1, 2, 2), 0.2, dtype=D), 0.6, schedule=schedule, trains=trains)

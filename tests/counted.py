"""Gaussian data whose model counts what is asked of it, in float64: the fixture of the baselines' theorems."""

from __future__ import annotations

import torch

from palate.models.gaussian import GaussianModel
from palate.path import flow_schedule, vp_schedule

D = torch.float64
VP = vp_schedule(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=D) ** 2, 0))
C = torch.randn(1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(7))


def linear(images, prompts):
    return (images * C).sum((1, 2, 3)).detach()  # a black box: no gradient may be needed


class Counted(GaussianModel):
    """Counts network evaluations by row; a guided call is two."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forward = self.backward = self.decoded = 0

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        rows = len(xt) * (1 if guidance == 1 else 2)
        self.forward += rows
        self.backward += rows * torch.is_grad_enabled()
        return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    def decode(self, latents):
        self.decoded += len(latents)
        return super().decode(latents)


def model_of(schedule=flow_schedule, trains=("velocity",)):
    return Counted(torch.full((1, 2, 2), 0.2, dtype=D), 0.6, schedule=schedule, trains=trains)

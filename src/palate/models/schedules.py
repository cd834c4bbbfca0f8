"""Palate's times in the terms of diffusers' schedulers: published time grids, training steps, prediction types.

`sampling.time_grid` is the plain one (equal steps, one shift). Published ones differ: Stable Diffusion's leading
spacing begins at t = .982, SD3 applies its shift twice at the clean end, FLUX's shift depends on the image's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from palate.path import Prediction, from_eps, from_v, from_x0
from palate.runtime.errors import InputError

VPScheduler = Any  # DDIM, Euler or DPM-Solver++: diffusers' classes have no types


def vp_times(scheduler: VPScheduler, steps: int) -> Tensor:
    """Times (steps + 1,), float64, of a scheduler with a training table: t = (k + 1) / N.

    The last one is 0, or 1/N (the first training step) where the scheduler's configuration ends there.
    """
    scheduler.set_timesteps(steps)
    config, n = scheduler.config, scheduler.config.num_train_timesteps
    if isinstance(scheduler, DDIMScheduler):
        last = 0.0 if config.set_alpha_to_one else 1 / n
    else:
        last = 1 / n if config.get("final_sigmas_type") == "sigma_min" else 0.0
    times = (torch.as_tensor(np.asarray(scheduler.timesteps), dtype=torch.float64) + 1) / n
    return torch.cat([times, torch.tensor([last], dtype=torch.float64)])


def training_step(t: Tensor, count: int) -> Tensor:
    """The step k = N t - 1 that a network of N training steps is told at times t (B,), at least 0.

    Rounded where float32 has left a whole number by its last bits.
    """
    step = t.double() * count - 1
    whole = step.round()
    return torch.where((step - whole).abs() < 1e-3, whole, step).clamp_min(0).float()


def vp_prediction(kind: str, xt: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """What a network's output stands for, by its scheduler's prediction_type."""
    convert = {"epsilon": from_eps, "v_prediction": from_v, "sample": from_x0}
    if kind not in convert:
        raise InputError(f"the scheduler's prediction_type is {kind!r}; expected one of {', '.join(convert)}")
    return convert[kind](xt, output, alpha, sigma)


def flow_times(
    scheduler: FlowMatchEulerDiscreteScheduler,
    steps: int,
    *,
    patches: int,
    even: bool,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> Tensor:
    """Times (steps + 1,), float64, from 1 to 0. patches: the image's tokens, for shifts that depend on its size.

    mu: log of a shift that the family has its own rule for; None = linear in the tokens (`size_shift`).
    even: the pipeline gives the scheduler sigmas 1, ..., 1/steps (FLUX, Z-Image) instead of its own range (SD3).
    sigmas: others that the pipeline gives it.
    """
    config = scheduler.config
    options: dict[str, Any] = {"num_inference_steps": steps}
    if even or sigmas is not None:
        options = {"sigmas": np.linspace(1.0, 1 / steps, steps) if sigmas is None else list(sigmas)}
    if config.use_dynamic_shifting:
        options["mu"] = math.log(size_shift(config, patches)) if mu is None else mu
    scheduler.set_timesteps(**options)
    return scheduler.sigmas.double()


def size_shift(config: dict, patches: int) -> float:
    """exp(mu), with mu linear in the number of image tokens (FLUX, arXiv 2403.03206 section 5.3.2)."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return math.exp(config["base_shift"] + slope * (patches - config["base_image_seq_len"]))

"""Sampling: time grids, the deterministic (DDIM, Euler) and the stochastic sampler, its steps and their density.

One transition serves every schedule. The forward process has a posterior q(x_next | xt, x0) of standard deviation
    sigma_next sqrt(1 - (alpha sigma_next / (alpha_next sigma))^2),
and `eta` scales it: 0 is the ODE (DDIM, Euler), 1 the ancestral sampler. Any eta in [0, 1] leaves the marginals of an
exact model as they are. For a variance-preserving schedule this is DDIM's eta (arXiv 2010.02502, eq. 16).

The published policy-gradient programs draw their steps otherwise; `random_step` has all four, by the name of `Noise`:
    posterior      std as above,                                mean keeps the marginals
    coefficients   std = sigma_next sin(a pi / 2),              mean keeps the marginals    Flow-CPS, arXiv 2509.05952
    flow_sde       std = a sqrt(t / (1 - t)) sqrt(t - t_next),  Euler-Maruyama              Flow-GRPO, arXiv 2505.05470
    constant_sde   std = a sqrt(t - t_next),                    Euler-Maruyama              DanceGRPO, arXiv 2505.07818
The last two keep the marginals only for steps of length 0; `eta_of_noise_level` says by how much they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from palate.core import Cond, Model, PublishedGrid, require
from palate.path import Coefficient, Prediction, add_noise, from_velocity, move
from palate.runtime.errors import InputError

Noise = Literal["posterior", "coefficients", "flow_sde", "constant_sde"]


def state_kind(model: Model) -> dict[str, Any]:
    """{"device", "dtype"} of a rollout's noise and states: where the policy is, and never in half precision."""
    weight = model.parameters("policy")[0]
    return {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}


def shift_time(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t): spends more steps at high noise when shift > 1 (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, *, shift: float = 1.0, start: float = 1.0) -> Tensor:
    """Times (steps + 1,) from `start` down to 0, float64, equal steps before the shift (`start` is a time after it).

    A flow's FlowMatchEulerDiscreteScheduler has the same grid when given sigmas = linspace(1, 1/steps, steps), as
    FLUX's pipeline does; a DDIMScheduler when timestep_spacing is "trailing".
    """
    if steps < 1 or shift <= 0 or not 0 < start <= 1:
        raise InputError(
            f"time_grid got steps {steps}, shift {shift}, start {start}; expected steps >= 1, shift > 0, 0 < start <= 1"
        )
    first = start / (shift - (shift - 1) * start)  # shift_time(first) == start
    return shift_time(torch.linspace(first, 0.0, steps + 1, dtype=torch.float64), shift)


def transition_std(alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor, eta: float) -> Tensor:
    """Noise added by one step towards lower noise: eta times the posterior's standard deviation, <= sigma_next."""
    ratio = alpha * sigma_next / (alpha_next * sigma)
    return eta * sigma_next * (1 - ratio * ratio).clamp_min(0).sqrt()


def random_step(
    pred: Prediction,
    now: tuple[Tensor, Tensor],
    following: tuple[Tensor, Tensor],
    level: float,
    noise: Noise = "posterior",
) -> tuple[Tensor, Tensor]:
    """Mean (B, C, h, w) and standard deviation (B, 1, 1, 1) of a random step between two levels (alpha, sigma).

    `level` is eta of "posterior", in [0, 1], and the published programs' noise level a of the others. The two SDEs are
    those of a flow (alpha + sigma = 1) and raise ValueError elsewhere. For them the Euler-Maruyama step is
    mean = alpha_next x0 + (sigma_next - std^2 / (2 sigma)) eps, the first order of what keeps the marginals.
    """
    (alpha, sigma), (alpha_next, sigma_next) = now, following
    if noise in ("posterior", "coefficients"):
        std = (
            transition_std(alpha, sigma, alpha_next, sigma_next, level)
            if noise == "posterior"
            else sigma_next * math.sin(level * math.pi / 2)
        )
        return move(pred, alpha_next, sigma_next, std), std
    if bool(((alpha + sigma - 1).abs() > 1e-4).any()):
        raise InputError(
            f"noise = {noise!r} is the step of a rectified flow, and this model's schedule is none; "
            "use noise = 'posterior' or 'coefficients'"
        )
    std = flow_sde_std(sigma, sigma_next, level) if noise == "flow_sde" else level * (sigma - sigma_next).sqrt()
    return alpha_next * pred.x0 + (sigma_next - std * std / (2 * sigma)) * pred.eps, std


def flow_sde_std(sigma: Tensor, sigma_next: Tensor, level: float) -> Tensor:
    """level sqrt(t / (1 - t)) sqrt(t - t_next), with t = sigma (Flow-GRPO, arXiv 2505.05470, eq. 8).

    At t = 1 the factor is infinite; there t_next stands for t below the line, as in the authors' program.
    """
    rest = 1 - torch.where(sigma >= 1, sigma_next, sigma)
    return level * (sigma / rest * (sigma - sigma_next)).sqrt()


def eta_of_noise_level(level: float, t: Tensor, t_next: Tensor) -> Tensor:
    """The eta of "posterior" that adds as much noise to the step t -> t_next > 0 of a flow as Flow-GRPO's `level` does.

    eta = level t (1 - t_next) / t_next sqrt(t / ((1 - t) (t + t_next - 2 t t_next))), with 1 - t_next for 1 - t at
    t = 1. It tends to level / sqrt(2) for short steps; for level .7 and eight equal steps it runs from .8 to 1.27,
    where eta = 1 is the most that keeps the marginals.
    """
    rest = 1 - torch.where(t >= 1, t_next, t)
    return level * t * (1 - t_next) / t_next * (t / (rest * (t + t_next - 2 * t * t_next))).sqrt()


def stochastic_step(
    pred: Prediction, alpha: Coefficient, sigma: Coefficient, std: Coefficient, noise: Tensor
) -> Tensor:
    """Sample the next state N(move(pred, alpha, sigma, std), std^2 I) with standard normal `noise`."""
    return move(pred, alpha, sigma, std) + std * noise


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2 I) in nats, summed over all axes but the first: (B,). std > 0, one value per sample."""
    if bool((std <= 0).any()):
        raise InputError(
            "log_prob got std = 0: a deterministic step has no density; use eta > 0 and leave the step to t = 0 out"
        )
    per_element = -0.5 * ((x - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return per_element.flatten(1).sum(1)


class Transition(NamedTuple):
    """One random step of B samples, as it was drawn."""

    x: Tensor  # (B, C, h, w)
    x_next: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    t_next: Tensor  # (B,)
    log_prob: Tensor  # (B,) under the policy that drew it
    mean: Tensor | None = None  # (B, C, h, w) of that policy's step, where it is asked for

    def rows(self, chosen: Tensor) -> Transition:
        x, x_next, t, t_next, log_prob, mean = self
        kept = None if mean is None else mean[chosen]
        return Transition(x[chosen], x_next[chosen], t[chosen], t_next[chosen], log_prob[chosen], kept)


def sample(
    model: Model,
    cond: Cond,
    noise: Tensor,
    steps: int,
    *,
    guidance: float = 1.0,
    eta: float = 0.0,
    shift: float | None = None,
    grad_steps: int = 0,
    weights: str = "policy",
    rng_noise: Callable[[int], Tensor] | None = None,
    timestep: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Clean latents (B, C, h, w) from standard normal `noise` of that shape.

    The last `grad_steps` steps carry gradient, the others run under no_grad. `rng_noise(i)` gives the standard normal
    of step i and is needed when eta > 0, for example `lambda i: rng.normal(f"sde-{i}", model.latent_shape)`. shift:
    equal steps so shifted; None = the grid the model was published with (its `time_grid`), equal steps if it has none.
    timestep: what the network is given for a time t (B,), as a program that truncates it does; the state moves at t.
    """
    if not 0 <= grad_steps <= steps:
        raise InputError(f"sample got grad_steps {grad_steps} with {steps} steps; expected 0..{steps}")
    if not 0 <= eta <= 1:
        raise InputError(f"sample got eta {eta}; expected 0 (deterministic) to 1 (ancestral)")
    if eta > 0 and rng_noise is None:
        raise InputError("sample got eta > 0 without rng_noise; pass a function of the step index that returns noise")
    state_dtype = torch.promote_types(noise.dtype, torch.float32)  # levels and state never in half precision
    if shift is None and isinstance(model, PublishedGrid):
        times = model.time_grid(steps)
    else:
        times = time_grid(steps, shift=1.0 if shift is None else shift)
    times = times.to(noise.device, state_dtype)
    want_grad = torch.is_grad_enabled()
    x = noise
    for i in range(steps):
        with torch.set_grad_enabled(want_grad and i >= steps - grad_steps):
            t, t_next = times[i].expand(len(x)), times[i + 1].expand(len(x))
            alpha_next, sigma_next = model.schedule(t_next)
            if timestep is None:
                pred = model.predict(x, t, cond, guidance=guidance, weights=weights)
            else:  # what the network puts out stands for its velocity, and x is at t
                pred = model.predict(x, timestep(t), cond, guidance=guidance, weights=weights)
                pred = from_velocity(x, pred.eps - pred.x0, *model.schedule(t))
            if rng_noise is None or eta == 0:
                x = move(pred, alpha_next, sigma_next)
            else:
                std = transition_std(*model.schedule(t), alpha_next, sigma_next, eta)
                x = stochastic_step(pred, alpha_next, sigma_next, std, rng_noise(i).to(x))
    return x


@dataclass(frozen=True)
class FewStepGenerator:
    """g(z, c): `steps` network evaluations without guidance at t_k = t_init (1 - k / steps), in the model's time.

    The first input is input_scale z, None = sigma(t_init) z; a later one is alpha x0 + sigma z_k with fresh noise. The
    output is the network's x0, after fewer evaluations where fewer noises are given, as while Diff-Instruct* trains it.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    t_init: float = 0.714  # a flow's sigma / alpha = 2.5 there, the level of the presets for SD1.5 and PixArt
    input_scale: float | None = None
    steps: int = 1

    def __post_init__(self) -> None:
        require(
            self,
            ("t_init: above 0 and at most 1", not 0 < self.t_init <= 1),
            (
                "input_scale: above 0, or null for sigma(t_init)",
                self.input_scale is not None and not self.input_scale > 0,
            ),
            ("steps: at least 1", self.steps < 1),
            name="generator",
        )

    def __call__(self, model: Model, cond: Cond, noises: Sequence[Tensor], *, weights: str = "policy") -> Tensor:
        """x0 (B, C, h, w) after len(noises) <= steps evaluations; only the last one carries gradient."""
        if not 1 <= len(noises) <= self.steps:
            raise InputError(f"the generator got {len(noises)} noises; expected 1 to {self.steps}, one an evaluation")
        want_grad, x0 = torch.is_grad_enabled(), torch.zeros_like(noises[0])
        for k, noise in enumerate(noises):
            with torch.set_grad_enabled(want_grad and k == len(noises) - 1):
                t = torch.full_like(noise[:, 0, 0, 0], self.t_init * (1 - k / self.steps))
                alpha, sigma = model.schedule(t)
                scaled = self.input_scale if k == 0 else None
                x = add_noise(x0, noise, alpha, sigma) if scaled is None else scaled * noise
                x0 = model.predict(x, t, cond, weights=weights).x0
        return x0

"""The theory every other file stands on: xt = alpha x0 + sigma eps.

Time t runs from 0 (data) to 1 (noise). A schedule turns t (B,) into alpha and sigma of shape (B, 1, 1, 1); a
`Prediction` is the pair (x0, eps) that a network's output stands for, whatever it was trained to predict. With these
two the DDIM step of a variance-preserving model and the Euler step of a flow model are one line, `move`.

Everything here is pure. A coefficient is a number or a tensor with one entry per sample and size 1 in every other axis
of the latent; a (B,) tensor is refused, because it would broadcast along the width and say nothing when width == B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from palate.runtime.errors import InputError

Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]  # t (B,) -> alpha, sigma, each (B, 1, 1, 1)
Coefficient = Tensor | float


class Prediction(NamedTuple):
    """What a network says about xt: its clean part and its noise, with xt = alpha x0 + sigma eps."""

    x0: Tensor
    eps: Tensor


def flow_schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): alpha = 1 - t, sigma = t."""
    t = _column(t)
    return 1 - t, t


def vp_schedule(alphas_cumprod: Tensor) -> Schedule:
    """Variance preserving: alpha^2 + sigma^2 = 1, alpha^2 from a training table of N steps (DDPM, arXiv 2006.11239).

    t = k/N is training step k - 1 and t = 0 is clean (alpha = 1). In between alpha^2 is interpolated linearly: that
    keeps alpha^2 + sigma^2 = 1, is monotone, and reaches the clean end without a special case, where log SNR is
    infinite.
    """
    table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).flatten().cpu()
    if len(table) < 2 or not bool(((table >= 0) & (table <= 1)).all()) or bool((table.diff() > 0).any()):
        raise InputError("alphas_cumprod must fall from at most 1 to at least 0 over two or more training steps")
    levels = torch.cat([torch.ones(1, dtype=torch.float64), table])

    def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
        t = _column(t)
        knots = levels.to(t.device)
        position = t.double() * (len(knots) - 1)
        below = position.floor().clamp(0, len(knots) - 2).long()
        alpha2 = torch.lerp(knots[below], knots[below + 1], position - below)
        return alpha2.sqrt().to(t.dtype), (1 - alpha2).sqrt().to(t.dtype)

    return schedule


def add_noise(x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """xt = alpha x0 + sigma eps."""
    _per_sample(x0, alpha=alpha, sigma=sigma)
    return alpha * x0 + sigma * eps


def from_eps(xt: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Prediction:
    """From a noise prediction; alpha > 0."""
    _per_sample(xt, alpha=alpha, sigma=sigma)
    return Prediction((xt - sigma * eps) / alpha, eps)


def from_x0(xt: Tensor, x0: Tensor, alpha: Coefficient, sigma: Coefficient) -> Prediction:
    """From a prediction of the clean latent; sigma > 0."""
    _per_sample(xt, alpha=alpha, sigma=sigma)
    return Prediction(x0, (xt - alpha * x0) / sigma)


def from_v(xt: Tensor, v: Tensor, alpha: Coefficient, sigma: Coefficient) -> Prediction:
    """From v = alpha eps - sigma x0 (Salimans and Ho 2022, arXiv 2202.00512)."""
    _per_sample(xt, alpha=alpha, sigma=sigma)
    norm = alpha * alpha + sigma * sigma
    return Prediction((alpha * xt - sigma * v) / norm, (sigma * xt + alpha * v) / norm)


def from_velocity(xt: Tensor, velocity: Tensor, alpha: Coefficient, sigma: Coefficient) -> Prediction:
    """From velocity = eps - x0, the output of rectified-flow networks."""
    _per_sample(xt, alpha=alpha, sigma=sigma)
    norm = alpha + sigma
    return Prediction((xt - sigma * velocity) / norm, (xt + alpha * velocity) / norm)


def move(pred: Prediction, alpha: Coefficient, sigma: Coefficient, std: Coefficient = 0.0) -> Tensor:
    """The mean at another noise level, alpha x0 + sqrt(sigma^2 - std^2) eps (DDIM, arXiv 2010.02502, eq. 12).

    With std = 0 this is the DDIM step, and for a flow the Euler step. Adding std z then keeps the marginals; std >
    sigma cannot and raises ValueError.
    """
    _per_sample(pred.x0, alpha=alpha, sigma=sigma, std=std)
    if isinstance(std, Tensor) or std != 0:
        sigma, std = (torch.as_tensor(c, dtype=pred.x0.dtype, device=pred.x0.device) for c in (sigma, std))
        if bool((std > sigma * (1 + 1e-6)).any()):
            raise InputError(
                f"move got std {float(std.max()):.4g} above sigma {float(sigma.min()):.4g}; "
                "expected 0 <= std <= sigma: use a smaller eta"
            )
        sigma = (sigma * sigma - std * std).clamp_min(0).sqrt()
    return alpha * pred.x0 + sigma * pred.eps


def score(xt: Tensor, pred: Prediction, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """grad_xt log p_t(xt) = (alpha E[x0 | xt] - xt) / sigma^2 (Tweedie's formula); sigma > 0."""
    _per_sample(xt, alpha=alpha, sigma=sigma)
    return (alpha * pred.x0 - xt) / (sigma * sigma)


def _column(t: Tensor) -> Tensor:
    if not isinstance(t, Tensor) or t.ndim != 1 or not t.is_floating_point():
        got = f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
        raise InputError(f"a schedule got t of {got}; expected a float tensor (B,), one time per sample")
    return t.view(-1, 1, 1, 1)


def _per_sample(x: Tensor, **coefficients: Coefficient) -> None:
    for name, c in coefficients.items():
        if (
            isinstance(c, Tensor)
            and c.ndim
            and not (c.ndim == x.ndim and c.shape[0] in (1, x.shape[0]) and c[0].numel() == 1)
        ):
            raise InputError(
                f"{name} has shape {tuple(c.shape)} beside a latent of shape {tuple(x.shape)}; expected "
                f"({x.shape[0]}, 1, ...) with size 1 in every axis but the first: .view(-1, 1, 1, 1)"
            )

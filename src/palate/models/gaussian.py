"""A model whose truth is known: exact predictions for data x0 ~ N(mu, s^2 I), under any schedule.

At level (alpha, sigma), with q = alpha^2 s^2 + sigma^2,
    E[x0 | xt] = mu + (alpha s^2 / q) (xt - alpha mu),     E[eps | xt] = (sigma / q) (xt - alpha mu),
and the probability-flow ODE carries x from one level to another by x' = alpha' mu + sqrt(q' / q) (x - alpha mu).

Each named network owns four parameters, all zero at the start, so that every network starts at the truth:
    mean      (C, h, w)   moves mu: the network stays the exact predictor of another Gaussian
    log_std   ()          s becomes s exp(log_std): likewise
    velocity  (C, h, w)   added to the velocity eps - x0, whatever xt is   (a "constant model")
    linear    (D, D)      linear @ flatten(xt) added to the velocity       (D = C h w)
`trains` says which of them `parameters` lists; "reference" is the truth itself and never trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from palate.path import Coefficient, Prediction, Schedule, flow_schedule
from palate.runtime.errors import InputError


def gaussian_prediction(xt: Tensor, mu: Tensor, s: Tensor | float, alpha: Tensor, sigma: Tensor) -> Prediction:
    """E[x0 | xt] and E[eps | xt] for x0 ~ N(mu, s^2 I)."""
    q = alpha * alpha * s * s + sigma * sigma
    centred = xt - alpha * mu
    return Prediction(mu + alpha * s * s / q * centred, sigma / q * centred)


def gaussian_ode(
    x: Tensor,
    mu: Tensor,
    s: Tensor | float,
    alpha: Coefficient,
    sigma: Coefficient,
    alpha_next: Coefficient,
    sigma_next: Coefficient,
) -> Tensor:
    """Where the probability-flow ODE carries x from level (alpha, sigma) to (alpha_next, sigma_next)."""
    q, q_next = (alpha * alpha * s * s + sigma * sigma), (alpha_next * alpha_next * s * s + sigma_next * sigma_next)
    return alpha_next * mu + (q_next / q) ** 0.5 * (x - alpha * mu)


class Decoding(NamedTuple):
    """Images are `scale` x + `offset` of latents x."""

    scale: float = 1.0
    offset: float = 0.0


AS_IT_IS = Decoding()


class GaussianModel:
    """`palate.core.Model` on N(mu, s^2 I); latents are images up to an affine map, `decoding`.

    `means` gives prompts their own mu; every other prompt, and the empty prompt of guidance, has `mean`. Guidance w
    then is exact too: it predicts N(mu_empty + w (mu_prompt - mu_empty), s^2 I). Decoded values are NOT clipped, so
    that gradients keep their closed form.
    """

    default_steps = 8
    default_guidance = 1.0

    def __init__(
        self,
        mean: Tensor,
        std: float,
        *,
        schedule: Schedule = flow_schedule,
        means: Mapping[str, Tensor] | None = None,
        trains: Sequence[str] = ("velocity",),
        networks: Sequence[str] = ("policy",),
        decoding: Decoding = AS_IT_IS,
    ):
        known = ("mean", "log_std", "velocity", "linear")
        if mean.ndim != 3 or not set(trains) <= set(known):
            raise InputError(
                f"GaussianModel got mean {tuple(mean.shape)}, trains {list(trains)}; "
                f"expected a mean (C, h, w) and names among {known}"
            )
        if "reference" in networks:
            raise InputError("GaussianModel got a network named 'reference'; that name is the frozen truth")
        self.mean, self.std, self.schedule = mean, float(std), schedule
        self.means = dict(means or {})
        self.latent_shape: tuple[int, int, int] = (mean.shape[0], mean.shape[1], mean.shape[2])
        self.image_size, self.device = mean.shape[-1], mean.device
        self.trains = tuple(trains)
        self.decoding = decoding
        self.networks = {name: self._network() for name in networks}

    def _network(self) -> nn.ParameterDict:
        size = self.mean.numel()
        shapes = {"mean": self.latent_shape, "log_std": (), "velocity": self.latent_shape, "linear": (size, size)}
        return nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(shape, dtype=self.mean.dtype), requires_grad=name in self.trains)
                for name, shape in shapes.items()
            }
        )

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The mean of each prompt, (B, C, h, w)."""
        return torch.stack([self.means.get(p, self.mean) for p in prompts])

    def encode(self, images: Tensor) -> Tensor:
        return (images - self.decoding.offset) / self.decoding.scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoding.scale * latents + self.decoding.offset

    def predict(
        self, xt: Tensor, t: Tensor, cond: Tensor, *, guidance: float = 1.0, weights: str = "policy"
    ) -> Prediction:
        alpha, sigma = self.schedule(t)
        mu = self.mean + guidance * (cond - self.mean)
        if weights == "reference":
            return gaussian_prediction(xt, mu, self.std, alpha, sigma)
        net = self._named(weights)
        pred = gaussian_prediction(xt, mu + net["mean"], self.std * net["log_std"].exp(), alpha, sigma)
        delta = net["velocity"] + (xt.flatten(1).to(net["linear"]) @ net["linear"].T).view_as(xt)
        return Prediction(pred.x0 - sigma / (alpha + sigma) * delta, pred.eps + alpha / (alpha + sigma) * delta)

    def parameters(self, weights: str = "policy") -> list[nn.Parameter]:
        if weights == "reference":
            return []
        net = self._named(weights)
        return [net[name] for name in self.trains]

    def fingerprint(self) -> str:
        """SHA-256 of the true mean and standard deviation."""
        return hashlib.sha256(self.mean.double().numpy().tobytes() + repr(self.std).encode()).hexdigest()

    def _named(self, weights: str) -> nn.ParameterDict:
        if weights not in self.networks:
            raise InputError(f"weights {weights!r} unknown; expected 'reference' or one of {sorted(self.networks)}")
        return self.networks[weights]

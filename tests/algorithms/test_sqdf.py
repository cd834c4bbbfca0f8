"""algorithms/sqdf.py: the soft-optimal policy of a Gaussian chain in closed form, gradients, counts, resuming."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support import ROOT
from torch import nn

from palate import recipe
from palate.algorithms.sqdf import (
    SQDF,
    SQDFSettings,
    alpha_in_nats,
    calls_per_update,
    estimate,
    kl,
    levels,
    soft_q_loss,
    transition,
)
from palate.core import Batch, Random
from palate.models.emoji import EmojiModel
from palate.models.gaussian import GaussianModel, gaussian_ode, gaussian_prediction
from palate.models.weights import NamedWeights
from palate.path import Prediction, add_noise, flow_schedule, from_eps, vp_schedule
from palate.recipe import RecipeError
from palate.sampling import transition_std
from palate.testing import PROMPTS, TinyFlow, tiny_reward
from palate.train import train

D = torch.float64
T, MU, STD = 10, 0.7, 0.5
TOY = vp_schedule(torch.cat([torch.tensor([0.999], dtype=D), torch.linspace(0.97, 0.02, 10, dtype=D)]))
SD = vp_schedule(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=D) ** 2, 0))
CHAIN = {"rollout_steps": T, "final_time": 1 / 11, "guidance": 1.0}  # levels(...) are then the toy's 10 .. 0


def toy(t):
    """Level t = 0 .. 10 of the toy chain."""
    return TOY(torch.tensor([(t + 1) / 11], dtype=D))


def toy_step(t, x):
    """Mean and std of the reference's step t -> t-1 at x."""
    x = torch.full((1, 1, 1, 1), float(x), dtype=D)
    pred = gaussian_prediction(x, torch.tensor(MU, dtype=D), STD, *toy(t))
    mean, std = transition(pred, *toy(t), *toy(t - 1), 1.0)
    return float(mean), float(std)


def chain():
    """A_t, b_t, std_t of the steps and M_t, c_t, S_t of x_0 | x_t ~ N(M_t x + c_t, S_t), each indexed by t = 0 .. T."""
    a, b, std, m, c, s = [0.0], [0.0], [0.0], [1.0], [0.0], [0.0]
    for t in range(1, T + 1):
        zero, one = toy_step(t, 0), toy_step(t, 1)
        a.append(one[0] - zero[0])
        b.append(zero[0])
        std.append(zero[1])
        s.append(s[-1] + m[-1] ** 2 * std[t] ** 2)
        c.append(m[-1] * b[t] + c[-1])
        m.append(m[-1] * a[t])
    return a, b, std, m, c, s


A, B, SIGMA, M, C, S = chain()


def soft_value(t, quadratic, gamma, alpha):
    """V*_t of a terminal reward q2 x^2 + q1 x + q0 by the exact recursion: its three coefficients."""
    q2, q1, q0 = quadratic
    for u in range(1, t + 1):
        shrink = gamma if u > 1 else 1.0  # Q_u = gamma V_{u-1}, and Q_1 = r
        q2, q1, q0 = shrink * q2, shrink * q1, shrink * q0
        # alpha log E exp((q2 y^2 + q1 y + q0) / alpha) for y ~ N(A x + b, std^2)
        d = 1 - 2 * q2 * SIGMA[u] ** 2 / alpha
        p2, p1 = q2 / d, q1 / d
        p0 = q0 + q1**2 * SIGMA[u] ** 2 / (2 * alpha * d) - alpha / 2 * math.log(d)
        q2, q1, q0 = p2 * A[u] ** 2, 2 * p2 * A[u] * B[u] + p1 * A[u], p2 * B[u] ** 2 + p1 * B[u] + p0
    return q2, q1, q0


def at(quadratic, x):
    return quadratic[0] * x * x + quadratic[1] * x + quadratic[2]


class Shifts:
    """The toy chain with a policy of ten free numbers: step t's mean is the reference's plus std_t p_t.

    "consistency" is the chain's own E[x_0 | x] ("exact"), or the map of the probability-flow ODE ("ode").
    """

    schedule, latent_shape = staticmethod(TOY), (1, 1, 1)

    def __init__(self, consistency="exact"):
        self.p, self.kind = nn.Parameter(torch.zeros(T + 1, dtype=D)), consistency
        unit = [0.0]
        for t in range(1, T + 1):
            (a, s), (an, sn) = toy(t), toy(t - 1)
            std = transition_std(a, s, an, sn, 1.0)
            unit.append(float(std / ((sn**2 - std**2).sqrt() - an * s / a)))  # d mean / d eps at fixed x_t
        self.unit = torch.tensor(unit, dtype=D)
        self.times = []

    def encode_prompts(self, prompts):
        return torch.zeros(len(prompts))

    def decode(self, x):
        return x

    def parameters(self, weights="policy"):
        return [self.p]

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        assert len(xt) == len(t) == len(cond)
        alpha, sigma = self.schedule(t)
        k = (t * 11).round().long() - 1
        if weights == "consistency":
            self.times.append(t)
            if self.kind == "ode":
                q = alpha**2 * STD**2 + sigma**2
                return Prediction(MU + STD * (xt - alpha * MU) / q.sqrt(), xt)
            m, c = (torch.tensor(v, dtype=D)[k].view(-1, 1, 1, 1) for v in (M, C))
            return Prediction(m * xt + c, xt)
        pred = gaussian_prediction(xt, torch.tensor(MU, dtype=D), STD, alpha, sigma)
        if weights == "reference":
            return pred
        return from_eps(xt, pred.eps + (self.unit * self.p)[k].view(-1, 1, 1, 1), alpha, sigma)


def linear(images, prompts):
    return 1.3 * images.flatten(1).sum(1)


def run(model, settings, *, steps=130, batch=24, reward=linear, lr=None, first=1):
    algorithm = SQDF(settings)
    optimizer = torch.optim.SGD([model.p], lr=lr or 5 / settings.alpha_kl)
    prompts = ["x"] * batch
    for n in range(first, first + steps):
        ids = torch.arange(n * batch, (n + 1) * batch)
        given = Batch(prompts, model.encode_prompts(prompts), ids)
        for loss in algorithm.step(model, reward, given, Random(0, n, ids)):
            optimizer.zero_grad()
            loss.value.backward()
            optimizer.step()
    return algorithm


def moved(shift):
    """(shift of E[x_0], path KL) of mean shifts in units of std, indexed by t."""
    return sum(M[t - 1] * SIGMA[t] * shift[t] for t in range(1, T + 1)), sum(shift[t] ** 2 / 2 for t in range(1, T + 1))


# The chain


def only(algorithm):
    """The replay buffer of an algorithm that has drawn one image size."""
    (buffer,) = algorithm.buffers.values()
    return buffer


def test_levels_end_above_zero_and_follow_the_shift():
    torch.testing.assert_close(levels(10, shift=1.0, final_time=1 / 11), torch.arange(11, 0, -1, dtype=D) / 11)
    times = levels(5, shift=3.0, final_time=0.02)
    assert float(times[0]) == 1 and float(times[-1]) == pytest.approx(0.02) and bool((times.diff() < 0).all())
    u = times / (3 - 2 * times)
    torch.testing.assert_close(u.diff(), u.diff()[:1].expand(5))


@pytest.mark.parametrize(
    ("t", "std", "m", "c", "s"),
    [
        (1, 0.031107, 0.906729, 0.074533, 0.000968),
        (2, 0.155187, 0.663278, 0.267970, 0.020768),
        (4, 0.311031, 0.397608, 0.474682, 0.075863),
        (6, 0.395261, 0.249623, 0.583451, 0.110960),
        (8, 0.520085, 0.145894, 0.650554, 0.133725),
        (10, 0.866115, 0.036019, 0.696084, 0.149497),
    ],
)
def test_the_toy_chain(t, std, m, c, s):
    assert (SIGMA[t], M[t], C[t], S[t]) == pytest.approx((std, m, c, s), abs=6e-7)
    alpha, sigma = (float(v) for v in toy(t))
    v, v0 = alpha**2 * STD**2 + sigma**2, 0.999 * STD**2 + 0.001
    assert M[t] == pytest.approx(math.sqrt(alpha**2 / 0.999) * v0 / v, abs=1e-12)  # the forward slope, exactly
    tweedie = alpha * STD**2 / v
    assert tweedie / M[t] == pytest.approx(0.99651, abs=1e-5)


@pytest.mark.parametrize(
    ("i", "tau", "std", "w"),
    [
        (0, 981, 0.454463, 0.262709),
        (10, 781, 0.390750, 0.191828),
        (25, 481, 0.287685, 0.141139),
        (40, 181, 0.177068, 0.200288),
        (47, 41, 0.099887, 1.034817),
        (48, 21, 0.039480, 10.724235),
        (49, 1, 0.020648, 1.006388),
    ],
)
def test_kl_of_stable_diffusion_steps(i, tau, std, w):
    """DDIM's sigma, and KL = (w / 2) |eps_theta - eps_ref|^2, w the growth of the SNR; the program's is 2/D of it."""
    x, eps, other = torch.randn(3, 2, 4, 3, 3, dtype=D, generator=torch.Generator().manual_seed(i)).unbind(0)
    here = SD(torch.tensor([(tau + 1) / 1000], dtype=D))
    there = SD(torch.tensor([max(tau - 20, 0) / 1000 + 1 / 1000], dtype=D))
    mean, got = transition(from_eps(x, eps, *here), *here, *there, 1.0)
    mean_ref, _ = transition(from_eps(x, other, *here), *here, *there, 1.0)
    assert float(got) == pytest.approx(std, abs=6e-7)
    snr = [float((a / s) ** 2) for a, s in (here, there)]
    assert snr[1] / snr[0] - 1 == pytest.approx(w, abs=6e-6 if w > 2 else 6e-7)
    expected = (snr[1] / snr[0] - 1) / 2 * (eps - other).square().flatten(1).sum(1)
    divergence = kl(mean, mean_ref, got)
    torch.testing.assert_close(divergence, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(divergence, kl(mean_ref, mean, got), rtol=0, atol=0)
    normals = (torch.distributions.Normal(m, got.expand_as(m)) for m in (mean, mean_ref))
    torch.testing.assert_close(divergence, torch.distributions.kl_divergence(*normals).flatten(1).sum(1))
    released = (mean_ref - mean).square().flatten(1).mean(1) / got.flatten() ** 2
    torch.testing.assert_close(alpha_in_nats(2.0, 36) * divergence, 2.0 * released)


def test_alpha_conversion():
    nats = [alpha_in_nats(a, 16384) for a in (2, 1, 0.05, 0.005)]
    assert nats == pytest.approx([2.44e-4, 1.22e-4, 6.10e-6, 6.10e-7], rel=2e-3)
    q, mean_ref = torch.randn(2, 1, 3, 2, 2, dtype=D).unbind(0)
    std, released = torch.full((1, 1, 1, 1), 0.3, dtype=D), 1.7
    mean = (mean_ref + 12 * 0.3**2 * q / (2 * released)).requires_grad_()  # the argmin in the program's scale
    one = torch.ones(1, dtype=D)
    soft_q_loss((q * mean).sum().view(1), kl(mean, mean_ref, std), one, alpha_in_nats(released, 12), one).backward()
    assert mean.grad.abs().max() < 1e-12


@pytest.mark.parametrize("schedule", [flow_schedule, SD], ids=["flow", "vp"])
def test_a_step_keeps_the_marginals(schedule):
    """From x_t = alpha x0 + sigma eps the next state is alpha' x0 + sigma' z: variances of its two noises add up."""
    for t, t_next in ((1.0, 0.8), (0.6, 0.3), (0.05, 0.02)):
        (a, s), (an, sn) = (schedule(torch.tensor([v], dtype=D)) for v in (t, t_next))
        eps = torch.ones(1, 1, 1, 1, dtype=D)
        for eta in (0.1, 1.0):
            mean, std = transition(Prediction(torch.zeros_like(eps), eps), a, s, an, sn, eta)
            assert float(mean**2 + std**2) == pytest.approx(float(sn**2), rel=1e-12)
            assert 0 < float(std) <= float(sn)
            data, _ = transition(Prediction(eps, torch.zeros_like(eps)), a, s, an, sn, eta)
            assert float(data) == pytest.approx(float(an))


def test_the_flow_sampler_reaches_the_data():
    """Mean and variance of the flow's chain on N(mu, s^2) meet the marginal of the last level at rate 1 / T."""
    errors = []
    for steps in (50, 500):
        times, mean, variance = levels(steps, shift=1.0, final_time=0.02), 0.0, 1.0
        for t, t_next in itertools.pairwise(times):
            here, there = (flow_schedule(v.view(1)) for v in (t, t_next))
            ends = []
            for x in (0.0, 1.0):
                x = torch.full((1, 1, 1, 1), x, dtype=D)
                pred = gaussian_prediction(x, torch.tensor(MU, dtype=D), STD, *here)
                ends.append(transition(pred, *here, *there, 1.0))
            slope = float(ends[1][0] - ends[0][0])
            mean, variance = slope * mean + float(ends[0][0]), slope**2 * variance + float(ends[0][1]) ** 2
        assert mean == pytest.approx(0.98 * MU, abs=1e-9)
        errors.append(variance - (0.98**2 * STD**2 + 0.02**2))
    assert errors[0] < 0 and 8 < errors[0] / errors[1] < 12


def test_no_noise_is_refused():
    pred, (a, s), (an, sn) = (
        Prediction(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)),
        flow_schedule(torch.tensor([0.5])),
        flow_schedule(torch.tensor([0.0])),
    )
    with pytest.raises(ValueError, match=r"sigma = 0.*KL is infinite"):
        transition(pred, a, s, an, sn, 1.0)
    with pytest.raises(ValueError, match="eta = 0"):
        transition(pred, a, s, *flow_schedule(torch.tensor([0.3])), 0.0)
    for wrong, message in (
        ({"eta": 0.0}, "deterministic.*infinite.*eta = 0.0"),
        ({"final_time": 0.0}, "infinite"),
        ({"estimator": "rollout-0"}, "rollout-2"),
        ({"estimator": "lcm"}, "tweedie, consistency"),
        ({"buffer": "none", "rollout_every": 2}, "own rollout"),
        ({"gamma": 1.2}, "gamma = 1.2"),
        ({"estimator_guidance": 3.0}, "distilled"),
        ({"buffer": "fifo"}, "importance"),
        ({"alpha_kl": -1.0}, "alpha_kl"),
        ({"buffer_size": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SQDFSettings(**wrong)


# The soft-optimal policy


def test_soft_values_of_a_linear_and_a_quadratic_reward():
    """The recursion against the closed forms, so that the optima below are those of the KL-regularised problem."""
    k, alpha = 1.3, 0.8
    value = at(soft_value(6, (0, k, 0), 1.0, alpha), 0.4)
    assert value == pytest.approx(1.0054919, abs=5e-8)
    assert value == pytest.approx(k * (M[6] * 0.4 + C[6]) + k**2 * S[6] / (2 * alpha), abs=1e-12)
    lam, c = 2.0, 1.5
    quadratic = (-lam / 2, lam * c, -lam / 2 * c**2)
    assert at(soft_value(6, quadratic, 1.0, alpha), 0.4) == pytest.approx(-0.6200842, abs=5e-8)
    assert -lam / 2 * (M[6] * 0.4 + C[6] - c) ** 2 == pytest.approx(-0.6669990, abs=5e-8)
    assert 1 + lam * S[6] / alpha == pytest.approx(1.2774012, abs=5e-8)


@pytest.mark.parametrize(
    ("t", "low", "exact", "high"),
    [
        (2, 0.512380, 0.512472, 0.512472),
        (4, 0.590811, 0.595503, 0.601447),
        (8, 0.464121, 0.479782, 0.496662),
    ],
)
def test_the_discounted_q_lies_between_its_bounds(t, low, exact, high):
    k, alpha, gamma, x = 1.3, 0.8, 0.9, 0.4
    q2, q1, q0 = soft_value(t - 1, (0, k, 0), gamma, alpha)
    q = [gamma * v for v in (q2, q1, q0)]
    assert q[1] == pytest.approx(gamma ** (t - 1) * k * M[t - 1], abs=1e-12)  # the slope that SQDF uses is exact
    mean, variance, g = M[t - 1] * x + C[t - 1], S[t - 1], gamma ** (t - 1)
    bounds = g * k * mean + g**2 * k**2 * variance / (2 * alpha), g * (k * mean + k**2 * variance / (2 * alpha))
    assert (bounds[0], at(q, x), bounds[1]) == pytest.approx((low, exact, high), abs=6e-7)


@pytest.mark.parametrize(
    ("law", "gamma", "shift", "path"),
    [
        ("none", 1.0, 0.2429330, 0.1973831),
        ("uniform", 0.9, 0.1648387, 0.0956394),
        ("prioritised", 0.9, 0.1648387, 0.0956394),
        ("importance", 0.9, 0.1648387, 0.0956394),
        ("uniform", 0.5, 0.0382876, None),
    ],
)
def test_training_reaches_the_soft_optimal_policy_under_every_law_of_states(law, gamma, shift, path):
    """Linear reward, exact Q: p*_t is the reference shifted by gamma^(t-1) k M_{t-1} std_t^2 / alpha."""
    model = Shifts()
    run(
        model,
        SQDFSettings(
            **CHAIN,
            alpha_kl=0.8,
            gamma=gamma,
            estimator="consistency",
            buffer=law,
            rollout_every=1 if law == "none" else 10,
        ),
    )
    expected = [0.0] + [gamma ** (t - 1) * 1.3 * M[t - 1] * SIGMA[t] / 0.8 for t in range(1, T + 1)]
    torch.testing.assert_close(model.p.detach(), torch.tensor(expected, dtype=D), atol=1e-9, rtol=0)
    got = moved(model.p.tolist())
    assert got[0] == pytest.approx(shift, abs=6e-8) and (path is None or got[1] == pytest.approx(path, abs=6e-8))
    if gamma == 1:  # the tilt is by S_T: the law of x_T cannot be tilted
        assert got[0] == pytest.approx(1.3 * S[T] / 0.8) and got[1] == pytest.approx(1.3**2 * S[T] / (2 * 0.8**2))


@pytest.mark.parametrize("estimator", ["tweedie", "rollout-1"])
def test_the_posterior_mean_is_wrong_only_by_the_last_level(estimator):
    """Tweedie predicts the clean level, the chain ends at level 0: slopes are .99651 of the exact ones, 1 at t = 1."""
    model = Shifts()
    run(model, SQDFSettings(**CHAIN, alpha_kl=0.8, gamma=0.9, estimator=estimator, rollout_every=10))
    ratio = math.sqrt(0.999) * STD**2 / (0.999 * STD**2 + 0.001)
    slope = [0.0] + [M[t - 1] * (ratio if t > 1 else 1) for t in range(1, T + 1)]
    expected = [0.0] + [0.9 ** (t - 1) * 1.3 * slope[t] * SIGMA[t] / 0.8 for t in range(1, T + 1)]
    torch.testing.assert_close(model.p.detach(), torch.tensor(expected, dtype=D), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("gamma", "shift"), [(1.0, 0.4813403), (0.9, 0.2915401), (0.5, 0.0483791)])
def test_a_consistency_map_is_not_the_posterior_mean_and_overshoots(gamma, shift):
    model = Shifts("ode")
    run(model, SQDFSettings(**CHAIN, alpha_kl=0.8, gamma=gamma, estimator="consistency", rollout_every=10))
    assert moved(model.p.tolist())[0] == pytest.approx(shift, abs=6e-8)
    slopes = []
    for t in (1, 5, 10):
        _alpha, _sigma = (float(v) for v in toy(t))
        x = torch.tensor([0.0, 1.0], dtype=D).view(2, 1, 1, 1)
        clock = torch.full((2,), (t + 1) / 11, dtype=D)
        ode, mean = (estimate(model, x, clock, torch.zeros(2), name) for name in ("consistency", "tweedie"))
        slopes.append(float((ode[1] - ode[0]) / (mean[1] - mean[0])))
    assert slopes == pytest.approx([1.0600525, 2.0741821, 14.0356688], abs=5e-7)


def test_rollout_n_approaches_the_ode_and_one_step_is_tweedie():
    model = GaussianModel(torch.full((1, 1, 1), MU, dtype=D), STD)
    x, t = torch.tensor([-0.4, 1.1], dtype=D).view(2, 1, 1, 1), torch.tensor([0.8, 0.3], dtype=D)
    cond = model.encode_prompts(["", ""])
    truth = gaussian_ode(x, model.mean, STD, *flow_schedule(t), *flow_schedule(torch.zeros(2, dtype=D)))
    error = [float((estimate(model, x, t, cond, f"rollout-{n}") - truth).abs().max()) for n in (1, 16, 64)]
    assert error[0] > error[1] > error[2] and error[1] / error[2] == pytest.approx(4, rel=0.15)  # Euler: first order
    two = model.predict(x, t, cond, weights="reference")
    middle = 0.5 * t.view(-1, 1, 1, 1)
    y = (1 - middle) * two.x0 + middle * two.eps
    by_hand = model.predict(y, 0.5 * t, cond, weights="reference").x0
    torch.testing.assert_close(estimate(model, x, t, cond, "rollout-2"), by_hand)


def test_training_reaches_the_best_shifts_of_a_quadratic_reward_within_the_monte_carlo_error():
    """r = -lam/2 (x_0 - c)^2 and on-policy states: the best shift of step t looks at the mean of its states alone, so
    that the shifts follow one after the other from the noisiest step on. Polyak's average of the iterates."""
    lam, c, alpha, batch, steps, settled = 2.0, 1.5, 0.8, 250, 120, 30

    def quadratic(images, prompts):
        return -lam / 2 * (images.flatten(1).sum(1) - c) ** 2

    expected, error, mean, variance = [0.0] * (T + 1), [1.0] * (T + 1), 0.0, 1.0
    for t in range(T, 0, -1):
        m, std = M[t - 1], SIGMA[t]
        curvature = alpha + lam * m**2 * std**2
        expected[t] = -lam * m * std * (m * (A[t] * mean + B[t]) + C[t - 1] - c) / curvature
        mean = A[t] * mean + B[t] + std * expected[t]
        variance = A[t] ** 2 * variance + std**2
        noise = lam * m**2 * std * variance**0.5  # of one state's gradient: the spread of x_{t-1}
        error[t] = noise / curvature / math.sqrt((steps - settled) * batch / T)

    model = Shifts()
    seen: list[torch.Tensor] = []

    def watched(images, prompts):
        seen.append(model.p.detach().clone())
        return quadratic(images, prompts)

    run(
        model,
        SQDFSettings(**CHAIN, alpha_kl=alpha, gamma=1.0, estimator="consistency", buffer="none"),
        steps=steps,
        batch=batch,
        reward=watched,
        lr=4.0,
    )
    found = torch.stack(seen[settled:]).mean(0)
    apart = (found - torch.tensor(expected, dtype=D)).abs()[1:]
    assert bool((apart < 4 * torch.tensor(error[1:], dtype=D)).all())
    assert max(error[1:]) < 0.02 < 0.1 * max(expected)


def test_a_quadratic_reward_within_its_monte_carlo_error():
    """t = 5, x_5 = -.3: the best mean at fixed variance. Robbins-Monro from the pure functions, iterates averaged."""
    lam, c, alpha, t = 2.0, 1.5, 0.8, 5
    mean_ref, std = toy_step(t, -0.3)
    m, c0 = M[t - 1], C[t - 1]
    exact = -lam * m * std**2 * (m * mean_ref + c0 - c) / (alpha + lam * m**2 * std**2)
    assert exact == pytest.approx(0.1241948, abs=5e-8)
    delta, count, steps = torch.zeros(1, 1, 1, 1, dtype=D, requires_grad=True), 64, 600
    spread, one = torch.full((1, 1, 1, 1), std, dtype=D), torch.ones(count, dtype=D)
    noise = torch.randn(steps, count, 1, 1, 1, dtype=D, generator=torch.Generator().manual_seed(0))
    curvature, total = lam * m**2 + alpha / std**2, 0.0
    for n in range(steps):
        mean = mean_ref + delta.expand(count, 1, 1, 1)
        r = -lam / 2 * (m * (mean + spread * noise[n]).flatten() + c0 - c) ** 2
        loss = soft_q_loss(r, kl(mean, torch.full_like(mean, mean_ref), spread), one, alpha, one)
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            delta -= gradient / curvature
        total += float(delta.detach()) / steps
    error = lam * m**2 * std / curvature / math.sqrt(steps * count)  # gradient noise is lam m^2 std e
    assert abs(total - exact) < 4 * error and error < 0.1 * exact
    # p* itself has a smaller variance, which a policy of fixed variance cannot have
    sharper = lam / (1 + lam * S[t - 1] / alpha)
    assert 1 / (1 / std**2 + sharper * m**2 / alpha) < std**2
    assert (c - c0) / m - mean_ref == pytest.approx(2.6613434, abs=5e-8)  # alpha -> 0


def test_the_limits_of_alpha():
    shifts = []
    for alpha in (0.8, 8.0):
        model = Shifts()
        settings = SQDFSettings(**CHAIN, alpha_kl=alpha, gamma=1.0, estimator="consistency", rollout_every=10)
        run(model, settings, steps=60)
        shifts.append(model.p.detach())
    torch.testing.assert_close(shifts[0], 10 * shifts[1], atol=1e-5, rtol=0)


# Gradients


def test_reparameterised_gradient():
    """It is Stein's E[Q e / std], at a variance a hundred times smaller than the score function's."""
    n, generator = 40_000, torch.Generator().manual_seed(0)
    e = torch.randn(n, dtype=D, generator=generator)
    mu, s = torch.full((n, 1, 1, 1), 0.3, dtype=D, requires_grad=True), 0.2
    x = mu + s * e.view(-1, 1, 1, 1)
    q = -((x.flatten() - 1) ** 2)
    one = torch.ones(n, dtype=D)
    (gradient,) = torch.autograd.grad(soft_q_loss(q, 0 * one, one, 0.0, one), mu)
    gradient = -n * gradient.flatten()
    assert gradient.mean() == pytest.approx(1.4, abs=4 * 0.4 / math.sqrt(n))
    assert gradient.var() == pytest.approx(0.16, rel=0.05)
    stein = q.detach() * e / s
    assert stein.mean() == pytest.approx(1.4, abs=4 * math.sqrt(13.4625 / n))
    assert stein.var() == pytest.approx(13.4625, rel=0.1)


def gaussian(**settings):
    torch.manual_seed(1)
    model = GaussianModel(
        0.3 * torch.randn(2, 2, 2, dtype=D), 0.6, trains=("velocity", "linear"), networks=("policy", "consistency")
    )
    for p in model.networks["consistency"].values():
        p.requires_grad_(False)
    with torch.no_grad():
        model.networks["consistency"]["velocity"].normal_(0, 0.1)
    return model, SQDFSettings(
        **{
            "rollout_steps": 6,
            "final_time": 0.05,
            "guidance": 1.0,
            "alpha_kl": 0.3,
            "gamma": 0.9,
            "estimator": "consistency",
            "buffer": "none",
            **settings,
        }
    )


def bent(images, prompts):
    return torch.tanh(images.flatten(1)).sum(1) + 0.1 * images.flatten(1).square().sum(1)


def losses(model, settings, ids, step=1, algorithm=None, reward=bent):
    ids, prompts = torch.as_tensor(ids), ["x"] * len(ids)
    algorithm = algorithm or SQDF(settings)
    return list(algorithm.step(model, reward, Batch(prompts, model.encode_prompts(prompts), ids), Random(0, step, ids)))


def gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.value, model.parameters())])


def test_gradient_is_that_of_one_step_with_the_state_as_data():
    """Finite differences over theta at fixed states and noise: autograd sees no other path."""
    model, settings = gaussian(buffer="uniform", rollout_every=100, estimator="tweedie")
    algorithm = SQDF(settings)
    losses(model, settings, range(16), 1, algorithm)
    (loss,) = losses(model, settings, range(16), 2, algorithm)  # drawn from what step 1 left
    assert loss.update == "policy"
    grads = torch.autograd.grad(loss.value, model.parameters())
    for p, g in zip(model.parameters(), grads, strict=True):
        direction, ends = torch.randn_like(p), []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 1e-5 * direction
            ends.append(float(losses(model, settings, range(16), 2, algorithm)[0].value.detach()))
            with torch.no_grad():
                p -= sign * 1e-5 * direction
        assert float((g * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_gradients_of_two_ranks_average_to_that_of_the_batch():
    model, settings = gaussian()
    whole = gradient(model, losses(model, settings, range(8))[0])
    halves = [gradient(model, losses(model, settings, part)[0]) for part in (range(4), range(4, 8))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, atol=1e-12, rtol=0)
    assert whole.abs().sum() > 0


def test_the_consistency_model_speaks_except_in_the_last_step():
    for gamma, changes in ((0.0, False), (0.9, True)):  # prioritised with gamma 0 draws the last step only
        values = []
        for scale in (0.0, 1.0):
            model, settings = gaussian(buffer="prioritised", gamma=gamma)
            with torch.no_grad():
                model.networks["consistency"]["velocity"].fill_(scale)
            (loss,) = losses(model, settings, range(8))
            assert float(loss.metrics["index"]) == 5 or changes
            values.append(float(loss.value.detach()))
            loss.value.backward()
            assert all(p.grad is None for p in model.networks["consistency"].values())
        assert (values[0] != values[1]) == changes


def test_the_consistency_model_is_called_at_the_time_of_the_action():
    """At the true level an exact noise gives x0; at the program's level for the last but one step it does not."""
    model = Shifts()
    algorithm = run(model, SQDFSettings(**CHAIN, estimator="consistency", buffer="none"), steps=1)
    index = Random(0, 1, range(24, 48)).integers("index", 0, T - 1)
    torch.testing.assert_close(model.times[0], levels(T, shift=1.0, final_time=1 / 11)[index + 1])
    assert algorithm.state_dict() == {}
    x0, eps = torch.randn(2, 1, 4, 3, 3, dtype=D).unbind(0)
    true, other = (SD(torch.tensor([(tau + 1) / 1000], dtype=D)) for tau in (1, 19))
    x = add_noise(x0, eps, *true)
    torch.testing.assert_close(from_eps(x, eps, *true).x0, x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(from_eps(x, eps, *other).x0, 1.008138 * x0 - 0.092800 * eps, atol=1e-5, rtol=0)


def test_without_a_kl_the_last_step_is_draft_1():
    """alpha = 0, i = T-1: reward of one reparameterised step from the detached x_1."""
    model, settings = gaussian(buffer="prioritised", gamma=0.0, alpha_kl=0.0)
    algorithm = SQDF(settings)
    (loss,) = losses(model, settings, range(4), 1, algorithm)
    rng = Random(0, 1, range(4))
    draw = only(algorithm).draw("prioritised", rng.uniform("row"), rng.uniform("index"), gamma=0.0)
    t, end = (torch.full((4,), float(v), dtype=D) for v in levels(6, shift=1.0, final_time=0.05)[-2:])
    pred = model.predict(draw.states, t, model.encode_prompts(["x"] * 4))
    mean, std = transition(pred, *flow_schedule(t), *flow_schedule(end), 1.0)
    draft = -bent(mean + std * rng.normal("action", (2, 2, 2)), None).mean()
    torch.testing.assert_close(draft, loss.value)
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(draft, model.parameters())])
    torch.testing.assert_close(by_hand, gradient(model, loss))


def test_the_buffer_holds_the_inputs_of_the_steps():
    """Index i is what step i starts from: the noise at 0, and each next one the step's outcome."""
    model, settings = gaussian(buffer="uniform")
    algorithm = SQDF(settings)
    losses(model, settings, range(3), 1, algorithm)
    rng, cond = Random(0, 1, range(3)), model.encode_prompts(["x"] * 3)
    kept = torch.stack(only(algorithm).state_dict()["trajectories"], 1)  # (T, 3, ...)
    torch.testing.assert_close(kept[0], rng.normal("start", (2, 2, 2)).double())
    times = levels(6, shift=1.0, final_time=0.05)
    for i in range(6):
        t, t_next = times[i].expand(3), times[i + 1].expand(3)
        mean, std = transition(model.predict(kept[i], t, cond), *flow_schedule(t), *flow_schedule(t_next), 1.0)
        x = (mean + std * rng.normal(f"walk-{i}", (2, 2, 2))).detach()
        if i < 5:
            torch.testing.assert_close(kept[i + 1], x)
    torch.testing.assert_close(torch.tensor(list(only(algorithm).rewards), dtype=D), bent(x, None))


def test_without_a_buffer_each_sample_stops_where_its_update_happens():
    """The states are those of the full walk with the same noise, each at the index drawn for it."""
    model, settings = gaussian(buffer="uniform")
    algorithm = SQDF(settings)
    losses(model, settings, range(8), 1, algorithm)
    kept, seen, predict = torch.stack(only(algorithm).state_dict()["trajectories"], 1), [], model.predict

    def spy(xt, t, cond, **options):
        if options.get("weights") == "reference":
            seen.append(xt)
        return predict(xt, t, cond, **options)

    model.predict = spy
    losses(model, dataclasses.replace(settings, buffer="none"), range(8))
    index = Random(0, 1, range(8)).integers("index", 0, 5)
    torch.testing.assert_close(seen[0], kept[index, torch.arange(8)])
    assert len(set(index.tolist())) > 2


def test_at_the_start_the_kl_and_its_gradient_are_zero():
    model, settings = gaussian(alpha_kl=1e6)
    (loss,) = losses(model, settings, range(8), reward=lambda images, prompts: 0 * images.flatten(1).sum(1))
    assert float(loss.metrics["kl"]) == 0 and gradient(model, loss).abs().max() == 0


def test_negative_rewards_count():
    """Samples below zero stay in the loss, KL included: a constant added to the reward leaves the gradient as it is."""
    model, settings = gaussian(gamma=1.0)
    plain = losses(model, settings, range(8))[0]
    lower = losses(model, settings, range(8), reward=lambda images, prompts: bent(images, prompts) - 100)[0]
    torch.testing.assert_close(lower.value, plain.value + 100)
    torch.testing.assert_close(gradient(model, lower), gradient(model, plain))


def test_the_discount_multiplies_the_reward_only():
    weights = torch.tensor(0.9, dtype=D) ** torch.arange(49, -1, -1, dtype=D)
    assert (float(weights[49]), float(weights[48]), float(weights[0])) == pytest.approx((1, 0.9, 0.005726417), abs=1e-8)
    assert float(weights.mean()) == pytest.approx(0.1989692, abs=5e-8)
    reward, divergence, one = torch.tensor([2.0, 2.0]), torch.tensor([3.0, 3.0]), torch.ones(2)
    assert float(soft_q_loss(reward, divergence, torch.tensor([1.0, 0.5]), 0.1, one)) == pytest.approx(-1.5 + 0.3)
    assert float(torch.tensor(0.0) ** torch.tensor(0.0)) == 1  # gamma = 0 leaves the last step its reward


def test_the_reward_sees_decoded_images_once_mapped():
    """Slope of what is scored in the decoded value: one half inside [-1, 1], zero outside; no second mapping."""

    class Decoding(Shifts):
        def decode(self, x):
            return x.add(1).div(2).clamp(0, 1)

    seen = []

    def reward(images, prompts):
        seen.append(images)
        return images.flatten(1).sum(1)

    settings = SQDFSettings(**CHAIN, alpha_kl=1e-9, gamma=1.0, estimator="consistency", buffer="none")
    plain, mapped = Shifts(), Decoding()
    values = []
    for model in (plain, mapped):
        (loss,) = losses(model, settings, range(64), reward=reward)
        (g,) = torch.autograd.grad(loss.value, model.p)
        values.append(g)
    x0 = seen[0].detach()
    torch.testing.assert_close(seen[1].detach(), x0.add(1).div(2).clamp(0, 1))
    if bool((x0.abs() < 1).all()):
        torch.testing.assert_close(values[1], values[0] / 2)
    inside = x0.flatten().abs() < 1
    rows = Random(0, 1, range(64)).integers("index", 0, T - 1)
    by_hand = torch.zeros(T + 1, dtype=D)
    for k, i in enumerate(rows.tolist()):
        by_hand[T - i] -= SIGMA[T - i] * M[T - i - 1] * 0.5 * float(inside[k]) / 64
    torch.testing.assert_close(values[1], by_hand, atol=1e-9, rtol=0)


# Cost, loop, checkpoint


class Counting(TinyFlow):
    def __init__(self):
        super().__init__()
        self.samples, self.trained, self.decoded = 0, 0, 0

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        evaluated = len(xt) * (1 if guidance == 1 else 2)
        self.samples += evaluated
        self.trained += evaluated * (weights == "policy" and torch.is_grad_enabled())
        return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    def decode(self, latents):
        self.decoded += len(latents)
        return super().decode(latents)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"buffer": "uniform", "rollout_every": 3}, 6),
        ({"buffer": "none"}, 2),
        ({"buffer": "importance"}, 1),
        ({"buffer": "uniform", "estimator": "rollout-2", "rollout_every": 2}, 4),
        ({"guidance": 3.0}, 1),
        ({"estimator_guidance": 3.0, "rollout_every": 2}, 2),
        ({"buffer": "none", "guidance": 3.0}, 2),
    ],
)
def test_calls(settings, steps):
    """A draw from the buffer costs at most a fifth of an update with a full rollout and no buffer."""
    settings = SQDFSettings(rollout_steps=20, final_time=0.02, **{"estimator": "tweedie", "guidance": 1.0, **settings})
    model, algorithm, count = Counting(), SQDF(settings), 5
    for n in range(1, steps + 1):
        ids = torch.arange(count * n, count * (n + 1))
        rng = Random(0, n, ids)
        before = model.samples, model.trained, model.decoded
        list(algorithm.step(model, tiny_reward, Batch(PROMPTS, model.encode_prompts(PROMPTS), ids), rng))
        if settings.buffer == "none":
            walked = rng.integers("index", 0, 19).tolist()
        else:
            walked = [20 if (n - 1) % settings.rollout_every == 0 else 0] * count
        cost = [calls_per_update(settings, walked=w) for w in walked]
        assert model.samples - before[0] == sum(c["forward"] for c in cost)
        assert model.trained - before[1] == sum(c["backward"] for c in cost)
        assert model.decoded - before[2] == sum(c["decode"] for c in cost)
    mean = calls_per_update(settings)
    if settings.buffer != "none":
        assert model.samples / steps / count == pytest.approx(mean["forward"])
        assert model.decoded / steps / count == pytest.approx(mean["decode"])
        full = calls_per_update(dataclasses.replace(settings, buffer="none", rollout_every=1), walked=20)
        assert calls_per_update(settings, walked=0)["forward"] <= full["forward"] / 5
    else:
        assert mean["forward"] == (9.5 + 2) * mean["backward"] + 1 and mean["decode"] == 1


def test_a_buffer_smaller_than_a_batch_is_refused():
    model = TinyFlow()
    with pytest.raises(ValueError, match="buffer_size = 3 is smaller than a batch of 5"):
        losses(model, SQDFSettings(estimator="tweedie", buffer_size=3), range(5), reward=tiny_reward)


@pytest.mark.parametrize("law", ["uniform", "importance"])
def test_resuming_is_bit_identical(tmp_path, law):
    """The buffer, spilled to disk from the first trajectory on, travels in the checkpoint."""

    def go(folder, steps, resume=False):
        model = TinyFlow()
        settings = SQDFSettings(
            rollout_steps=4,
            final_time=0.05,
            guidance=1.0,
            alpha_kl=1e-3,
            estimator="tweedie",
            buffer=law,
            buffer_size=7,
            buffer_memory=0,
            rollout_every=2,
        )
        train(
            model,
            SQDF(settings),
            tiny_reward,
            PROMPTS,
            folder=folder,
            steps=steps,
            batch_size=3,
            lr=1e-3,
            seed=5,
            checkpoint_every=2,
            resume=resume,
            progress=False,
        )
        return model

    whole = go(tmp_path / "whole", 6)
    go(tmp_path / "parts", 3)
    parts = go(tmp_path / "parts", 6, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    rows = []
    for name in ("whole", "parts"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if not k.endswith("_seconds")} for line in lines])
    assert rows[0] == rows[1] and rows[0][-1]["buffer"] == 7


# The consistency model


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()


def say(weights, name):
    generator = torch.Generator().manual_seed(1)
    x, cond = torch.randn(2, 2, 4, 4, generator=generator), torch.randn(2, 3, 8, generator=generator)
    with weights.using(name) as unet:
        return unet(x, torch.tensor([300.0, 700.0]), cond).sample


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A LoRA of rank 3, alpha 6, in diffusers' form and as LCM-LoRAs are published, and the network with it merged."""
    maker = NamedWeights(network(), training="lora", rank=3, alpha=6.0, targets=("to_q", "to_out.0", "conv1"))
    for k, p in enumerate(maker.parameters()):
        p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    own, kohya = (tmp_path_factory.mktemp(name) for name in ("own", "kohya"))
    maker.save(own)
    lora = load_file(own / "pytorch_lora_weights.safetensors")
    names = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
    renamed = {}
    for key, value in lora.items():
        layer, part = key[: -len(".lora_A.weight")], names[key[-len(".lora_A.weight") :]]
        renamed[f"lora_unet_{layer.replace('.', '_')}{part}"] = value
        renamed[f"lora_unet_{layer.replace('.', '_')}.alpha"] = torch.tensor(6.0)
    save_file(renamed, kohya / "pytorch_lora_weights.safetensors")
    merged = network()
    for key, down in lora.items():
        if "lora_A" in key:
            up = lora[key.replace("lora_A", "lora_B")]
            weight = merged.get_submodule(key.removesuffix(".lora_A.weight")).weight
            weight.data += 2.0 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return own, kohya, NamedWeights(merged, training="none", rank=1, alpha=None, targets=())


@pytest.mark.parametrize("training", ["lora", "full", "none"])
@pytest.mark.parametrize("form", [0, 1], ids=["diffusers", "kohya"])
def test_a_lora_speaks_as_the_consistency_model(distilled, training, form):
    weights = NamedWeights(network(), training=training, rank=2, alpha=None, targets=("to_q", "conv2"))
    for k, p in enumerate(weights.parameters()):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + k))
    policy, reference = say(weights, "policy"), say(weights, "reference")
    weights.add_frozen(distilled[form])
    torch.testing.assert_close(say(weights, "consistency"), say(distilled[2], "policy"), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(say(weights, "policy"), policy)
    torch.testing.assert_close(say(weights, "reference"), reference)
    assert weights.parameters("consistency") == []
    if training != "none":
        out = say(weights, "policy")
        frozen = say(weights, "consistency")
        assert not frozen.requires_grad
        out.square().mean().backward()
        assert sum(float(p.grad.abs().sum()) for p in weights.parameters() if p.grad is not None) > 0
        named = weights.networks["consistency"].named_parameters()
        assert all(p.grad is None for key, p in named if ".consistency." in key)
    with pytest.raises(ValueError, match="there already"):
        weights.add_frozen(distilled[form])


def test_a_lora_of_another_network_is_refused(distilled, tmp_path):
    weights = NamedWeights(network(), training="lora", rank=2, alpha=None, targets=("to_q",))
    with pytest.raises(ValueError, match=r"no pytorch_lora_weights.safetensors"):
        weights.add_frozen(tmp_path)
    lora = load_file(distilled[0] / "pytorch_lora_weights.safetensors")
    wider = {key: torch.cat([value, value], -1) for key, value in lora.items()}
    save_file(wider, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="holds a LoRA of another model"):
        weights.add_frozen(tmp_path)
    assert say(weights, "policy").requires_grad


def test_without_a_consistency_model_the_error_says_how_to_get_one(tmp_path):
    with pytest.raises(ValueError, match=r"train_consistency.py.*tweedie"):
        EmojiModel.load_consistency(object.__new__(EmojiModel), tmp_path / "none")


def test_distillation_leaves_a_true_consistency_map_as_it_is():
    """Its loss on the exact map of a Gaussian is the teacher's Euler error squared, of fourth order in the step."""
    sys.path.insert(0, str(ROOT / "tools"))
    tool = pytest.importorskip("train_consistency")

    class Exact(GaussianModel):
        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            if weights == "reference":
                return super().predict(xt, t, cond, guidance=guidance, weights=weights)
            end = flow_schedule(torch.zeros_like(t))
            mean = self.mean + 2.0 * (cond - self.mean)  # of the guided model, guidance 2
            return Prediction(gaussian_ode(xt, mean, self.std, *flow_schedule(t), *end), xt)

    model = Exact(torch.zeros(1, 2, 2, dtype=D), 0.5, means={"a": torch.full((1, 2, 2), 0.4, dtype=D)})
    x0, eps = torch.randn(2, 64, 1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(0)).unbind(0)
    cond, t = model.encode_prompts(["a"] * 64), torch.linspace(0.3, 0.9, 64, dtype=D)
    found = []
    for step in (0.02, 0.01):
        tool.EULER = step
        found.append(float(tool.distil(model, x0, eps, t, cond, 2.0, c=10.0)))  # quadratic this far below c
    assert found[0] / found[1] == pytest.approx(16, rel=0.1)
    truth = model.predict(x0, t, cond).x0
    error = [float((tool.ode(model, x0, t, cond, 2.0, steps) - truth).abs().max()) for steps in (50, 100)]
    assert error[0] / error[1] == pytest.approx(2, rel=0.1) and error[1] < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), [("sqdf-sd15", "stable-diffusion"), ("sqdf-sdxl", "sdxl")])
def test_the_published_recipes_run_on_tiny_networks_of_the_same_classes(tmp_path, name, family):
    """A LoRA stands in for the LCM-LoRA; the recipe finds it, and it speaks in the loss."""
    from support import tiny_families

    teacher = tiny_families.load(family, training="lora")
    for p in teacher.parameters("policy"):
        p.data += 0.1
    teacher.weights.save(tmp_path)
    model, plan = tiny_families.load(family, training="lora"), recipe.read(name, [f"model.consistency={tmp_path}"])
    with pytest.raises(ValueError, match="consistency"):
        model.predict(
            torch.zeros(1, *model.latent_shape),
            torch.full((1,), 0.5),
            model.encode_prompts(["a"]),
            weights="consistency",
        )
    recipe.load_consistency(plan, model)
    settings = dataclasses.replace(plan.algorithm, rollout_steps=2, final_time=0.3, guidance=2.0)
    ids, prompts = torch.arange(2), ["a", "b"]
    batch = Batch(prompts, model.encode_prompts(prompts), ids)
    (loss,) = SQDF(settings).step(model, lambda images, texts: images.mean((1, 2, 3)), batch, Random(0, 1, ids))
    loss.value.backward()
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0
    bare = recipe.read(name, ["model.consistency=null"])
    with pytest.raises(RecipeError, match=r"model.consistency: name the folder of an LCM-LoRA"):
        recipe.check_start(bare)

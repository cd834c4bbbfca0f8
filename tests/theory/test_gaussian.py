"""models/gaussian.py against the formulas it is the ground truth for, each derived another way."""

from __future__ import annotations

import pytest
import torch

from palate.models.gaussian import Decoding, GaussianModel, gaussian_ode, gaussian_prediction
from palate.path import add_noise, flow_schedule, score, vp_schedule

SCHEDULES = {"flow": flow_schedule, "vp": vp_schedule(torch.linspace(0.9999, 0.001, 100, dtype=torch.float64))}
MU = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64).view(1, 2, 2)
T = torch.tensor([0.1, 0.6, 0.97], dtype=torch.float64)


def test_velocity_is_the_closed_form_of_the_flow():
    s, x = 0.6, torch.randn(3, 1, 2, 2, dtype=torch.float64)
    t = T.view(-1, 1, 1, 1)
    pred = gaussian_prediction(x, MU, s, *flow_schedule(T))
    q = (1 - t) ** 2 * s**2 + t**2
    velocity = (t - (1 - t) * s**2) / q * (x - (1 - t) * MU) - MU
    torch.testing.assert_close(pred.eps - pred.x0, velocity, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_score_is_the_gradient_of_the_marginals_log_density(name):
    alpha, sigma = SCHEDULES[name](T)
    s, x = 0.6, torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    marginal = torch.distributions.Normal((alpha * MU).expand_as(x), (alpha**2 * s**2 + sigma**2).sqrt().expand_as(x))
    (expected,) = torch.autograd.grad(marginal.log_prob(x).sum(), x)
    pred = gaussian_prediction(x, MU, s, alpha, sigma)
    torch.testing.assert_close(score(x, pred, alpha, sigma), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(add_noise(*pred, alpha, sigma), x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_prediction_is_the_regression_on_samples(name):
    torch.manual_seed(0)
    n, s = 200_000, 0.6
    alpha, sigma = SCHEDULES[name](torch.tensor([0.6], dtype=torch.float64))
    x0, eps = 0.3 + s * torch.randn(n, 1, 1, 1, dtype=torch.float64), torch.randn(n, 1, 1, 1, dtype=torch.float64)
    xt = add_noise(x0, eps, alpha, sigma)
    pred = gaussian_prediction(xt, torch.tensor(0.3, dtype=torch.float64), s, alpha, sigma)
    for truth, guess in ((x0, pred.x0), (eps, pred.eps)):  # the residual of E[. | xt] has mean 0 against 1 and xt
        for against in (torch.ones_like(xt), xt):
            products = ((truth - guess) * against).flatten()
            assert abs(products.mean()) < 4 * products.std() / n**0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_ode_map_solves_the_ode_and_keeps_the_marginals(name):
    schedule, s = SCHEDULES[name], 0.6
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    a, b = (schedule(torch.tensor([t], dtype=torch.float64)) for t in (0.9, 0.3))
    there = gaussian_ode(x, MU, s, *a, *b)
    torch.testing.assert_close(gaussian_ode(there, MU, s, *b, *a), x, atol=1e-12, rtol=0)
    h = 1e-5  # d x / d t = alpha' x0 + sigma' eps, the derivative that DDIM integrates
    t = torch.tensor([0.605], dtype=torch.float64)
    here, low, high = schedule(t), schedule(t - h), schedule(t + h)
    slope = (gaussian_ode(x, MU, s, *here, *high) - gaussian_ode(x, MU, s, *here, *low)) / (2 * h)
    pred = gaussian_prediction(x, MU, s, *here)
    expected = (high[0] - low[0]) / (2 * h) * pred.x0 + (high[1] - low[1]) / (2 * h) * pred.eps
    torch.testing.assert_close(slope, expected, atol=1e-7, rtol=0)
    if name == "flow":  # from pure noise the map is mu + s eps
        ends = (*flow_schedule(torch.ones(1, dtype=torch.float64)), *flow_schedule(torch.zeros(1, dtype=torch.float64)))
        torch.testing.assert_close(gaussian_ode(x, MU, s, *ends), MU + s * x, atol=1e-12, rtol=0)


def test_guidance_moves_the_mean():
    cat = torch.full_like(MU, 2.0)
    model = GaussianModel(MU, 0.6, means={"cat": cat})
    x, cond = torch.randn(3, 1, 2, 2, dtype=torch.float64), model.encode_prompts(["cat"] * 3)
    conditional, empty = (model.predict(x, T, model.encode_prompts([p] * 3)) for p in ("cat", ""))
    guided = model.predict(x, T, cond, guidance=3.0)
    for c, u, g in zip(conditional, empty, guided, strict=True):
        torch.testing.assert_close(g, u + 3.0 * (c - u), atol=1e-12, rtol=0)
    torch.testing.assert_close(guided.x0, gaussian_prediction(x, MU + 3 * (cat - MU), 0.6, *flow_schedule(T)).x0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_trains_and_what_it_does(name):
    schedule = SCHEDULES[name]
    model = GaussianModel(
        MU, 0.6, schedule=schedule, trains=("mean", "log_std", "velocity", "linear"), networks=("policy", "assistant")
    )
    x, cond = torch.randn(3, 1, 2, 2, dtype=torch.float64), model.encode_prompts([""] * 3)
    truth = model.predict(x, T, cond, weights="reference")
    torch.testing.assert_close(model.predict(x, T, cond).x0, truth.x0)
    mean, log_std, velocity, linear = model.parameters("policy")
    with torch.no_grad():
        mean.add_(0.5), log_std.add_(0.1)
        moved = gaussian_prediction(x, MU + 0.5, 0.6 * torch.tensor(0.1, dtype=torch.float64).exp(), *schedule(T))
        torch.testing.assert_close(model.predict(x, T, cond).x0, moved.x0)
        velocity.add_(0.25), linear.copy_(torch.arange(16.0).view(4, 4))
        pred = model.predict(x, T, cond)
        delta = 0.25 + (x.view(3, 4) @ torch.arange(16.0, dtype=torch.float64).view(4, 4).T).view_as(x)
        torch.testing.assert_close((pred.eps - pred.x0) - (moved.eps - moved.x0), delta)
        torch.testing.assert_close(add_noise(*pred, *schedule(T)), x)
        for weights in ("reference", "assistant"):
            torch.testing.assert_close(model.predict(x, T, cond, weights=weights).x0, truth.x0)
    assert model.parameters("reference") == []
    with pytest.raises(ValueError, match="unknown"):
        model.predict(x, T, cond, weights="teacher")
    with pytest.raises(ValueError, match="names among"):
        GaussianModel(MU, 0.6, trains=("bias",))


def test_decode_is_the_affine_map_and_encode_its_inverse():
    model = GaussianModel(MU, 0.6, decoding=Decoding(0.5, 0.25))
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(model.decode(x), 0.5 * x + 0.25)
    torch.testing.assert_close(model.encode(model.decode(x)), x)

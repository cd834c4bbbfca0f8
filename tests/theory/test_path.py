"""path.py: conversions are inverse to each other, one step is diffusers' step, and a (B,) coefficient cannot pass."""

from __future__ import annotations

import pytest
import torch

from palate.path import (
    add_noise,
    flow_schedule,
    from_eps,
    from_v,
    from_velocity,
    from_x0,
    move,
    score,
    vp_schedule,
)

torch.manual_seed(0)
X0, EPS = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64).unbind(0)
T = torch.tensor([0.05, 0.5, 0.93], dtype=torch.float64)
TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
SCHEDULES = {"flow": flow_schedule, "vp": vp_schedule(TABLE)}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_parametrisation_recovers_the_truth(name):
    alpha, sigma = SCHEDULES[name](T)
    xt = add_noise(X0, EPS, alpha, sigma)
    for pred in (
        from_eps(xt, EPS, alpha, sigma),
        from_x0(xt, X0, alpha, sigma),
        from_v(xt, alpha * EPS - sigma * X0, alpha, sigma),
        from_velocity(xt, EPS - X0, alpha, sigma),
    ):
        torch.testing.assert_close(pred.x0, X0, atol=1e-12, rtol=0)
        torch.testing.assert_close(pred.eps, EPS, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_imperfect_output_still_explains_xt(name):
    alpha, sigma = SCHEDULES[name](T)
    xt, output = add_noise(X0, EPS, alpha, sigma), torch.randn_like(X0)
    for convert in (from_eps, from_x0, from_v, from_velocity):
        pred = convert(xt, output, alpha, sigma)
        torch.testing.assert_close(add_noise(*pred, alpha, sigma), xt, atol=1e-12, rtol=0)
    pred = from_v(xt, output, alpha, sigma)
    if name == "vp":
        torch.testing.assert_close(alpha * pred.eps - sigma * pred.x0, output, atol=1e-12, rtol=0)
    pred = from_velocity(xt, output, alpha, sigma)
    torch.testing.assert_close(pred.eps - pred.x0, output, atol=1e-12, rtol=0)


def test_flow_levels():
    alpha, sigma = flow_schedule(torch.tensor([0.0, 0.25, 1.0]))
    assert alpha.flatten().tolist() == [1.0, 0.75, 0.0] and sigma.flatten().tolist() == [0.0, 0.25, 1.0]


def test_vp_levels_are_the_training_table():
    k = torch.arange(1001, dtype=torch.float64)
    alpha, sigma = vp_schedule(TABLE)(k / 1000)
    alpha, sigma = alpha.flatten(), sigma.flatten()
    assert alpha[0] == 1 and sigma[0] == 0
    torch.testing.assert_close(alpha[1:] ** 2, TABLE, atol=1e-12, rtol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1001, dtype=torch.float64))
    assert (alpha.diff() < 0).all()
    between = vp_schedule(TABLE)(torch.tensor([500.25 / 1000], dtype=torch.float64))[0].item() ** 2
    assert between == pytest.approx(0.75 * TABLE[499].item() + 0.25 * TABLE[500].item(), abs=1e-12)
    single = vp_schedule(TABLE)((k / 1000).float())[0].flatten()
    torch.testing.assert_close(single.double(), alpha, atol=1e-6, rtol=0)


def test_move_takes_the_euler_step_of_a_flow():
    alpha, sigma = flow_schedule(T)
    xt, velocity = torch.randn_like(X0), torch.randn_like(X0)
    for target in (T * 0.3, T * 0.9, (T + 1) / 2):
        euler = xt + (target - T).view(-1, 1, 1, 1) * velocity
        moved = move(from_velocity(xt, velocity, alpha, sigma), *flow_schedule(target))
        torch.testing.assert_close(moved, euler, atol=1e-12, rtol=0)


def test_move_leaves_room_for_the_noise():
    alpha, sigma = flow_schedule(T)
    pred = from_eps(add_noise(X0, EPS, alpha, sigma), EPS, alpha, sigma)
    mean = move(pred, alpha, sigma, 0.6 * sigma)
    torch.testing.assert_close(mean, alpha * X0 + 0.8 * sigma * EPS, atol=1e-12, rtol=0)
    torch.testing.assert_close(move(pred, alpha, sigma, sigma), alpha * X0, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"std .* above sigma"):
        move(pred, alpha, sigma, 1.01 * sigma)
    with pytest.raises(ValueError, match="smaller eta"):
        move(pred, 0.5, 0.5, 0.6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_score_is_minus_eps_over_sigma(name):
    alpha, sigma = SCHEDULES[name](T)
    xt = add_noise(X0, EPS, alpha, sigma)
    torch.testing.assert_close(score(xt, from_x0(xt, X0, alpha, sigma), alpha, sigma), -EPS / sigma)


def test_a_flat_coefficient_is_refused_even_when_it_would_broadcast():
    x, pair = torch.zeros(4, 1, 4, 4), torch.linspace(0.1, 0.9, 4)
    for call in (
        lambda: add_noise(x, x, pair, pair),
        lambda: from_velocity(x, x, pair, pair),
        lambda: move(from_x0(x, x, 0.5, 0.5), pair, pair),
        lambda: move(from_x0(x, x, 0.5, 0.5), 0.5, 0.5, pair),
        lambda: add_noise(x, x, pair.view(1, 1, 1, 4), 0.5),
        lambda: add_noise(x, x, torch.ones(3, 1, 1, 1), 0.5),
    ):
        with pytest.raises(ValueError, match="size 1 in every axis"):
            call()
    with pytest.raises(ValueError, match=r"expected a float tensor \(B,\)"):
        flow_schedule(pair.view(4, 1))
    with pytest.raises(ValueError, match="float tensor"):
        flow_schedule(torch.tensor([3]))
    with pytest.raises(ValueError, match="must fall"):
        vp_schedule(TABLE.flip(0))

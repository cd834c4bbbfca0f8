"""algorithms/distar.py: closed forms of score divergences on Gaussian data, wrong graphs, `step` through autograd.

Fixture A (1-D): x0 = mu + sg z, xt = a x0 + s eps; the reference is N(m, r^2). v, V are the variances of xt under both,
Delta = mu - m. Gradients are pairs (d/dmu, d/dsg), here in score space: the library's x0 space times 1/k, k = s^2 / a.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image

from palate import recipe
from palate.algorithms.distar import (
    PIXART,
    SD15,
    SDXL,
    Distar,
    DistarSettings,
    Generator,
    assistant_loss,
    assistant_rate_bound,
    calls_per_update,
    capped_scale,
    distance_of,
    distar_loss,
    implicit_reward_loss,
    kl_loss,
    normaliser,
    slope_of,
    uniform,
)
from palate.core import Batch, Random
from palate.evaluate import generate
from palate.models import families
from palate.models.gaussian import GaussianModel
from palate.path import Prediction, add_noise, flow_schedule, from_eps, from_v, from_velocity, from_x0, vp_schedule
from palate.train import train

D = torch.float64
A, S, MU, SG, M, R = 0.8, 0.6, 1.0, 0.7, 0.2, 1.3
K = S * S / A  # D - x0-space over score space
v, V, DELTA = A**2 * SG**2 + S**2, A**2 * R**2 + S**2, MU - M


def normal_rule(nodes=121, reach=8.0):
    """Nodes and weights of N(0, 1): the trapezoidal rule, which converges geometrically for analytic functions."""
    x = torch.linspace(-reach, reach, nodes, dtype=D)
    w = torch.exp(-x * x / 2)
    return x, w / w.sum()


GRID, WEIGHT = normal_rule()


def denoiser(mean, variance, a=A, s=S):
    """D(x) = E[x0 | xt] of N(mean, variance), frozen parameters."""
    return lambda x: mean + a * variance / (a * a * variance + s * s) * (x - a * mean)


def expectation(per_sample, mu, sg, a=A, s=S):
    """E over (z, eps) of per_sample(x0, xt), as good as exact; x0, xt (N, 1)."""
    z, eps = torch.meshgrid(GRID, GRID, indexing="ij")
    x0 = (mu + sg * z).reshape(-1, 1)
    return ((WEIGHT[:, None] * WEIGHT).flatten() * per_sample(x0, a * x0 + s * eps.reshape(-1, 1))).sum()


def parameters():
    return torch.tensor(MU, dtype=D, requires_grad=True), torch.tensor(SG, dtype=D, requires_grad=True)


def gradient(per_sample):
    mu, sg = parameters()
    return torch.stack(torch.autograd.grad(expectation(per_sample, mu, sg), (mu, sg))).tolist()


ours, theirs = denoiser(MU, SG**2), denoiser(M, R**2)


def loss_of(distance, *, gradient="paper", c=0.3):
    """Losses in score space: L2 has k^2, the pseudo-Huber distance k (with its constant k c)."""
    power = 2 if distance == "l2" else 1
    options = {"distance": distance, "c": K * c, "weight": K**-power, "gradient": gradient}
    return lambda x0, xt: distar_loss(ours(xt), theirs(xt), x0, **options)


# Distances


@pytest.mark.parametrize(
    "y, c, d, slope",
    [
        ((3.0, 4.0, 0.0), 1.0, 4.0990195136, (0.5883484054, 0.7844645406, 0.0)),
        ((3.0, 4.0, 0.0), 0.1, 4.9009999000, (0.5998800360, 0.7998400480, 0.0)),
        ((0.03, 0.04, 0.0), 1.0, 0.0012492197, (0.0299625702, 0.0399500936, 0.0)),
    ],
)
def test_pseudo_huber(y, c, d, slope):
    y = torch.tensor([y], dtype=D, requires_grad=True)
    value = distance_of(y, "pseudo_huber", c)
    assert float(value) == pytest.approx(d, abs=6e-11)
    assert slope_of(y, "pseudo_huber", c)[0].tolist() == pytest.approx(slope, abs=6e-11)
    torch.testing.assert_close(torch.autograd.grad(value, y)[0], slope_of(y, "pseudo_huber", c))
    torch.testing.assert_close(torch.autograd.grad(distance_of(y, "l2", c), y)[0], slope_of(y, "l2", c))


def test_limits_of_the_distance():
    y = torch.randn(5, 7, dtype=D, generator=torch.Generator().manual_seed(0))
    assert (slope_of(1e3 * y, "pseudo_huber", 0.1).norm(dim=1) < 1).all()
    torch.testing.assert_close(2e4 * distance_of(y, "pseudo_huber", 1e4), distance_of(y, "l2", 1.0), rtol=1e-6, atol=0)
    zero = torch.zeros(2, 3)
    assert not distance_of(zero, "pseudo_huber", 0.1).any() and not slope_of(zero, "pseudo_huber", 0.1).any()


# Golden values


def golden():
    x0 = torch.tensor([[0.5, -1, 0.25, 2], [-0.3, 0.8, 1.1, -0.6]], dtype=D, requires_grad=True)
    eps = torch.tensor([[1, 0.5, -0.5, -1.5], [0.2, -1.2, 0.7, 0.4]], dtype=D)
    xt = 0.8 * x0 + 0.6 * eps
    return x0, eps, xt, 0.9 * xt + 0.1, 0.7 * xt - torch.tensor([0.2, 0, -0.1, 0.3], dtype=D)


@pytest.mark.parametrize(
    "distance, kind, loss, grad",
    [
        (
            "pseudo_huber",
            "paper",
            (0.48430023, -0.31794071),
            ((0.01850077, -0.11686131, 0.03881303, 0.34539463), (0.06894423, 0.21112890, 0.08815550, 0.06328033)),
        ),
        ("l2", "paper", (0.862, -0.460624), ((0.12, -0.208, 0.0656, 0.7088), (0.06112, 0.29408, 0.0912, 0.04224))),
        ("pseudo_huber", "total", (0.87424405, -0.09355407), None),
    ],
)
def test_golden_batch(distance, kind, loss, grad):
    x0, _, _, psi, ref = golden()
    found = distar_loss(psi, ref, x0, distance=distance, c=0.5, gradient=kind)
    assert found.tolist() == pytest.approx(loss, abs=6e-9)
    if grad:
        (g,) = torch.autograd.grad(found.sum(), x0)
        torch.testing.assert_close(g, torch.tensor(grad, dtype=D), atol=6e-9, rtol=0)


def test_golden_kl_and_weights():
    x0, _, xt, psi, ref = golden()
    y = torch.tensor([[0.5, 0, -0.02, 0.54], [0.276, 0.084, 0.26, 0.352]], dtype=D)
    (g,) = torch.autograd.grad(kl_loss(psi, ref, x0).sum(), x0)
    torch.testing.assert_close(g, y)
    each = distar_loss(psi, ref, x0, c=0.5)
    weighted = distar_loss(psi, ref, x0, c=0.5, weight=torch.tensor([2.0, 3.0], dtype=D))
    torch.testing.assert_close(weighted, each * torch.tensor([2.0, 3.0], dtype=D))
    pair = Prediction(psi, xt), Prediction(ref, xt)
    assert torch.equal(distar_loss(*pair, x0, c=0.5), each)
    torch.testing.assert_close(normaliser(x0, ref), 1 / (x0 - ref).abs().mean(1).detach())
    assert not normaliser(x0, ref).requires_grad


@pytest.mark.parametrize("flow", [False, True])
def test_parametrisations_agree(flow):
    """One loss and one gradient for eps, v, velocity, score and x0 networks that say the same."""
    g = torch.Generator().manual_seed(0)
    start, eps = torch.randn(2, 3, 2, 2, 2, dtype=D, generator=g)
    a, s = (0.4, 0.6) if flow else (0.8, 0.6)
    found = []
    for kind in ("x0", "eps", "velocity", *(() if flow else ("v",)), "score"):
        x0 = start.clone().requires_grad_()
        xt = add_noise(x0, eps, a, s)

        def said(clean, kind=kind, xt=xt):
            noise = (xt - a * clean) / s
            return {
                "x0": lambda: from_x0(xt, clean, a, s),
                "eps": lambda: from_eps(xt, noise, a, s),
                "velocity": lambda: from_velocity(xt, noise - clean, a, s),
                "v": lambda: from_v(xt, a * noise - s * clean, a, s),
                "score": lambda: from_x0(xt, (xt + s * s * (a * clean - xt) / s**2) / a, a, s),
            }[kind]()

        loss = distar_loss(said(torch.tanh(xt)), said(0.4 * xt + 0.1), x0, c=0.3)
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), x0)[0]))
    for loss, grad in found[1:]:
        torch.testing.assert_close(loss, found[0][0], atol=1e-10, rtol=0)
        torch.testing.assert_close(grad, found[0][1], atol=1e-10, rtol=0)


# The theorem on Gaussians, and the wrong graphs


@pytest.mark.parametrize(
    "distance, kind, expected",
    [
        ("l2", "paper", (1.0545158, -2.1040221)),
        ("pseudo_huber", "paper", (0.5345114, -0.9371997)),
        ("l2", "total", (0.4927316, -1.5435723)),
        ("pseudo_huber", "total", (0.2497550, -0.6875572)),
    ],
)
def test_theorem_gaussian(distance, kind, expected):
    assert gradient(loss_of(distance, gradient=kind)) == pytest.approx(expected, abs=6e-8)


def test_divergence_values_and_the_loss_that_is_zero():
    for distance, value, power in (("l2", 0.6184308, 2), ("pseudo_huber", 0.4355535, 1)):
        mean = expectation(
            lambda x0, xt, distance=distance, power=power: (
                distance_of(ours(xt) - theirs(xt), distance, 0.3 * K) / K**power
            ),
            MU,
            SG,
        )
        assert float(mean) == pytest.approx(value, abs=6e-8)
        assert abs(float(expectation(loss_of(distance), MU, SG))) < 1e-12


def test_an_assistants_error_shows_in_the_loss():
    """E L = -E[d'(y) . e], and the lags of a mean: values and forces, with the sign flip."""
    for lag, value, force in ((0.1, 0.0772414, 0.6221268), (0.3, 0.0624632, -0.2426514)):
        late = denoiser(MU - lag, SG**2)
        loss = lambda x0, xt, late=late: distar_loss(late(xt), theirs(xt), x0, distance="l2", c=1, weight=K**-2)  # noqa: E731
        assert float(expectation(loss, MU, SG)) == pytest.approx(value, abs=6e-8)
        assert gradient(loss)[0] == pytest.approx(force, abs=6e-8)
        projected = expectation(
            lambda x0, xt, late=late: (
                -((slope_of(late(xt) - theirs(xt), "pseudo_huber", 0.2)) * (late(xt) - ours(xt))).sum(1)
            ),
            MU,
            SG,
        )
        loss = expectation(lambda x0, xt, late=late: distar_loss(late(xt), theirs(xt), x0, c=0.2), MU, SG)
        assert float(loss) == pytest.approx(float(projected), abs=1e-12)


def wrong(name, distance):
    """The library's loss on a graph with one mistake."""
    loss = loss_of(distance)

    def per_sample(x0, xt):
        if name == "x0 detached":
            return loss(x0.detach(), xt)
        k, c = K ** -(2 if distance == "l2" else 1), 0.3 * K
        psi, ref = ours(xt), theirs(xt)
        if name == "y detached":
            return -k * (slope_of((psi - ref).detach(), distance, c) * (psi - x0)).sum(1)
        if name == "normaliser detached":
            y = psi - ref
            return -k * (y / (y.square().sum(1, keepdim=True) + c * c).sqrt().detach() * (psi - x0)).sum(1)
        raise AssertionError(name)

    return per_sample


@pytest.mark.parametrize(
    "name, distance, expected",
    [
        ("y detached", "l2", (1.0545158, -1.0520110)),
        ("y detached", "pseudo_huber", (0.5345114, -0.4685999)),
        ("x0 detached", "l2", (-0.9186, -0.1356)),
        ("normaliser detached", "pseudo_huber", (0.5345114, -1.4060238)),
    ],
)
def test_wrong_graphs_are_told_apart(name, distance, expected):
    """These are what the mistakes would give: `test_theorem_gaussian` fails on each of them."""
    found = gradient(wrong(name, distance))
    assert found == pytest.approx(expected, abs=6e-5 if name == "x0 detached" else 6e-8)
    right = gradient(loss_of(distance))
    assert max(abs(a - b) for a, b in zip(found, right, strict=True)) > 0.4


def test_kl_gradient_and_its_ratio_to_l2():
    kl = gradient(lambda x0, xt: kl_loss(ours(xt), theirs(xt), x0, weight=A / K))
    assert kl == pytest.approx((0.3551609, -0.3543173), abs=6e-8)
    l2 = gradient(loss_of("l2"))
    assert (l2[0] / kl[0], l2[1] / kl[1]) == pytest.approx((2.96912, 5.93824), abs=6e-6)


def test_isotropic_dimensions_add_in_the_scale_and_not_in_the_mean():
    mu, sg = torch.full((3,), MU, dtype=D, requires_grad=True), torch.tensor(SG, dtype=D, requires_grad=True)
    g = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 40_000, 3, dtype=D, generator=g)
    x0 = mu + sg * z
    xt = A * x0 + S * eps
    loss = distar_loss(ours(xt), theirs(xt), x0, distance="l2", c=1, weight=K**-2).mean()
    means, scale = torch.autograd.grad(loss, (mu, sg))
    assert means.tolist() == pytest.approx([1.0545158] * 3, abs=4 * 2.1 / 200)
    assert float(scale) == pytest.approx(3 * -2.1040221, abs=4 * 3.2 * 3**0.5 / 200)


# The theorem where scores are not linear


@pytest.mark.parametrize(
    "distance, kind, expected",
    [
        ("l2", "paper", (1.85906, -1.68763, -0.82549)),
        ("pseudo_huber", "paper", (0.8228, -0.4003, -0.1113)),
        ("l2", "total", (1.37938, -1.47133, -0.66912)),
        ("pseudo_huber", "total", (0.5962, -0.3196, -0.0558)),
    ],
)
def test_theorem_beyond_gaussians(distance, kind, expected):
    """g(z) = .3 + .5 z + .8 tanh 2z against .3 N(-1.5, .16) + .7 N(1, .36), a = .9, s = .5; scores by quadrature.

    The tractable gradient equals the one that differentiates the generator's own score; the listed digits, of a coarser
    quadrature, agree to a thousandth.
    """
    a, s, c, k = 0.9, 0.5, 0.5, 0.25 / 0.9
    z, wz = normal_rule(121, 6.0)
    eps, we = normal_rule(81, 6.0)
    features = torch.stack([torch.ones_like(z), z, torch.tanh(2 * z)])
    theta = torch.tensor([0.3, 0.5, 0.8], dtype=D, requires_grad=True)

    def posterior_mean(x, theta):  # of the generator: its exact assistant
        logits = torch.log(wz) - (x - a * (theta @ features)) ** 2 / (2 * s * s)
        return torch.softmax(logits, 1) @ (theta @ features)[:, None]

    def reference_mean(x):
        mean, var = torch.tensor([-1.5, 1.0], dtype=D), torch.tensor([0.16, 0.36], dtype=D)
        q = a * a * var + s * s
        logits = torch.tensor([0.3, 0.7], dtype=D).log() - q.log() / 2 - (x - a * mean) ** 2 / (2 * q)
        return (torch.softmax(logits, 1) * (mean + a * var / q * (x - a * mean))).sum(1, keepdim=True)

    x0 = (theta @ features)[:, None].expand(-1, len(eps)).reshape(-1, 1)
    xt = a * x0 + s * eps.repeat(len(z))[:, None]
    weights, power = (wz[:, None] * we).flatten(), 2 if distance == "l2" else 1
    loss = distar_loss(
        posterior_mean(xt, theta.detach()),
        reference_mean(xt),
        x0,
        distance=distance,
        c=k * c,
        weight=k**-power,
        gradient=kind,
    )
    (found,) = torch.autograd.grad((weights * loss).sum(), theta, retain_graph=True)
    there = xt if kind == "total" else xt.detach()
    gap = distance_of(posterior_mean(there, theta) - reference_mean(there), distance, k * c) / k**power
    (direct,) = torch.autograd.grad((weights * gap).sum(), theta)
    torch.testing.assert_close(found, direct, atol=1e-7 if distance == "l2" else 2e-4, rtol=0)  # a kink's width is c
    assert found.tolist() == pytest.approx(expected, rel=2e-3)


# Fixed points


def test_equal_networks_push_nowhere_exactly():
    for distance in ("l2", "pseudo_huber"):
        x0 = torch.randn(3, 4, dtype=D, requires_grad=True)
        same = torch.tanh(0.8 * x0 + 0.1)
        loss = distar_loss(same, same, x0, distance=distance, c=0.3)
        assert not loss.any() and not torch.autograd.grad(loss.sum(), x0)[0].any()


def test_matched_distributions_have_no_force():
    same = denoiser(MU, SG**2)
    for distance in ("l2", "pseudo_huber"):
        found = gradient(
            lambda x0, xt, distance=distance: distar_loss(same(xt), same(xt), x0, distance=distance, c=0.3)
        )
        assert found == pytest.approx((0, 0), abs=1e-14)


# Where reward and divergence balance

B = {"a": 0.8, "s": 0.3, "m": 0.2, "r": 1.3}
V_B = B["a"] ** 2 * B["r"] ** 2 + B["s"] ** 2


def force_b(mu, sg, kind, *, reference=0.2, c=0.3):
    """Score-space gradient of the regulariser (w = 1) of N(mu, sg^2) at level (a, s) of B."""
    a, s = B["a"], B["s"]
    k = s * s / a
    psi, ref = denoiser(mu, sg**2, a, s), denoiser(reference, B["r"] ** 2, a, s)
    loss = {
        "l2": lambda x0, xt: distar_loss(psi(xt), ref(xt), x0, distance="l2", c=1, weight=k**-2),
        "total": lambda x0, xt: distar_loss(psi(xt), ref(xt), x0, distance="l2", c=1, weight=k**-2, gradient="total"),
        "kl": lambda x0, xt: kl_loss(psi(xt), ref(xt), x0, weight=a / k),
        "pseudo_huber": lambda x0, xt: distar_loss(psi(xt), ref(xt), x0, c=k * c, weight=1 / k),
    }[kind]
    mu, sg = torch.tensor(mu, dtype=D, requires_grad=True), torch.tensor(sg, dtype=D, requires_grad=True)
    return [float(g) for g in torch.autograd.grad(expectation(loss, mu, sg, a, s), (mu, sg))]


@pytest.mark.parametrize(
    "kind, mean, variance",
    [
        ("l2", 0.749632, 0.960495),
        ("total", 0.828270, 0.945272),
        ("kl", 1.060206, 0.611702),
    ],
)
def test_optimum_under_a_quadratic_reward(kind, mean, variance):
    """alpha r = -.5/2 (x0 - 2)^2; the given optimum has zero total force. variance is that of xt."""
    std = math.sqrt((variance - B["s"] ** 2) / B["a"] ** 2)
    d_mu, d_sg = force_b(mean, std, kind)
    assert d_mu + 0.5 * (mean - 2) == pytest.approx(0, abs=2e-6)
    assert d_sg + 0.5 * std == pytest.approx(0, abs=2e-6)


@pytest.mark.parametrize("alpha, shift", [(0.2, 0.1345882), (0.6, 0.8087087)])
def test_optimum_under_a_linear_reward(alpha, shift):
    d_mu, d_sg = force_b(B["m"] + shift, B["r"], "pseudo_huber")
    assert d_mu == pytest.approx(alpha, abs=2e-7) and d_sg == pytest.approx(0, abs=1e-10)
    for kind, exact in (
        ("l2", alpha * V_B**2 / (2 * 0.64)),
        ("total", alpha * V_B**2 / (2 * 0.64)),
        ("kl", alpha * V_B / 0.64),
    ):
        assert force_b(B["m"] + exact, B["r"], kind)[0] == pytest.approx(alpha, abs=1e-9)


def test_a_large_reward_outruns_the_pseudo_huber_force():
    """It is bounded by w a / V: above alpha b = .6828269 there is no optimum."""
    threshold = B["a"] / V_B
    assert threshold == pytest.approx(0.6828269, abs=5e-8)
    far = force_b(B["m"] + 1e4, B["r"], "pseudo_huber")[0]
    assert far == pytest.approx(threshold, rel=1e-6) and far < threshold


# Guidance inside and outside


def test_guidance_inside_and_outside():
    eta, apart = 3.0, 0.7
    assert force_b(B["m"] + eta * apart, B["r"], "kl", reference=B["m"] + eta * apart)[0] == pytest.approx(0, abs=1e-12)
    a, s = B["a"], B["s"]
    k = s * s / a
    x0 = torch.linspace(-2, 3, 11, dtype=D)[:, None].requires_grad_()
    xt = a * x0 + 0.1
    cond, null = denoiser(B["m"], B["r"] ** 2, a, s)(xt), denoiser(B["m"] - apart, B["r"] ** 2, a, s)(xt)
    moved = denoiser(B["m"] + eta * apart, B["r"] ** 2, a, s)(xt)
    torch.testing.assert_close(cond + eta * (cond - null), moved)  # IN: the reference's mean moves by eta delta_c
    force = torch.autograd.grad(implicit_reward_loss(cond, null, x0, eta, weight=a / k).sum(), x0)[0]
    torch.testing.assert_close(force, torch.full_like(force, -eta * a * a * apart / V_B))
    shift = eta * V_B / 2 * apart  # OUT with L2
    assert shift == pytest.approx(1.230180, abs=1e-9)
    assert force_b(B["m"] + shift, B["r"], "l2")[0] + float(force[0]) == pytest.approx(0, abs=1e-9)
    psi = denoiser(0.5, 0.8, a, s)(xt)
    inside = kl_loss(psi, cond + eta * (cond - null), x0)
    outside = kl_loss(psi, cond, x0) + implicit_reward_loss(cond, null, x0, eta)
    torch.testing.assert_close(inside, outside)


# The assistant


@pytest.mark.parametrize("error", ["eps", "x0", "velocity"])
def test_the_assistants_minimiser_is_the_score(error):
    """Among affine denoisers; in score units slope -1/v, intercept a mu / v."""
    slope, offset = torch.tensor(0.3, dtype=D, requires_grad=True), torch.tensor(0.1, dtype=D, requires_grad=True)

    def loss(x0, xt):
        return assistant_loss(from_x0(xt, slope * xt + offset, A, S), x0, (xt - A * x0) / S, error=error)

    grad = torch.autograd.grad(expectation(loss, MU, SG), (slope, offset), create_graph=True)
    hessian = torch.stack([torch.stack(torch.autograd.grad(g, (slope, offset), retain_graph=True)) for g in grad])
    best = torch.stack([slope, offset]).detach() - torch.linalg.solve(hessian, torch.stack(grad)).detach()
    assert float((A * best[0] - 1) / S**2) == pytest.approx(-1.4845606, abs=6e-8)
    assert float(A * best[1] / S**2) == pytest.approx(1.1876485, abs=6e-8)


def test_two_time_scales_at_equal_width():
    """As a linear system: at v = V no oscillation iff k >= 4 g, which is `assistant_rate_bound`."""

    def changes_of_sign(ratio):
        g, mean, late = 4e-3, 1.0, 0.0  # distance to the optimum, lag of the assistant behind the generator
        signs, steps = 0, 8_000
        for _ in range(steps):
            force = g * (mean - late)  # at v = V: 2 a^2 (Delta - dl) / V^2
            before, mean = mean, mean - force
            late = (late - force) * (1 - ratio * g)
            signs += before * mean < 0
        return signs

    assert changes_of_sign(3.9) >= 1 and changes_of_sign(4.1) == 0
    assert assistant_rate_bound(1e-4, 1) == pytest.approx(4e-4) and assistant_rate_bound(1e-4, 5) == pytest.approx(8e-5)


@pytest.mark.parametrize("lagging, grows", [(0.95, True), (1.05, False)])
def test_an_assistant_slower_than_the_threshold_lets_a_narrow_generator_run_away(lagging, grows):
    """Stable iff k > 4 lr_G w a^2 (V - v) / (v^2 V), the library's own mean force simulated: it is linear in the
    generator's distance from its optimum and in the assistant's lag, so two values of each give it."""

    def force(delta, lag):
        late, reference = denoiser(MU - lag, SG**2), denoiser(MU - delta, R**2)
        return gradient(lambda x0, xt: distar_loss(late(xt), reference(xt), x0, distance="l2", c=1, weight=K**-2))[0]

    lr = 5e-4  # small steps: the law is of the continuous system
    toward, astray = lr * force(1.0, 0.0), -lr * force(0.0, 1.0)
    assert toward == pytest.approx(2 * lr * A**2 / (v * V)) and force(0.0, 0.0) == pytest.approx(0, abs=1e-9)
    k = lagging * 4 * lr * A**2 * (V - v) / (v**2 * V)
    distance, late, sizes = 1.0, 0.0, []
    for step in range(60_000):
        moved = toward * distance - astray * late
        distance, late = distance - moved, (late - moved) * (1 - k)
        if step in (20_000 - 1, 60_000 - 1):
            sizes.append(math.hypot(distance, late))
    assert (sizes[1] > 1.5 * sizes[0]) == grows and (sizes[1] < sizes[0] / 1.5) != grows


# De Bruijn, blindness at low noise


def test_de_bruijn_links_the_l2_divergence_to_kl():
    """VE: integral of 1/2 d(sigma^2) E|s_p - s_q|^2 = KL(N(1, .49) || N(.2, 1.69)) - KL at the end (below 1e-8)."""
    u = torch.linspace(-12, 20, 40_001, dtype=D)  # sigma^2 = e^u
    s2 = u.exp()
    p, q = 0.49 + s2, 1.69 + s2
    square = (0.8 / q) ** 2 + (1 / p - 1 / q) ** 2 * p
    total = torch.trapezoid(0.5 * square * s2, u) + 0.5 * square[0] * s2[0]
    kl = 0.5 * (math.log(1.69 / 0.49) + (0.49 + 0.64) / 1.69 - 1)
    assert float(total) == pytest.approx(0.4533587, abs=2e-7) and kl == pytest.approx(0.4533587, abs=5e-8)
    for sigma2 in (0.04, 1.0):  # the integrand is the library's distance at a = 1, in score units
        s = math.sqrt(sigma2)
        x = 1 + math.sqrt(0.49 + sigma2) * GRID[:, None]
        y = (denoiser(1.0, 0.49, 1.0, s)(x) - denoiser(0.2, 1.69, 1.0, s)(x)) / sigma2
        p, q = 0.49 + sigma2, 1.69 + sigma2
        exact = (0.8 / q) ** 2 + (1 / p - 1 / q) ** 2 * p
        assert float((WEIGHT * distance_of(y, "l2", 1.0)).sum()) == pytest.approx(exact, rel=1e-12)


def test_de_bruijn_on_the_variance_preserving_path():
    """Integral of 1/2 g^2 E|s_p - s_q|^2 over t in [0, 1] with g^2 = beta(t) = .1 + 19.9 t: KL_0 - KL_1 = .4533449, the
    divergence taken from the library's distance in x0 space."""

    def kl(mean, p, q):
        return 0.5 * (math.log(q / p) + (p + mean**2) / q - 1)

    values, ends = [], []
    t = torch.linspace(0, 1, 2001, dtype=D)
    for now in t.tolist():
        beta, log_a = 0.1 + 19.9 * now, -0.25 * 19.9 * now**2 - 0.05 * now
        a, s2 = math.exp(log_a), -math.expm1(2 * log_a)
        p, q = a * a * 0.49 + s2, a * a * 1.69 + s2
        x = a + math.sqrt(p) * GRID[:, None]
        s = math.sqrt(s2)
        if s:
            y = (denoiser(1.0, 0.49, a, s)(x) - denoiser(0.2, 1.69, a, s)(x)) * a / s2
        else:
            y = -(x - 1.0) / 0.49 + (x - 0.2) / 1.69
        values.append(0.5 * beta * float((WEIGHT * distance_of(y, "l2", 1.0)).sum()))
        ends.append(kl(0.8 * a, p, q))
    whole = (
        (t[1] - t[0])
        / 3
        * (torch.tensor(values, dtype=D) * torch.tensor([1.0] + [4.0, 2.0] * 999 + [4.0, 1.0], dtype=D)).sum()
    )  # Simpson's rule
    assert float(whole) == pytest.approx(0.4533449, abs=6e-8)
    assert ends[0] - ends[-1] == pytest.approx(0.4533449, abs=6e-8) and ends[0] == pytest.approx(0.4533587, abs=6e-8)


def two_modes(x, sigma, weight):
    """D(x) and log density of weight N(4, 1) + (1 - weight) N(-4, 1), noised by sigma (a = 1)."""
    q = 1 + sigma * sigma
    means = torch.tensor([4.0, -4.0], dtype=x.dtype)
    logits = torch.stack([weight, 1 - weight]).log() - (x[..., None] - means) ** 2 / (2 * q)
    post = torch.softmax(logits, -1)
    clean = (post * (means + (x[..., None] - means) / q)).sum(-1)
    return clean, torch.logsumexp(logits, -1) - 0.5 * math.log(2 * math.pi * q)


def test_low_noise_is_blind_to_a_dropped_mode():
    for sigma, kl, square in (
        (0.0, 0.693, 1.57e-3),
        (1.0, 0.687, 2.87e-2),
        (2.0, 0.598, 7.05e-2),
        (4.0, 0.323, 2.59e-2),
        (8.0, 0.110, 3.02e-3),
    ):
        q = 1 + sigma * sigma
        x = torch.linspace(4 - 12 * math.sqrt(q), 4 + 12 * math.sqrt(q), 20_001, dtype=D)
        reach = torch.tensor(0.5, dtype=D)
        tiny = max(sigma, 1e-3)
        clean, log_q = two_modes(x, tiny, reach)
        p = torch.exp(-((x - 4) ** 2) / (2 * q)) / math.sqrt(2 * math.pi * q)
        log_p = -((x - 4) ** 2) / (2 * q) - 0.5 * math.log(2 * math.pi * q)
        assert float(torch.trapezoid(p * (log_p - log_q), x)) == pytest.approx(kl, abs=6e-4)
        y = (denoiser(4.0, 1.0, 1.0, tiny)(x) - clean) / tiny**2
        assert float(torch.trapezoid(p * y * y, x)) == pytest.approx(square, rel=4e-3)


@pytest.mark.parametrize("t, recovers", [((0.05, 0.95), True), ((0.02, 0.2), False)])
def test_a_dropped_mode_returns_only_through_high_noise(t, recovers):
    """A generator of one parameter, a switch between modes at 4 and -4, starts at .97 where the reference has .5.

    Flow levels, an exact assistant, the library's loss in x0 space.
    """
    std, n = 0.5, 121
    z, wz = normal_rule(n, 3.5)
    bias = torch.tensor(1.9, dtype=D, requires_grad=True)  # a switch at z = -bias: P(z > -1.9) = .97
    levels = torch.linspace(*t, 6, dtype=D)
    nodes, we = normal_rule(9, 3.0)

    def draw(b):
        return 4 * torch.tanh(6 * (z + b)) + std * z / 3

    def mean_of(x, samples, weights, a, s):
        return torch.softmax(weights.log() - (x[:, None] - a * samples) ** 2 / (2 * s * s), 1) @ samples

    reference = draw(torch.tensor(0.0, dtype=D))
    optimizer = torch.optim.Adam([bias], lr=0.1)
    for _ in range(60):
        x0, frozen, total = draw(bias), draw(bias.detach()), 0.0
        for level in levels:
            a, s = 1 - float(level), float(level)
            x = x0[:, None].expand(-1, len(nodes)).reshape(-1)
            xt = a * x + s * nodes.repeat(n)
            psi, ref = mean_of(xt, frozen, wz, a, s), mean_of(xt, reference, wz, a, s)
            loss = distar_loss(psi[:, None], ref[:, None], x[:, None], c=0.1)
            total = total + ((wz[:, None] * we).flatten() * loss).sum() / len(levels)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    share = float(wz[draw(bias.detach()) > 0].sum())
    assert (abs(share - 0.5) < 0.1) if recovers else (share > 0.9), share


# The generators


TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=D) ** 2, 0)


def test_presets_stand_at_their_published_levels():
    vp, linear = vp_schedule(TABLE), vp_schedule(torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=D), 0))
    level = lambda schedule, t: [float(x) for x in schedule(torch.tensor([t], dtype=D))]  # noqa: E731
    assert level(vp, SDXL.t_init) == pytest.approx((0.652753, 0.757571), abs=6e-7) and SDXL.input_scale == 1.0
    alpha, sigma = level(vp, SD15.t_init)
    assert (alpha, sigma, sigma / alpha) == pytest.approx((0.371173, 0.928564, 2.5017), abs=6e-5)
    alpha, sigma = level(linear, PIXART.t_init)
    ratios = [level(linear, (label + 1) / 1000) for label in (439, 440, 441)]
    nearest = min(ratios, key=lambda pair: abs(pair[1] / pair[0] - 2.5))
    assert nearest == [alpha, sigma] and PIXART.input_scale == pytest.approx(sigma, abs=2e-3)
    assert float(flow_schedule(torch.tensor([Generator().t_init]))[1]) / (1 - 0.714) == pytest.approx(2.5, abs=0.01)


class Eps:
    """A network that predicts noise as 0.1 xt + cond, over a VP table; counts its calls."""

    latent_shape = (4, 2, 2)

    def __init__(self, schedule):
        self.schedule, self.said = schedule, []

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        self.said.append((xt, float(t[0]), weights, guidance))
        return from_eps(xt, 0.1 * xt + cond, *self.schedule(t))


@pytest.mark.parametrize(
    "preset, label",
    [
        (SDXL, 399),
        (SD15, 625),
        (Generator(t_init=0.4, input_scale=0.7), 399),
    ],
)
def test_one_step_equals_the_lcm_scheduler(preset, label):
    """Its boundary scalings at these labels are negligible."""
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(timesteps=[label])
    noise, cond = torch.randn(2, 3, 4, 2, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    model = Eps(vp_schedule(TABLE))
    ours = preset(model, cond, [noise])
    x = (preset.input_scale or float(model.schedule(torch.tensor([preset.t_init], dtype=D))[1])) * noise
    theirs = scheduler.step(0.1 * x + cond, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert model.said[0][1:] == (pytest.approx((label + 1) / 1000), "policy", 1.0)


def test_several_steps_renoise_at_falling_levels_and_only_the_last_has_gradient():
    noises = torch.randn(3, 2, 4, 2, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    cond = torch.zeros(2, 4, 2, 2, dtype=D, requires_grad=True)
    model, generator = Eps(flow_schedule), Generator(t_init=0.9, steps=3)
    x0 = generator(model, cond, list(noises))
    assert [said[1] for said in model.said] == pytest.approx([0.9, 0.6, 0.3])
    expected = 0.0
    for (xt, t, *_), noise in zip(model.said, noises, strict=True):
        torch.testing.assert_close(xt, (1 - t) * expected + t * noise)
        expected = (xt - t * (0.1 * xt + cond.detach())) / (1 - t)
    torch.testing.assert_close(x0.detach(), expected)
    (grad,) = torch.autograd.grad(x0.sum(), cond)
    torch.testing.assert_close(grad, torch.full_like(grad, -0.3 / 0.7))
    with pytest.raises(ValueError, match="expected 1 to 3"):
        generator(model, cond, [*list(noises), noises[0]])


# `step`


class Watched(GaussianModel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.decodes = [], 0

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        trainable = any(p.requires_grad for p in self.parameters(weights))
        self.calls.append((weights, torch.is_grad_enabled(), xt.requires_grad, guidance, trainable))
        return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    def decode(self, latents):
        self.decodes += 1
        return super().decode(latents)


def network(dtype=D, trains=("mean", "log_std"), means=None):
    mean, names = torch.full((3, 2, 2), 0.2, dtype=dtype), ("policy", "assistant")
    return Watched(mean, 0.8, trains=trains, networks=names, means=means)


def bright(images, prompts):
    return images.mean((1, 2, 3))


def run(model, settings=None, *, reward=bright, step=1, ids=(0, 1), algorithm=None, update=None, **changes):
    """The losses of one step, backward after each; `update(name)` is called where train.py would step."""
    settings = settings or DistarSettings(**{"generator": Generator(t_init=0.6), "c": 0.1, **changes})
    algorithm = algorithm or Distar(settings)
    prompts = ["cat"] * len(ids)
    losses = []
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(ids))
    for loss in algorithm.step(model, reward, batch, Random(0, step, ids)):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
        if update:
            update(loss.update)
    return losses


def test_each_phase_reaches_its_own_parameters_and_no_others():
    model, seen = network(), []

    def grads(name):
        found = {who: [p.grad for p in model.parameters(who)] for who in ("policy", "assistant")}
        seen.append(name)
        own = found.pop(name)
        assert all(g is not None and g.abs().sum() > 0 for g in own)
        assert all(g is None for g in found.popitem()[1])
        for p in model.parameters(name):
            p.data.sub_(0.1 * p.grad)
            p.grad = None

    run(model, update=grads, assistant_steps=2)
    assert seen == ["assistant", "assistant", "policy"]
    assert all(p.requires_grad for who in ("policy", "assistant") for p in model.parameters(who))


def move_assistant(model):
    with torch.no_grad():
        for p in model.parameters("assistant"):
            p.add_(0.3)
        for p in model.parameters("policy"):
            p.sub_(0.2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distance": "l2", "gradient": "total"},
        {"divergence": "kl"},
        {"alpha_cfg": 2.0},
        {"alpha_cfg": 2.0, "cfg": "out"},
        {"weight": "normalised", "distance": "l2"},
    ],
    ids=["paper", "total", "kl", "in", "out", "normalised"],
)
def test_the_leaf_gives_the_direct_gradient_and_the_calls_are_the_formula(settings):
    """One graph from theta through both networks, decode and reward, against the forces collected on x0."""
    model = network(means={"cat": torch.full((3, 2, 2), 0.7, dtype=D)})
    move_assistant(model)
    s = DistarSettings(generator=Generator(t_init=0.6), c=0.1, reward_scale=0.4, **settings)
    losses = run(model, s)
    ours = [p.grad for p in model.parameters("policy")]
    expected = calls_per_update(s)
    assert (len(model.calls), model.decodes) == (expected["predict"], expected["decode"])
    rng, cond = Random(0, 1, (0, 1)), model.encode_prompts(["cat"] * 2)
    for p in model.parameters("assistant"):
        p.requires_grad_(False)
    x0 = s.generator(model, cond, [rng.normal("generator-z-0", (3, 2, 2)).double()])
    t = uniform(s.t_generator, rng.uniform("generator-t"))
    xt = add_noise(x0, rng.normal("generator-eps", (3, 2, 2)).double(), *model.schedule(t))
    psi, plain = (model.predict(xt, t, cond, weights=w).x0 for w in ("assistant", "reference"))
    null = model.predict(xt, t, model.encode_prompts([""] * 2), weights="reference").x0
    ref = plain + s.alpha_cfg * (plain - null) if s.cfg == "in" else plain
    if s.weight == "normalised":
        weight = 1 / (x0 - ref).detach().abs().mean((1, 2, 3))
        loss = -weight * (2 * (psi - ref) * (psi - x0)).sum((1, 2, 3))
    elif s.divergence == "kl":
        loss = ((psi - ref).detach() * x0).sum((1, 2, 3))
    else:
        loss = distar_loss(psi, ref, x0, distance=s.distance, c=0.1, gradient=s.gradient)
    if s.cfg == "out":
        loss = loss - s.alpha_cfg * ((plain - null).detach() * x0).sum((1, 2, 3))
    total = loss.mean() - 0.4 * bright(model.decode(x0), None).mean()
    direct = torch.autograd.grad(total, model.parameters("policy"))
    for a, b in zip(ours, direct, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(losses[-1].value.detach(), total.detach(), atol=1e-12, rtol=0)


def test_which_calls_carry_gradient():
    model = network()
    run(model)
    assert [call[:3] for call in model.calls] == [
        ("policy", False, False),
        ("assistant", True, False),  # the assistant's phase: images without gradient
        ("policy", True, False),
        ("assistant", True, True),
        ("reference", True, True),
    ]
    assert all(call[3] == 1.0 for call in model.calls)
    assert [call[4] for call in model.calls] == [True, True, True, False, False]  # the assistant frozen at last
    model = network()
    run(model, divergence="kl", alpha_cfg=1.0, cfg="out")
    assert [call[:2] for call in model.calls[3:]] == [("assistant", False), ("reference", False), ("reference", False)]


def test_the_assistant_learns_alone_at_first():
    """It is what a generator that was trained before needs: its images are not the reference's."""
    settings = DistarSettings(generator=Generator(t_init=0.6), c=0.1, assistant_steps=2, assistant_warmup_steps=3)
    for step, names in ((1, ["assistant"] * 2), (3, ["assistant"] * 2), (4, ["assistant"] * 2 + ["policy"])):
        model = network()
        assert [loss.update for loss in run(model, settings, step=step)] == names
        expected = calls_per_update(settings, assistant_alone=step <= 3)
        assert (len(model.calls), model.decodes) == (expected["predict"], expected["decode"])
    with pytest.raises(ValueError, match="assistant_warmup_steps: at least 0"):
        DistarSettings(assistant_warmup_steps=-1)


def test_a_generator_of_several_steps_is_trained_at_a_random_one():
    """The depth is drawn for each phase; the average number of calls is the formula's."""
    generator, counts = Generator(t_init=0.9, steps=3), []
    for step in range(1, 41):
        model = network()
        run(model, step=step, generator=generator)
        rng = Random(0, step, (0, 1))
        depths = [rng.shared_integer(f"{phase}-depth", 1, 3) for phase in ("assistant-0", "generator")]
        assert [call[:2] for call in model.calls] == [
            *[("policy", False)] * depths[0],
            ("assistant", True),
            *[("policy", False)] * (depths[1] - 1),
            ("policy", True),
            ("assistant", True),
            ("reference", True),
        ]
        counts.append(len(model.calls))
    expected = calls_per_update(DistarSettings(generator=generator))["predict"]
    assert expected == 7 and sum(counts) / len(counts) == pytest.approx(expected, abs=0.6)  # 3.3 standard errors


def first_push(model, **changes):
    """Metrics of a generator phase with the assistant still equal to the reference."""
    algorithm = Distar(DistarSettings(**{"generator": Generator(t_init=0.6), "c": 0.1, **changes}))
    batch = Batch(["cat"] * 2, model.encode_prompts(["cat"] * 2), torch.arange(2))
    value, metrics = algorithm._generator_phase(model, bright, batch, Random(0, 1, range(2)))
    return torch.autograd.grad(value, model.parameters("policy")), metrics


def test_an_assistant_equal_to_the_reference_leaves_only_the_reward():
    grads, metrics = first_push(network(), reward_scale=0.0)
    assert float(metrics["divergence"]) == 0 == float(metrics["force_divergence"])
    assert not any(g.any() for g in grads)
    grads, metrics = first_push(network(), reward_scale=2.0)
    model = network()
    z = Random(0, 1, (0, 1)).normal("generator-z-0", (3, 2, 2)).double()
    x0 = Generator(t_init=0.6)(model, model.encode_prompts(["cat"] * 2), [z])
    expected = torch.autograd.grad(-2 * bright(model.decode(x0), None).mean(), model.parameters("policy"))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)
    prompted = network(means={"cat": torch.full((3, 2, 2), 0.7, dtype=D)})
    _, metrics = first_push(prompted, alpha_cfg=2.0, reward_scale=0.0)
    assert float(metrics["gap"]) > 0.01  # guidance inside: the target is not the reference


def test_with_guidance_inside_the_start_is_not_a_fixed_point():
    """Assistant = reference: y = -alpha_cfg (D_c - D_0), so the gap is its square; without guidance it is 0 exactly."""
    model = network(means={"cat": torch.full((3, 2, 2), 0.7, dtype=D)})
    s = DistarSettings(generator=Generator(t_init=0.6), c=0.1, reward_scale=0.0, alpha_cfg=2.0)
    gap = run(model, s)[-1].metrics["gap"]
    assert (
        run(network(means={"cat": torch.full((3, 2, 2), 0.7, dtype=D)}), dataclasses.replace(s, alpha_cfg=0.0))[
            -1
        ].metrics["gap"]
        == 0
    )
    rng, cond = Random(0, 1, (0, 1)), model.encode_prompts(["cat"] * 2)
    with torch.no_grad():
        x0 = s.generator(model, cond, [rng.normal("generator-z-0", (3, 2, 2)).double()])
        t = uniform(s.t_generator, rng.uniform("generator-t"))
        xt = add_noise(x0, rng.normal("generator-eps", (3, 2, 2)).double(), *model.schedule(t))
        plain = model.predict(xt, t, cond, weights="reference").x0
        y = -2.0 * (plain - model.predict(xt, t, model.encode_prompts([""] * 2), weights="reference").x0)
    torch.testing.assert_close(gap, y.square().flatten(1).sum(1).mean(), atol=1e-12, rtol=0)
    assert gap > 0.01


def test_the_reward_waits_for_distillation_and_its_force_is_capped():
    model = network()
    for step, on in ((1, False), (2, False), (3, True)):
        metrics = run(model, step=step, reward_start_step=2)[-1].metrics
        assert ("reward" in metrics) == on and model.decodes == (step == 3)
    assert calls_per_update(DistarSettings(), distilling=True)["decode"] == 0
    model = network()
    move_assistant(model)
    pull, push = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert capped_scale(pull, push, 0.5).flatten().tolist() == pytest.approx([0.1, 1.0])
    assert capped_scale(pull, push, None).flatten().tolist() == [1.0, 1.0]
    gradients = []
    for scale in (1e3, 1e5):  # past the cap the size of the reward's force does not matter
        for p in model.parameters("policy"):
            p.grad = None
        metrics = run(model, reward_scale=scale, reward_cap=0.5)[-1].metrics
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters("policy")]))
    torch.testing.assert_close(*gradients)
    assert 0 < float(metrics["reward_share"]) < 1e-3
    assert float(metrics["force_reward"] * metrics["reward_share"]) == pytest.approx(
        0.5 * float(metrics["force_divergence"]), rel=0.5
    )


def test_the_assistants_lag_is_noticed():
    rates = {"policy": 1e-4, "assistant": 4e-4}
    algorithm = Distar(DistarSettings())
    assert algorithm.lag == 0.0 and algorithm.warnings(rates) == []
    assert "is below 0.0004" in algorithm.warnings({"policy": 1e-4, "assistant": 3e-4})[0]
    for _ in range(100):
        algorithm._follow(0.6, 1.0)
    algorithm._follow(math.nan, 1.0)
    assert algorithm.lag == pytest.approx(0.6) and "lags behind" in algorithm.warnings(rates)[0]
    again = Distar(DistarSettings())
    again.load_state_dict(algorithm.state_dict())
    assert again.lag == algorithm.lag and again.updates == 100


@pytest.mark.parametrize("moved, lag", [(0.5, 0.0), (0.25, 1.0)])
def test_the_lag_is_the_assistants_error_over_the_divergence(moved, lag):
    """The generator draws the reference moved by .5; the assistant knows the reference moved by `moved`."""
    model, ids = network(), range(256)
    with torch.no_grad():
        model.parameters("assistant")[0].add_(moved)
    algorithm = Distar(DistarSettings(c=0.1, distance="l2"))
    batch = Batch(["cat"] * 256, model.encode_prompts(["cat"] * 256), torch.arange(256))
    for step in range(1, 4):
        x0 = 0.7 + 0.8 * torch.randn(256, 3, 2, 2, dtype=D, generator=torch.Generator().manual_seed(step))
        algorithm._divergence(model, batch, Random(0, step, ids), x0.requires_grad_())
    assert algorithm.lag == pytest.approx(lag, abs=0.2)


def test_bad_input_is_told():
    for wrong, match in (
        ({"c": 0.0}, "expected c: above 0"),
        ({"c": -1.0}, "got c = -1.0"),
        ({"t_generator": (0.5, 0.5)}, "t_generator"),
        ({"t_assistant": (0.0, 0.5)}, "t_assistant"),
        ({"assistant_steps": 0}, "assistant_steps: at least 1"),
        ({"divergence": "fisher"}, "'distar' or 'kl'"),
        ({"divergence": "kl", "gradient": "total"}, "one gradient"),
        ({"reward_cap": 0.0}, "reward_cap"),
        ({"reward_scale": -1.0}, "reward_scale = -1.0"),
        ({"alpha_cfg": -1.0}, "alpha_cfg = -1.0"),
    ):
        with pytest.raises(ValueError, match=match):
            DistarSettings(**wrong)
    for wrong, match in (({"t_init": 0.0}, "t_init"), ({"steps": 0}, "steps"), ({"input_scale": 0.0}, "input_scale")):
        with pytest.raises(ValueError, match=match):
            Generator(**wrong)
    with pytest.raises(ValueError, match="not differentiable"):
        run(network(), reward=lambda images, prompts: images.detach().mean((1, 2, 3)))
    for call, match in (
        (lambda: distar_loss(*torch.ones(3, 1, 2), c=0.0), "c = 0.0"),
        (lambda: distar_loss(*torch.ones(3, 1, 2), c=1.0, gradient="half"), "expected paper or total"),
        (lambda: distar_loss(*torch.ones(3, 1, 2), c=1.0, distance="l1"), "pseudo_huber or l2"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert not dataclasses.replace(DistarSettings(), reward_scale=0.0).reward_scale


# In the loop


def trained(folder, steps, *, resume=False, **changes):
    model = network(torch.float32, trains=("mean", "velocity"))
    settings = DistarSettings(generator=Generator(t_init=0.6), c=0.1, reward_scale=0.2, assistant_steps=2)
    options = {"batch_size": 4, "lr": 1e-3, "lrs": {"assistant": 4e-3}, "weight_decay": 0.0, "clip_norm": 0.0}
    train(
        model,
        Distar(settings),
        bright,
        ["cat", "dog", "cow"],
        folder=folder,
        steps=steps,
        resume=resume,
        progress=False,
        **{**options, **changes},
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    return model, [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in steps]


def test_resume_continues_both_optimizers_and_the_running_means_bit_for_bit(tmp_path):
    whole, rows = trained(tmp_path / "whole", 5, ema_decay=0.9)
    trained(tmp_path / "parts", 2, ema_decay=0.9)
    parts, again = trained(tmp_path / "parts", 5, resume=True, ema_decay=0.9)
    assert again == rows and len(rows) == 5
    for name in ("policy", "assistant"):
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(name), parts.parameters(name), strict=True))
    assert rows[-1]["assistant_lag"] != 0.0


def test_every_name_has_its_own_learning_rate(tmp_path):
    """Adam's first step is the learning rate in every element, its second at most sqrt(2) times that."""
    model, rows = trained(tmp_path, 1, betas=(0.0, 0.999))
    assert (rows[0]["lr"], rows[0]["lr_assistant"]) == (1e-3, 4e-3)
    for name, low, high in (("policy", 0.99e-3, 1.01e-3), ("assistant", 4e-3, (1 + 2**0.5) * 4.04e-3)):
        assert low <= model.parameters(name)[1].abs().max() <= high
    with pytest.raises(ValueError, match=r"trainer.lrs.critic: the algorithm trains policy, assistant"):
        trained(tmp_path / "other", 1, lrs={"critic": 1e-3})
    with pytest.raises(ValueError, match="draws as it was trained"):
        trained(tmp_path / "other", 1, sample_steps=4)


def test_recipes_name_their_mistakes():
    plan = recipe.read("distar-emoji")
    assert plan.algorithm.generator == Generator(t_init=0.714) and plan.trainer.lrs == {"assistant": 2e-4}
    assert recipe.parse(recipe.dump(plan)) == plan
    for override, match in (
        ("trainer.lrs.asistant=1e-4", "did you mean trainer.lrs.assistant?"),
        ("algorithm.c=0", "expected c: above 0"),
        ("algorithm.generator.t_int=0.5", "did you mean algorithm.generator.t_init?"),
        ("algorithm.generator.t_init=2", "t_init: above 0 and at most 1"),
        ("trainer.lrs.assistant=-1", "greater than 0"),
    ):
        with pytest.raises(recipe.RecipeError, match=re.escape(match)):
            recipe.read("distar-emoji", [override])
    for name, preset in (("distar-sd15", SD15), ("distar-sdxl", SDXL), ("distar-pixart", PIXART)):
        ours = recipe.read(name).algorithm.generator
        assert ours.t_init == preset.t_init and ours.input_scale == pytest.approx(preset.input_scale, abs=1e-6)


def test_previews_and_evaluation_draw_as_the_generator_does(tmp_path):
    """K evaluations without guidance, the first from the noise that every other sampler starts from."""
    model, generator = network(torch.float32), Generator(t_init=0.8, steps=2)
    images = generate(model, ["cat", "dog"], [3, 4], steps=9, guidance=7.0, sampler=generator, batch_size=3)
    assert [call[0] for call in model.calls] == ["policy"] * 4 and all(call[3] == 1.0 for call in model.calls)
    rows = [Random(s, 0, [i]) for i in range(2) for s in (3, 4)]
    noises = [torch.cat([row.normal(purpose, (3, 2, 2)) for row in rows]) for purpose in ("evaluate", "evaluate-1")]
    torch.testing.assert_close(images, generator(model, model.encode_prompts(["cat"] * 4), noises).detach())
    result, _ = trained(tmp_path, 2, preview_every=1, preview_prompts=2)
    shown = generate(result, ["cat", "dog"], [0], sampler=Generator(t_init=0.6)).clamp(0, 1)
    for i in (0, 1):
        file = Image.open(tmp_path / f"samples/step-000002/{i:04d}.png")
        torch.testing.assert_close(to_tensor(file), shown[i], atol=0.51 / 255, rtol=0)
    for step in (0, 1, 2):
        lines = (tmp_path / f"samples/step-{step:06d}/index.jsonl").read_text().splitlines()
        index = [json.loads(line) for line in lines]
        assert {(row["steps"], row["guidance"]) for row in index} == {(1, 1.0)} and len(index) == 2


def to_tensor(image):
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255


def test_the_guard_draws_as_the_generator_does(tmp_path, monkeypatch):
    from palate.train import guard

    asked = []
    monkeypatch.setattr(families.Family, "load_class", lambda self: object)  # the judges are asked about any model
    monkeypatch.setattr(guard, "embedded_panel", lambda: None)
    monkeypatch.setattr(
        guard,
        "measure_for_guard",
        lambda model, words, ids, **how: asked.append(how["sampler"]) or {"concept": 1.0},
    )
    trained(tmp_path, 1, guard=recipe.GuardSettings(every=1, action="warn"))
    assert asked == [Generator(t_init=0.6)] * 2


def test_control_words_are_refused_and_the_run_goes_on(tmp_path, monkeypatch):
    """Diff-Instruct* has no words to change."""
    plain = Distar.step

    def step(self, model, reward, batch, rng):
        (tmp_path / "control.json").write_text('{"positive": ["3d"], "negative": null}')
        yield from plain(self, model, reward, batch, rng)

    monkeypatch.setattr(Distar, "step", step)
    assert len(trained(tmp_path, 2)[1]) == 2


@pytest.mark.parametrize(
    "name, family",
    [
        ("distar-sd15", "stable-diffusion"),
        ("distar-sdxl", "sdxl"),
        ("distar-pixart", "pixart-alpha"),
    ],
)
def test_the_published_recipes_run_on_tiny_networks_of_the_same_classes(tmp_path, name, family):
    from support import tiny_families

    plan = recipe.read(name)
    model = tiny_families.load(family, names=Distar.trains, training=plan.model.weights)
    before = {who: [p.detach().clone() for p in model.parameters(who)] for who in Distar.trains}
    train(
        model,
        Distar(plan.algorithm),
        bright,
        ["a", "b"],
        folder=tmp_path,
        steps=2,
        batch_size=1,
        lr=1e-3,
        lrs={"assistant": 1e-3},
        progress=False,
    )
    for who, old in before.items():
        assert any(not torch.equal(p, q) for p, q in zip(model.parameters(who), old, strict=True))

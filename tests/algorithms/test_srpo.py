"""algorithms/srpo.py: closed forms of Direct-Align, the released program's index map, `step` through autograd."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from palate.algorithms.srpo import (
    SRPO,
    SRPOSettings,
    between,
    calls_per_update,
    gain,
    preference_loss,
    recover,
    released_levels,
    released_reach,
    released_sigmas,
    window_levels,
)
from palate.core import Batch, Random
from palate.models.gaussian import GaussianModel, gaussian_prediction
from palate.path import add_noise, flow_schedule, from_eps, from_v, from_velocity, vp_schedule
from palate.sampling import sample

D = torch.float64
VP = vp_schedule(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=D) ** 2, 0))
DENOISE, INVERSION = (0.878486, 0.857036), (0.835586, 0.857036)  # the HPS script at m0 = 500
HPS = SRPOSettings(
    levels="released",
    noise="rollout",
    positive=("Natural-lighting", "Detail", "Detailed", "Real"),
    negative=("Concept art", "Painting", "Anime", "Flat", "Oil"),
    k_denoise=(0.1, 0.25),
    k_inversion=(0.3, 0.01),
    hinge=0.7,
    guidance=3.5,
)
ROUND_DENOISE, ROUND_INVERSION = (0.8785, 0.8570), (0.8356, 0.8570)  # four digits, worked out by hand


def level(t, schedule=flow_schedule):
    return schedule(torch.tensor([t], dtype=D))


def latents(seed=0, n=2):
    return torch.randn(n, 3, 1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(seed)).unbind(0)


# Recover


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_recovery_is_exact_for_a_perfect_prediction(schedule):
    x0, eps = latents()
    for start in (0.999, 0.9, 0.5, 0.1):
        for end in (0.9, 0.6, 0.3, 0.0):
            (a, s), target = level(start, schedule), level(end, schedule)
            xs = add_noise(x0, eps, a, s)
            velocity, v = eps - x0, a * eps - s * x0
            for pred in (from_velocity(xs, velocity, a, s), from_v(xs, v, a, s), from_eps(xs, eps, a, s)):
                torch.testing.assert_close(recover(pred, eps, *target), x0, atol=1e-12, rtol=0)


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_an_error_comes_out_times_the_gain(schedule):
    x0, eps, delta = latents(n=3)
    for start, end in (DENOISE, INVERSION, (0.5, 0.2)):
        here, there = level(start, schedule), level(end, schedule)
        pred = from_velocity(add_noise(x0, eps, *here), eps - x0 + delta, *here)
        g = gain(*here, *there)
        torch.testing.assert_close(recover(pred, eps, *there) - x0, -g * delta, atol=1e-12, rtol=0)
        assert (g > 0) == (start > end)
    assert float(gain(*level(DENOISE[0]), *level(DENOISE[1]))) == pytest.approx(0.150038, abs=2e-6)
    assert float(gain(*level(INVERSION[0]), *level(INVERSION[1]))) == pytest.approx(-0.150038, abs=2e-6)


def test_limits():
    x0, eps, v = latents(n=3)
    here = level(0.6)
    xs = add_noise(x0, eps, *here)
    v.requires_grad_()
    same = recover(from_velocity(xs, v, *here), eps, *here)  # end = start: x0 whatever the network says
    torch.testing.assert_close(same.detach(), x0, atol=1e-12, rtol=0)
    (grad,) = torch.autograd.grad(same.square().sum(), v)
    assert grad.abs().max() < 1e-15
    refl = recover(from_velocity(xs, v, *here), torch.randn_like(eps), *level(0.0))  # end = 0: ReFL, eps is not used
    torch.testing.assert_close(refl, xs - 0.6 * v)


def test_parametrisations():
    x0, eps, delta = latents(n=3)
    (a, s), (a_e, s_e) = level(0.878486), level(0.857036)
    xs = add_noise(x0, eps, a, s)
    velocity = eps - x0 + delta
    linear = (xs + (s_e - s) * velocity - s_e * eps) / a_e  # (5) with the velocity in place of the noise
    torch.testing.assert_close(recover(from_velocity(xs, velocity, a, s), eps, a_e, s_e), linear, atol=1e-12, rtol=0)
    eps_theta = xs + (1 - s) * velocity  # (a) the DDIM step of the noise prediction
    torch.testing.assert_close(recover(from_eps(xs, eps_theta, a, s), eps, a_e, s_e), linear, atol=1e-11, rtol=0)
    paper = (xs - (s - s_e) * eps_theta - s_e * eps) / a  # (b) eq. 5
    torch.testing.assert_close(paper, x0 - (s - s_e) * delta, atol=1e-12, rtol=0)
    torch.testing.assert_close((linear - x0) / (paper - x0), (1 / (1 - s_e)).expand_as(x0))
    a, a_e = 0.6, math.sqrt(0.51)  # (c) variance preserving, sigma .8 -> .7, perfect noise
    xs = a * x0 + 0.8 * eps
    naive = (xs + (0.7 - 0.8) * eps - 0.7 * eps) / a_e
    torch.testing.assert_close(naive, 0.8401680504 * x0, atol=1e-9, rtol=0)
    torch.testing.assert_close(recover(from_eps(xs, eps, a, 0.8), eps, a_e, 0.7), x0, atol=1e-12, rtol=0)


def test_vp_gain_in_noise_units_is_a_difference_of_noise_to_signal_ratios():
    x0, eps, delta = latents(n=3)
    (a, s), (a_e, s_e) = level(0.7, VP), level(0.5, VP)
    pred = from_eps(add_noise(x0, eps, a, s), eps + delta, a, s)
    torch.testing.assert_close(recover(pred, eps, a_e, s_e), x0 - (s / a - s_e / a_e) * delta, atol=1e-12, rtol=0)


# Bias of the injected noise


@pytest.mark.parametrize(
    "start, end, mse",
    [
        (*ROUND_DENOISE, 0.010472),
        (*ROUND_INVERSION, 0.011388),
        (0.5, 0.2, 0.148897),
    ],
)
def test_fresh_noise_is_unbiased_on_gaussian_data(start, end, mse):
    n, s = 200_000, 0.6
    x0, eps = torch.randn(2, n, 1, 1, 1, dtype=D, generator=torch.Generator().manual_seed(0))
    x0 = 0.3 + s * x0
    here, there = level(start), level(end)
    xs = add_noise(x0, eps, *here)
    error = (recover(gaussian_prediction(xs, torch.tensor(0.3, dtype=D), s, *here), eps, *there) - x0).flatten()
    q = (1 - start) ** 2 * s**2 + start**2
    exact = float(gain(*here, *there)) ** 2 * s**2 / q
    assert exact == pytest.approx(mse, abs=5e-7)
    assert abs(error.square().mean() / exact - 1) < 4 * math.sqrt(2 / n)
    assert abs(error.mean()) < 4 * math.sqrt(exact / n)
    assert abs((error * xs.flatten()).mean()) < 4 * math.sqrt(exact * (q + (1 - start) ** 2 * 0.09) / n)


@pytest.mark.parametrize(
    "s, levels, factor",
    [
        (0.6, ROUND_DENOISE, 0.506479),
        (0.6, ROUND_INVERSION, 0.693469),
        (1.0, ROUND_DENOISE, 0.855294),
        (1.0, ROUND_INVERSION, 1.138497),
    ],
)
def test_the_rollouts_own_noise_is_biased(s, levels, factor):
    """The ODE maps eps to s eps, and recovery returns `factor` eps in its place (mu = 0)."""
    eps = torch.randn(4, 1, 2, 2, dtype=D)
    here, there = level(levels[0]), level(levels[1])
    xs = add_noise(s * eps, eps, *here)
    x0hat = recover(gaussian_prediction(xs, torch.zeros((), dtype=D), s, *here), eps, *there)
    torch.testing.assert_close(x0hat, factor * eps, atol=5e-6, rtol=0)
    half = add_noise(0.6 * eps, eps, *level(0.5))
    torch.testing.assert_close(half**2, 0.64 * eps**2)  # variance .64 where the marginal has .34


@pytest.mark.parametrize("noise", ["fresh", "rollout"])
def test_step_errs_independently_of_the_noised_latent_only_with_fresh_noise(noise):
    n, noised, recovered = 4000, [], []

    class Watched(GaussianModel):
        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            noised.append(xt)
            return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    def reward(images, prompts):
        recovered.append(images.detach())
        return images.mean((1, 2, 3))

    model = Watched(torch.zeros(1, 2, 2, dtype=D), 0.6)
    settings = SRPOSettings(noise=noise, branches=("denoise",), rollout_steps=200, window=(0.5, 0.9), step=0.05)
    batch = Batch(["cat"] * n, model.encode_prompts(["cat"] * n), torch.arange(n))
    list(SRPO(settings).step(model, reward, batch, Random(0, 1, range(n))))
    x0 = sample(model, batch.cond, noised[0], 200, shift=3.0)
    error, xs = (recovered[0] - x0).flatten().detach(), noised[200].flatten()
    correlation = float((error * xs).mean() / (error.std() * xs.std()))
    if noise == "fresh":  # 200 Euler steps leave the data's contrast 1 % short, hence the small allowance
        assert abs(correlation) < 4 / math.sqrt(4 * n) + 0.01
    else:  # x0, xs and the error are multiples of the same noise
        assert correlation < -0.9


# Gradients through `step`

CP, CN = latents(seed=7, n=2)
CP, CN = CP[0], CN[0]


class Linear:
    """R(x, p) = <x, C(p)>, with C+ for prompts that start with "good", C- with "bad"."""

    def __init__(self, cp=CP, cn=CN):
        self.texts, self.calls = {"good": cp, "bad": cn}, []

    def image_features(self, images):
        self.calls.append("image")
        return images

    def score(self, features, prompts):
        self.calls.append("text")
        return (features * torch.stack([self.texts[p.split(".")[0]] for p in prompts])).sum((1, 2, 3))

    def __call__(self, images, prompts):
        return self.score(self.image_features(images), prompts)


def settings_of(**changes):
    return SRPOSettings(**({"positive": ("good",), "negative": ("bad",), "rollout_steps": 3} | changes))


def run(
    settings, reward=None, *, trains=("velocity",), ids=(0,), step=1, schedule=flow_schedule, offline=False, model=None
):
    """One update's gradients, the losses, and what was drawn."""
    model = model or GaussianModel(torch.full((1, 2, 2), 0.2, dtype=D), 0.6, schedule=schedule, trains=trains)
    for p in model.parameters():
        p.grad = None
    prompts = ["cat"] * len(ids)
    real = Random(9, 0, ids).normal("real", (1, 2, 2)).double() if offline else None
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(ids), real)
    losses = []
    for loss in SRPO(settings).step(model, reward or Linear(), batch, Random(0, step, ids)):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
    return [p.grad for p in model.parameters()], losses, model


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("ks", [((0.0, 0.0), (0.0, 0.0)), ((0.1, 0.25), (0.3, 0.01))])
def test_gradient_of_a_linear_reward(schedule, ks):
    settings = settings_of(k_denoise=ks[0], k_inversion=ks[1], window=(0.4, 0.8), step=0.1)
    (grad,), _, _ = run(settings, schedule=schedule)
    u = Random(0, 1, [0]).uniform("level-0")
    d, i = window_levels(settings, "denoise", u), window_levels(settings, "inversion", u)
    gd = abs(gain(*schedule(d.start), *schedule(d.end)))
    gi = abs(gain(*schedule(i.start), *schedule(i.end)))
    kd, ki = between(ks[0], d.position), between(ks[1], i.position)
    # minus the formula for L = -r: raising r_d moves v by -g C, lowering it raises the loss
    expected = 0.5 * (gd * ((1 + kd) * CP - CN) - gi * ((1 + ki) * CN - CP))
    torch.testing.assert_close(grad, expected[0], atol=1e-12, rtol=0)


def test_gradient_with_equal_gains_is_the_summed_formula():
    """Released levels at m0 = 500 have |g_d| = |g_i| = g: (g/G) [(2 + lam) C+ - (2 + lam') C-]."""
    reward = Linear()

    class Fixed(Random):
        def integers(self, purpose, low, high):
            assert (low, high) == (5, 995)
            return torch.tensor([500])

    settings = dataclasses.replace(HPS, positive=("good",), negative=("bad",), rollout_steps=3, hinge=None)
    model = GaussianModel(torch.full((1, 2, 2), 0.2, dtype=D), 0.6)
    batch = Batch(["cat"], model.encode_prompts(["cat"]), torch.tensor([0]))
    for loss in SRPO(settings).step(model, reward, batch, Fixed(0, 1, [0])):
        loss.value.backward()
    lam, lam_i, g = 0.1 + 0.15 * 500 / 999, 0.3 - 0.29 * 400 / 999, 0.02145002 / (1 - 0.8570356)
    expected = g / 2 * ((2 + lam) * CP - (2 + lam_i) * CN)
    torch.testing.assert_close(model.parameters()[0].grad, expected, atol=2e-6, rtol=0)
    assert reward.calls == ["image", "text", "text"] * 2


def test_gradient_of_a_linear_map_is_the_outer_product_with_the_noised_latent():
    settings = settings_of(window=(0.4, 0.8), step=0.1, branches=("denoise",), noise="rollout")
    (grad,), _, model = run(settings, trains=("linear",))
    eps = Random(0, 1, [0]).normal("rollout", (1, 2, 2)).double()
    x0 = sample(model, model.encode_prompts(["cat"]), eps, 3, shift=3.0)
    levels = window_levels(settings, "denoise", Random(0, 1, [0]).uniform("level-0"))
    xs = add_noise(x0, eps, *flow_schedule(levels.start)).detach()
    g = gain(*flow_schedule(levels.start), *flow_schedule(levels.end))
    expected = torch.outer((g * (CP - CN)).flatten(), xs.flatten())
    torch.testing.assert_close(grad, expected, atol=1e-12, rtol=0)


def test_gradient_of_a_quadratic_reward():
    """r = -|x0hat - y|^2 / 2 under v + b: dr/db = g (x0hat - y)."""
    y, seen = torch.full((1, 2, 2), 3.0, dtype=D), []

    def reward(images, prompts):
        seen.append(images.detach())
        return -0.5 * (images - y).square().sum((1, 2, 3))

    settings = settings_of(preference="absolute", branches=("denoise",), window=(0.4, 0.8), step=0.1)
    (grad,), losses, _ = run(settings, reward)
    g = losses[0].metrics["gain_denoise"]
    torch.testing.assert_close(grad, -g * (seen[0] - y)[0], atol=1e-12, rtol=0)


def test_training_raises_the_preferred_mean_in_both_branches_alone_and_together():
    """Both branches push the data mean the same way; without the swap the inversion branch would undo it."""
    for branches in (("denoise",), ("inversion",), ("denoise", "inversion")):
        for preference in ("relative", "absolute"):
            settings = settings_of(branches=branches, preference=preference)
            (grad,), _, model = run(settings, Linear(torch.ones(1, 2, 2, dtype=D), -torch.ones(1, 2, 2, dtype=D)))
            noise = torch.randn(4, 1, 2, 2, dtype=D)
            cond = model.encode_prompts(["cat"] * 4)
            before = sample(model, cond, noise, 8).mean()
            with torch.no_grad():
                model.parameters()[0].sub_(0.1 * grad)
            assert float(sample(model, cond, noise, 8).mean()) > float(before)


def test_identical_words_leave_only_k():
    same = Linear(CP, CP)
    (grad,), losses, _ = run(settings_of(window=(0.4, 0.8), step=0.1, n=2), same)
    assert torch.equal(grad, torch.zeros_like(grad))
    assert all(float(loss.value.detach()) == 0 for loss in losses)
    settings = settings_of(levels="released", noise="rollout", k_denoise=(0.4, 0.4), k_inversion=(0.1, 0.1))
    (grad,), losses, _ = run(settings, same)
    gd = abs(losses[0].metrics["gain_denoise"])
    gi = abs(losses[1].metrics["gain_inversion"])
    torch.testing.assert_close(grad, (0.5 * (gd * 0.4 - gi * 0.1) * CP), atol=1e-12, rtol=0)


def test_a_cosine_reward_pushes_along_the_sphere():
    text = torch.nn.functional.normalize(CP.flatten(), dim=0)
    x = torch.randn(4, dtype=D, requires_grad=True)
    f = x / x.norm()
    (grad,) = torch.autograd.grad(f @ text, x)
    torch.testing.assert_close(grad, (text - (f @ text) * f) / x.norm())
    assert abs(float(grad @ x.detach())) < 1e-12


def test_hinge_closes_exactly_at_its_threshold():
    r = torch.tensor([0.1, 0.7, 0.9, 0.69], dtype=D, requires_grad=True)
    (grad,) = torch.autograd.grad(preference_loss(r, torch.ones(4, dtype=D), 0.7), r)
    assert grad.tolist() == [-0.25, 0.0, 0.0, -0.25]
    (linear,) = torch.autograd.grad(preference_loss(r, torch.tensor([1.0, 2.0, 0.5, 0.0]), None), r)
    assert linear.tolist() == [-0.25, -0.5, -0.125, 0.0]
    huge = Linear(1e6 * CP, -1e6 * CP)
    values = [float(loss.value.detach()) for loss in run(settings_of(hinge=0.7), huge)[1]]
    assert all(v >= 0 for v in values)
    (off,), _, _ = run(settings_of(hinge=-1e9), huge)
    assert torch.equal(off, torch.zeros_like(off))


def test_discount_multiplies_the_loss():
    base = run(settings_of(branches=("denoise",)))
    scaled = run(settings_of(branches=("denoise",), discount=(0.0, 1.0)))
    u = Random(0, 1, [0]).uniform("level-0")
    position = window_levels(settings_of(), "denoise", u).position
    torch.testing.assert_close(scaled[0][0], base[0][0] * position, atol=1e-12, rtol=0)


def test_nothing_but_the_policys_one_call_carries_gradient():
    calls = []

    class Watched(GaussianModel):
        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            calls.append((weights, torch.is_grad_enabled(), xt.requires_grad, guidance))
            return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    model = Watched(torch.zeros(1, 2, 2, dtype=D), 0.6)
    run(
        settings_of(reference_penalty=1.0, rollout_guidance=2.0, guidance=3.5, rollout_weights="reference"), model=model
    )
    assert (
        calls
        == [("reference", False, False, 2.0)] * 3 + [("reference", False, False, 3.5), ("policy", True, False, 3.5)] * 2
    )


# The released program's levels


def test_released_table():
    sigmas = released_sigmas(HPS)
    assert len(sigmas) == 1000 and bool((sigmas.diff() < 0).all())
    assert float(sigmas[0]) == pytest.approx(0.964286, abs=5e-7) and float(sigmas[-1]) == pytest.approx(0.75, abs=1e-12)
    pick = released_sigmas(dataclasses.replace(HPS, train_timestep=(5, 30)))
    assert float(pick[-1]) == pytest.approx(0.666667, abs=5e-7)
    assert float(sigmas[0] - sigmas[100]) == pytest.approx(0.021450, abs=5e-7)
    assert float(pick[0] - pick[100]) == pytest.approx(0.029792, abs=5e-7)
    table = {  # m0: sigma_s, sigma_e, g of the denoise branch, then of the inversion branch
        5: (0.7519, 0.7509, 0.0043, 0.7500, 0.7511, 0.0043),
        100: (0.7927, 0.7712, 0.0938, 0.7500, 0.7715, 0.0939),
        500: (0.8785, 0.8570, 0.1500, 0.8356, 0.8570, 0.1500),
        900: (0.9643, 0.9428, 0.3752, 0.9214, 0.9428, 0.3752),
        995: (0.9643, 0.9632, 0.0292, 0.9621, 0.9632, 0.0292),
    }
    m0 = torch.tensor(list(table))
    got = []
    for branch in ("denoise", "inversion"):
        levels = released_levels(HPS, branch, m0)
        g = gain(*flow_schedule(levels.start), *flow_schedule(levels.end))
        got += [levels.start, levels.end, g.flatten().abs()]
    torch.testing.assert_close(torch.stack(got, 1), torch.tensor(list(table.values()), dtype=D), atol=5.1e-5, rtol=0)
    index = {
        "denoise": [(990, 995), (800, 900), (400, 500), (0, 100), (0, 5)],
        "inversion": [(999, 994), (999, 899), (600, 500), (200, 100), (10, 5)],
    }
    for branch, pairs in index.items():
        levels = released_levels(HPS, branch, m0)
        for row, (start, end) in enumerate(pairs):
            assert levels.start[row] == sigmas[start] and levels.end[row] == sigmas[end]


def test_released_reach_keeps_the_rounding_of_the_program():
    for ratio, n, reach in ((0.9, 1000, 100), (0.9, 100, 10), (0.6, 100, 41), (0.9, 50, 5)):
        assert released_reach(dataclasses.replace(HPS, groundtruth_ratio=ratio, timestep_length=n)) == reach


def test_released_coefficients_and_truncated_time():
    m0 = torch.tensor([500])
    denoise, inversion = (released_levels(HPS, b, m0) for b in ("denoise", "inversion"))
    assert float(between(HPS.k_denoise, denoise.position)) == pytest.approx(0.175075, abs=5e-7)
    assert float(between(HPS.k_inversion, inversion.position)) == pytest.approx(0.183884, abs=5e-7)
    assert float(denoise.timestep) == 0.878 and float(inversion.timestep) == 0.835
    m0 = torch.arange(5, 996)
    denoise, inversion = (released_levels(HPS, b, m0) for b in ("denoise", "inversion"))
    assert torch.equal(denoise.end == inversion.end, m0 > 100)
    net = between(HPS.k_denoise, denoise.position) - between(HPS.k_inversion, inversion.position)
    assert abs(float(net[520 - 5])) < 1e-12  # the net absolute weight is a penalty below m0 = 520
    assert bool((net[: 520 - 5] < 0).all()) and bool((net[521 - 5 :] > 0).all())
    assert float(denoise.end[520 - 5]) == pytest.approx(0.8613, abs=5e-5)


def test_the_truncated_time_reaches_the_network_but_not_the_recovery():
    told = []

    class Watched(GaussianModel):
        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            told.append(t)
            velocity = torch.full_like(xt, 0.3) + 0 * self.parameters()[0]
            return from_velocity(xt, velocity, *self.schedule(t))

    model, seen = Watched(torch.zeros(1, 2, 2, dtype=D), 0.6), []

    def reward(images, prompts):
        seen.append(images.detach())
        return images.sum((1, 2, 3))

    settings = dataclasses.replace(HPS, rollout_steps=2, branches=("denoise",))
    run(settings, reward, model=model)
    eps = Random(0, 1, [0]).normal("rollout", (1, 2, 2)).double()
    x0 = eps - 0.3
    levels = released_levels(settings, "denoise", Random(0, 1, [0]).integers("level", 5, 995))
    s, e = levels.start, levels.end
    torch.testing.assert_close(told[-1], torch.floor(1000 * s) / 1000)
    xs = (1 - s) * x0 + s * eps
    torch.testing.assert_close(seen[0], (xs + (e - s) * 0.3 - e * eps) / (1 - e), atol=1e-12, rtol=0)


# The book-keeping of `step`


def test_words_rotate_as_in_the_program():
    algorithm = SRPO(HPS)
    assert algorithm.words(1) == ("Detail", "Painting") and algorithm.words(19) == ("Real", "Oil")
    pairs = [algorithm.words(i) for i in range(40)]
    assert pairs[:20] == pairs[20:] and len(set(pairs[:20])) == 20
    assert SRPO(dataclasses.replace(HPS, word_offset=1)).words(0) == ("Detail", "Painting")
    spoken = []

    def reward(images, prompts):
        spoken.append(prompts[0])
        return images.mean((1, 2, 3))

    run(dataclasses.replace(HPS, rollout_steps=1), reward, step=19)
    assert spoken == ["Real. cat", "Oil. cat"] * 2


def test_accumulation_semantics_of_the_program():
    released = dataclasses.replace(HPS, positive=("good",), negative=("bad",), rollout_steps=3, hinge=None)
    two, _, _ = run(released)
    four, losses, _ = run(dataclasses.replace(released, n=2))
    torch.testing.assert_close(four[0], two[0], atol=1e-14, rtol=0)
    assert [loss.update for loss in losses] == [None, None, None, "policy"]
    one, losses, _ = run(dataclasses.replace(released, branches=("inversion",)))
    _, both, _ = run(released)
    assert len(losses) == 1 and "reward_inversion" in losses[0].metrics
    assert losses[0].metrics["reward_inversion"] == both[1].metrics["reward_inversion"]
    denoise, _, _ = run(dataclasses.replace(released, branches=("denoise",)))
    torch.testing.assert_close(two[0], (one[0] + denoise[0]) / 2, atol=1e-14, rtol=0)


def test_injections_have_their_own_noise_and_levels():
    _, losses, _ = run(settings_of(n=3, window=(0.1, 0.9), step=0.05))
    ends = [float(loss.metrics["sigma_e_denoise"]) for loss in losses[::2]]
    assert len(set(ends)) == 3
    for denoise, inversion in zip(losses[::2], losses[1::2], strict=True):
        assert float(denoise.metrics["sigma_e_denoise"]) == pytest.approx(float(inversion.metrics["sigma_e_inversion"]))
        step = float(denoise.metrics["sigma_s_denoise"]) - float(denoise.metrics["sigma_e_denoise"])
        assert step == pytest.approx(0.05)
        step = float(inversion.metrics["sigma_e_inversion"]) - float(inversion.metrics["sigma_s_inversion"])
        assert step == pytest.approx(0.05)


def test_every_level_lies_in_the_window():
    settings = settings_of(window=(0.3, 1.0), step=0.2)
    u = torch.linspace(0, 1, 101, dtype=D)
    for branch in ("denoise", "inversion"):
        levels = window_levels(settings, branch, u)
        for t in (levels.start, levels.end):
            assert float(t.min()) >= 0.3 - 1e-12 and float(t.max()) <= 1 + 1e-12
        assert float(levels.position.min()) >= -1e-12 and float(levels.position.max()) <= 1


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
@pytest.mark.parametrize("noise, levels", [("fresh", "window"), ("rollout", "released")])
def test_a_batch_is_the_mean_of_its_samples(noise, levels, offline):
    settings = settings_of(
        noise=noise, levels=levels, n=2, k_denoise=(0.1, 0.3), discount=(0.2, 1.0), reference_penalty=0.5
    )
    model = GaussianModel(torch.full((1, 2, 2), 0.2, dtype=D), 0.6)
    with torch.no_grad():
        model.parameters()[0].add_(0.3)
    whole, _, _ = run(settings, ids=(4, 8, 11), model=model, offline=offline)
    singles = [run(settings, ids=(i,), model=model, offline=offline)[0][0] for i in (4, 8, 11)]
    torch.testing.assert_close(whole[0], torch.stack(singles).mean(0), atol=1e-12, rtol=0)


def test_shared_noise_gives_every_sample_the_same_rollout():
    seen = []

    class Watched(GaussianModel):
        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            seen.append(xt)
            return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    run(settings_of(shared_noise=True), ids=(1, 2), model=Watched(torch.zeros(1, 2, 2, dtype=D), 0.6))
    assert torch.equal(seen[0][0], seen[0][1])
    run(settings_of(), ids=(1, 2), model=Watched(torch.zeros(1, 2, 2, dtype=D), 0.6))
    assert not torch.equal(seen[5][0], seen[5][1])


def test_offline_uses_the_real_latents_with_fresh_noise():
    settings = settings_of(noise="rollout", branches=("denoise",), window=(0.4, 0.8), step=0.1, reference_penalty=0.0)
    calls, seen = [], []

    class Perfect(GaussianModel):  # its x0 is the real latent, so that recovery must return it whatever the noise
        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            calls.append(xt)
            real = Random(9, 0, [3]).normal("real", (1, 2, 2)).double()
            a, s = self.schedule(t)
            return from_eps(xt, (xt - a * real) / s + 0 * self.parameters()[0], a, s)

    def reward(images, prompts):
        seen.append(images.detach())
        return images.mean((1, 2, 3))

    run(settings, reward, ids=(3,), model=Perfect(torch.zeros(1, 2, 2, dtype=D), 0.6), offline=True)
    real = Random(9, 0, [3]).normal("real", (1, 2, 2)).double()
    assert len(calls) == 1
    torch.testing.assert_close(seen[0], real, atol=1e-12, rtol=0)
    t = window_levels(settings, "denoise", Random(0, 1, [3]).uniform("level-0")).start
    eps = Random(0, 1, [3]).normal("inject-0", (1, 2, 2)).double()
    torch.testing.assert_close(calls[0], add_noise(real, eps, *flow_schedule(t)), atol=1e-12, rtol=0)


def test_the_reference_penalty_is_the_distance_of_the_two_predictions_and_pulls_back():
    model = GaussianModel(torch.zeros(1, 2, 2, dtype=D), 0.6)
    with torch.no_grad():
        model.parameters()[0].add_(0.3)
    still = Linear(CP, CP)  # no reward gradient at all
    settings = settings_of(reference_penalty=2.0, branches=("denoise",))
    (grad,), losses, _ = run(settings, still, model=model)
    sigma = float(losses[0].metrics["sigma_s_denoise"])
    assert float(losses[0].metrics["reference_distance_denoise"]) == pytest.approx((sigma * 0.3) ** 2, abs=1e-12)
    torch.testing.assert_close(grad, torch.full_like(grad, 2.0 * 2 * sigma**2 * 0.3 / 4), atol=1e-12, rtol=0)
    base, _, _ = run(settings, still)
    assert torch.equal(base[0], torch.zeros_like(base[0]))  # at the reference itself there is no pull


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("changes", [{}, {"n": 3}, {"branches": ("denoise",)}, {"reference_penalty": 1.0, "n": 2}])
def test_calls_are_exactly_the_formula(changes, offline):
    counts = {"predict": 0, "decode": 0}

    class Counted(GaussianModel):
        def predict(self, *args, **options):
            counts["predict"] += 1
            return super().predict(*args, **options)

        def decode(self, latents):
            counts["decode"] += 1
            return super().decode(latents)

    settings, reward = settings_of(**changes), Linear()
    _, losses, _ = run(settings, reward, ids=(0, 1), model=Counted(torch.zeros(1, 2, 2, dtype=D), 0.6), offline=offline)
    towers = {"image_towers": reward.calls.count("image"), "scores": reward.calls.count("text")}
    counts |= towers | {"backward": len(losses)}
    assert counts == calls_per_update(settings, offline=offline)


def test_steering_takes_effect_at_the_next_step_and_is_saved():
    algorithm = SRPO(settings_of(n=2, rollout_steps=1))
    model, spoken = GaussianModel(torch.zeros(1, 2, 2, dtype=D), 0.6), []

    def reward(images, prompts):
        spoken.append(prompts[0])
        return images.mean((1, 2, 3))

    batch = Batch(["cat"], model.encode_prompts(["cat"]), torch.tensor([0]))
    for i, _ in enumerate(algorithm.step(model, reward, batch, Random(0, 1, [0]))):
        if i == 0:
            algorithm.steer(["3d", " glossy "], None)
    assert spoken == ["good. cat", "bad. cat"] * 4
    assert algorithm.words(2) == ("3d", "bad") and algorithm.words(3) == ("glossy", "bad")
    assert algorithm.control_texts("cat") == {"positive": ["3d. cat", "glossy. cat"], "negative": ["bad. cat"]}
    copy = SRPO(settings_of())
    copy.load_state_dict(algorithm.state_dict())
    assert copy.words(3) == ("glossy", "bad")
    assert copy.state_dict() == {"positive": ["3d", "glossy"], "negative": ["bad"]}
    with pytest.raises(ValueError, match="expected a list"):
        algorithm.steer("3d", None)
    with pytest.raises(ValueError, match="negative control words"):
        algorithm.steer(["good"], [])
    with pytest.raises(ValueError, match="both be 3d, glossy, so neither is preferred"):
        algorithm.steer(None, ["glossy", "3d"])
    assert algorithm.words(3) == ("glossy", "bad")  # a refused change changes nothing


def test_metrics_say_what_happened():
    _, losses, _ = run(settings_of(window=(0.4, 0.8), step=0.1))
    metrics = losses[0].metrics
    assert float(metrics["reward_denoise"]) == pytest.approx(
        float(metrics["positive_denoise"] - metrics["negative_denoise"])
    )
    assert float(losses[1].metrics["reward_inversion"]) == pytest.approx(
        float(losses[1].metrics["negative_inversion"] - losses[1].metrics["positive_inversion"])
    )
    assert float(losses[0].value.detach()) == pytest.approx(-0.5 * float(metrics["reward_denoise"]))
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"branches": ()}, "branches"),
        ({"branches": ("denoise", "denoise")}, "each once"),
        ({"n": 0}, "at least 1"),
        ({"window": (0.9, 0.5)}, "low < high"),
        ({"step": 0.2}, "half of the window"),
        ({"noise": "own"}, "fresh"),
        ({"positive": "3d"}, "expected a list"),
        ({"negative": ()}, "one or more words"),
        ({"template": "{prompt}"}, "control"),
        ({"preference": "absolute", "k_denoise": (0.1, 0.2)}, "no k"),
        ({"train_timestep": (25, 5)}, "a < b"),
        ({"reference_penalty": -1.0}, "at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SRPOSettings(**changes)


@pytest.mark.parametrize("branch", ["denoise", "inversion"])
def test_the_distance_metric_is_the_gain_times_the_error(branch):
    """Data in one point: the network is exact, so a constant velocity error c leaves x0hat - x0 = -g c everywhere."""
    model = GaussianModel(torch.full((1, 2, 2), 0.7, dtype=D), 1e-9)
    with torch.no_grad():
        model.parameters("policy")[0].fill_(0.25)
    batch = Batch(["a", "b"], model.encode_prompts(["a", "b"]), torch.arange(2), model.mean.expand(2, -1, -1, -1))
    s = SRPOSettings(branches=(branch,), window=(0.5, 0.6), step=0.05)  # a window of two steps: one landing level, .55
    (loss,) = SRPO(s).step(model, lambda images, prompts: images.mean((1, 2, 3)), batch, Random(0, 1, [0, 1]))
    start = 0.6 if branch == "denoise" else 0.5
    expected = 0.25 * abs(start - 0.55) / (1 - 0.55)
    assert float(loss.metrics[f"distance_{branch}"]) == pytest.approx(expected, rel=1e-6)

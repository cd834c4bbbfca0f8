"""sampling.py: parity with diffusers' schedulers, marginals on Gaussian data, densities, where gradient flows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from palate.models.gaussian import GaussianModel, gaussian_ode
from palate.path import Prediction, flow_schedule, from_eps, from_v, from_velocity, move, vp_schedule
from palate.sampling import log_prob, sample, shift_time, stochastic_step, time_grid, transition_std


def network(x, t):  # any smooth function of state and time, so that an error of either shows
    return torch.tanh(x * (1 + t)) + 0.3 * torch.cos(x.flip(-1) + 5 * t)


class Network:
    """A model around `network` in one of the parametrisations."""

    latent_shape = (2, 4, 4)

    def __init__(self, schedule, convert):
        self.schedule, self.convert = schedule, convert

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        return self.convert(xt, network(xt, t.view(-1, 1, 1, 1)), *self.schedule(t))


def ddim(prediction_type, **options):
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
        **options,
    )


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("prediction_type, convert", [("epsilon", from_eps), ("v_prediction", from_v)])
def test_equals_ddim_step_by_step(prediction_type, convert, eta):
    scheduler = ddim(prediction_type)
    scheduler.set_timesteps(10)
    schedule, times = vp_schedule(scheduler.alphas_cumprod), time_grid(10).float()
    generator = torch.Generator().manual_seed(0)
    start = x = torch.randn(3, 2, 4, 4, generator=generator)
    noises = [torch.randn(3, 2, 4, 4, generator=generator) for _ in range(10)]
    for i, step in enumerate(scheduler.timesteps):
        t, t_next = times[i].expand(3), times[i + 1].expand(3)
        assert round(float(t[0]) * 1000) - 1 == int(step)
        output = network(x, t[0])
        theirs = scheduler.step(output, step, x, eta=eta, variance_noise=noises[i] if eta else None).prev_sample
        level, following = schedule(t), schedule(t_next)
        std = transition_std(*level, *following, eta)
        ours = stochastic_step(convert(x, output, *level), *following, std, noises[i])
        # the first steps divide by alpha = 0.068: one float32 rounding there is 1e-6 of the largest entry
        torch.testing.assert_close(ours, theirs, atol=1e-6 * max(1.0, float(theirs.abs().max())), rtol=0)
        x = theirs
    whole = sample(Network(schedule, convert), None, start, 10, eta=eta, rng_noise=lambda i: noises[i])
    torch.testing.assert_close(whole, x, atol=2e-5, rtol=0)  # ten steps of the above


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equals_flow_match_euler_step_by_step(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10))
    times = time_grid(10, shift=shift).float()
    torch.testing.assert_close(times, scheduler.sigmas, atol=1e-6, rtol=0)
    start = x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for i, step in enumerate(scheduler.timesteps):
        output = network(x, times[i])
        theirs = scheduler.step(output, step, x).prev_sample
        level, following = (flow_schedule(times[j].expand(3)) for j in (i, i + 1))
        ours = move(from_velocity(x, output, *level), *following)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        x = theirs
    whole = sample(Network(flow_schedule, from_velocity), None, start, 10, shift=shift)
    torch.testing.assert_close(whole, x, atol=5e-6, rtol=0)


def test_shift_and_grid():
    grid = shift_time(1 - torch.arange(51, dtype=torch.float64) / 50, 3.0)
    expected = {5: 0.9642857143, 25: 0.75, 30: 0.6666667, 40: 0.4285714}
    for j, value in expected.items():
        assert float(grid[j]) == pytest.approx(value, abs=5e-8)
    torch.testing.assert_close(time_grid(50, shift=3.0), grid)
    late = time_grid(4, shift=3.0, start=0.6)
    assert float(late[0]) == pytest.approx(0.6) and late[-1] == 0 and len(late) == 5
    for wrong in ({"steps": 0}, {"steps": 4, "start": 0.0}, {"steps": 4, "shift": 0.0}):
        with pytest.raises(ValueError, match="expected steps"):
            time_grid(**wrong)


VP = vp_schedule(torch.cumprod(1 - torch.linspace(0.001, 0.2, 100, dtype=torch.float64), 0))


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_marginals_are_exact_when_the_posterior_is(schedule, eta):
    """One transition with the exact posterior x0 ~ p(x0 | xt) has the exact marginal at the next level, for any eta."""
    n, s, mu = 200_000, 0.6, 0.4
    generator = torch.Generator().manual_seed(1)
    x0, eps, z = torch.randn(3, n, 1, 1, 1, dtype=torch.float64, generator=generator)
    x0 = mu + s * x0
    level, following = (schedule(torch.tensor([t], dtype=torch.float64)) for t in (0.7, 0.4))
    std = transition_std(*level, *following, eta)
    x = stochastic_step(Prediction(x0, eps), *following, std, z).flatten()
    q = float(following[0] ** 2 * s**2 + following[1] ** 2)
    assert abs(x.mean() - float(following[0]) * mu) < 4 * math.sqrt(q / n)
    assert abs(x.var() - q) < 4 * q * math.sqrt(2 / n)


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_eta_one_is_the_posterior_of_the_forward_process(schedule):
    """q(x_next | xt, x0) by conditioning a joint Gaussian, an independent route to mean and deviation."""
    t, t_next = (torch.tensor([v], dtype=torch.float64) for v in (0.8, 0.35))
    (a, s), (a_next, s_next) = schedule(t), schedule(t_next)
    x0, xt = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    pull = (a / a_next) * s_next**2 / s**2  # cov(x_next, xt | x0) / var(xt | x0)
    mean, var = a_next * x0 + pull * (xt - a * x0), s_next**2 - pull * (a / a_next) * s_next**2
    std = transition_std(a, s, a_next, s_next, 1.0)
    torch.testing.assert_close(std**2, var)
    torch.testing.assert_close(move(Prediction(x0, (xt - a * x0) / s), a_next, s_next, std), mean)


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_samples_of_the_exact_model_have_the_datas_moments(schedule, eta):
    """At many steps the sampler's law is N(mu, s^2); with few, the recursion of a linear model is known exactly."""
    n, s, mu, steps = 50_000, 0.6, 0.4, 40
    model = GaussianModel(torch.full((1, 1, 1), mu, dtype=torch.float64), s, schedule=schedule)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=generator)
    x = sample(
        model,
        model.encode_prompts([""]),
        noise,
        steps,
        eta=eta,
        rng_noise=lambda i: torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=generator),
    ).flatten()

    def moments(steps):  # of the recursion x' = gain x + offset + std z
        mean, var, times = 0.0, 1.0, time_grid(steps)
        for t, t_next in itertools.pairwise(times):
            (a, sg), (a2, sg2) = (tuple(map(float, schedule(u.view(1)))) for u in (t, t_next))
            std = eta * sg2 * math.sqrt(max(0.0, 1 - (a * sg2 / (a2 * sg)) ** 2))
            gain = (a2 * a * s**2 + math.sqrt(sg2**2 - std**2) * sg) / (a**2 * s**2 + sg**2)
            mean, var = a2 * mu + gain * (mean - a * mu), gain**2 * var + std**2
        return mean, var

    mean, var = moments(steps)
    assert abs(x.mean() - mean) < 4 * math.sqrt(var / n)
    assert abs(x.var() - var) < 4 * var * math.sqrt(2 / n)
    errors = [abs(math.sqrt(moments(k)[1]) / s - 1) for k in (40, 320)]  # first order in the step
    assert errors[0] < 0.15 and errors[1] < errors[0] / 6
    assert abs(moments(320)[0] - mu) < 0.003


def test_deterministic_sampler_converges_to_the_ode_map():
    model = GaussianModel(torch.full((1, 2, 2), 0.4, dtype=torch.float64), 0.6)
    noise = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    cond = model.encode_prompts(["a", "b"])
    ends = (0.0, 1.0, 1.0, 0.0)
    exact = gaussian_ode(noise, model.mean, 0.6, *ends)
    errors = [float((sample(model, cond, noise, k) - exact).abs().max()) for k in (50, 100, 200)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_rollout_numbers():
    """A point mass is hit exactly; the Gaussian's contrast after 25, 50 and 1000 shifted Euler steps."""
    point = GaussianModel(torch.full((1, 2, 2), 0.7, dtype=torch.float64), 0.0)
    noise = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    x = sample(point, point.encode_prompts([""]), noise, 7, shift=3.0)
    torch.testing.assert_close(x, torch.full_like(x, 0.7), atol=1e-12, rtol=0)
    model = GaussianModel(torch.zeros(1, 1, 1, dtype=torch.float64), 0.6)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for steps, contrast in ((25, 0.541794), (50, 0.570232), (1000, 0.598477)):
        x = sample(model, model.encode_prompts([""]), one, steps, shift=3.0)
        assert float(x) == pytest.approx(contrast, abs=5e-7)
    again = [sample(model, model.encode_prompts([""]), one, 25) for _ in range(2)]
    assert torch.equal(*again)


def test_log_prob_is_the_normal_density_of_the_step():
    x, mean = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64).view(-1, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(log_prob(x, mean, std), expected)
    with pytest.raises(ValueError, match="no density"):
        log_prob(x, mean, std * torch.tensor([1.0, 0.0, 1.0]).view(-1, 1, 1, 1))


def test_only_the_last_steps_carry_gradient():
    """d x / d b of the last k steps of a flow with velocity v + b, by the chain rule by hand."""
    s, steps = 0.6, 5
    for k in (0, 1, 3, 5):
        model = GaussianModel(torch.zeros(1, 1, 1, dtype=torch.float64), s)
        x = sample(model, model.encode_prompts([""]), torch.ones(1, 1, 1, 1, dtype=torch.float64), steps, grad_steps=k)
        slope, times = 0.0, time_grid(steps).tolist()
        for i in range(steps - k, steps):
            t, dt = times[i], times[i + 1] - times[i]
            slope = slope * (1 + dt * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)) + dt
        assert x.requires_grad == (k > 0)
        if k:
            x.sum().backward()
            assert float(model.parameters()[0].grad) == pytest.approx(slope, abs=1e-12)
    with torch.no_grad():  # the caller's no_grad wins, and the mode is left as found
        x = sample(model, model.encode_prompts([""]), torch.ones(1, 1, 1, 1, dtype=torch.float64), 3, grad_steps=3)
    assert not x.requires_grad and torch.is_grad_enabled()


def test_bad_options_are_refused():
    model = GaussianModel(torch.zeros(1, 1, 1), 1.0)
    call = (model, model.encode_prompts([""]), torch.zeros(1, 1, 1, 1), 4)
    for options, message in (
        ({"eta": 0.5}, "rng_noise"),
        ({"eta": 1.5}, "ancestral"),
        ({"grad_steps": 5}, "expected 0..4"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(*call, **options)


def test_half_precision_noise_does_not_round_the_levels():
    model = GaussianModel(torch.zeros(1, 2, 2), 0.6)
    noise = torch.randn(1, 1, 2, 2).bfloat16()
    out = sample(model, model.encode_prompts([""]), noise, 25)
    torch.testing.assert_close(out, sample(model, model.encode_prompts([""]), noise.float(), 25), atol=1e-6, rtol=0)

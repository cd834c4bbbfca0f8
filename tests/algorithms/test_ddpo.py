"""algorithms/ddpo.py: densities of the drawn steps, the ratio, the policy gradient against the reparameterised one."""

from __future__ import annotations

import math

import pytest
import torch
from support.gaussian import VP, C, D, linear, model_of

from palate.algorithms.ddpo import (
    DDPO,
    DDPOSettings,
    calls_per_update,
    clipped_loss,
    ratio,
    rollout,
    standardised,
    transition,
)
from palate.core import Batch, Random
from palate.path import flow_schedule, move
from palate.sampling import log_prob, sample, stochastic_step, time_grid, transition_std


def settings_of(**changes):
    return DDPOSettings(**({"steps": 4, "eta": 0.8, "guidance": 1.0, "minibatches": 1} | changes))


def run(settings, *, model=None, reward=linear, ids=(0, 1), step=1, algorithm=None, prompts=None, lr=0.0):
    """Gradients of the first update, the losses; with `lr` every update is a step of gradient descent."""
    model, algorithm = model or model_of(), algorithm or DDPO(settings)
    prompts = prompts or ["cat"] * len(ids)
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)))
    for p in model.parameters():
        p.grad = None
    first, losses = None, []
    for loss in algorithm.step(model, reward, batch, Random(0, step, ids)):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
        if loss.update:
            first = first or [p.grad.clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(lr * p.grad)
                    p.grad = None
    return first, losses


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_log_probabilities_of_the_drawn_steps_in_closed_form(schedule):
    """x_next = mean + std z, so log p = -|z|^2 / 2 - D log std - D/2 log 2 pi, with std the posterior's."""
    settings = settings_of(steps=5, shift=2.0)
    model, rng = model_of(schedule), Random(0, 1, [3, 4])
    cond = model.encode_prompts(["cat", "cat"])
    with torch.no_grad():
        x0, path = rollout(model, cond, rng, settings)
    times = time_grid(5, shift=2.0)
    assert len(path) == 4
    for i, drawn in enumerate(path):
        (a, s), (a_next, s_next) = (schedule(t.expand(2)) for t in (times[i], times[i + 1]))
        posterior = s_next * (1 - (a * s_next / (a_next * s)) ** 2).sqrt()
        std = (0.8 * posterior).flatten()
        z = rng.normal(f"sde-{i}", (1, 2, 2)).double().flatten(1)
        exact = -0.5 * z.square().sum(1) - 4 * std.log() - 2 * math.log(2 * math.pi)
        torch.testing.assert_close(drawn.log_prob, exact, atol=1e-10, rtol=1e-10)
    noise = rng.normal("rollout", (1, 2, 2)).double()
    whole = sample(model, cond, noise, 5, eta=0.8, shift=2.0, rng_noise=lambda i: rng.normal(f"sde-{i}", (1, 2, 2)))
    torch.testing.assert_close(x0, whole, atol=1e-12, rtol=0)  # the same sampler as everyone's


def test_ratio_is_exactly_one_on_policy_and_moves_in_closed_form():
    settings = settings_of(density="joint")
    _, losses = run(settings, ids=(0, 1, 2))
    assert all(float(loss.metrics["ratio"]) == 1.0 and float(loss.metrics["clipped"]) == 0 for loss in losses)
    model, rng = model_of(), Random(0, 1, [0])
    cond = model.encode_prompts(["cat"])
    with torch.no_grad():
        _, path = rollout(model, cond, rng, settings)
        before = [transition(model, p.x, p.t, p.t_next, cond, settings) for p in path]
        model.parameters()[0].add_(C * 0.1)
    for drawn, (old, std) in zip(path, before, strict=True):
        with torch.no_grad():
            mean, _ = transition(model, drawn.x, drawn.t, drawn.t_next, cond, settings)
        z = (drawn.x_next - old) / std
        exact = ((z * (mean - old) / std).sum() - ((mean - old) / std).square().sum() / 2).exp()
        now = log_prob(drawn.x_next, mean, std)
        torch.testing.assert_close(ratio(now, drawn.log_prob, 4, "joint")[0], exact)
        torch.testing.assert_close(ratio(now, drawn.log_prob, 4, "per_element")[0], exact**0.25)


def reparameterised(settings, schedule):
    """d E[R] / d velocity through the random steps; the last step, which has no density, stays the reference's."""
    model = model_of(schedule)
    cond, times = model.encode_prompts(["cat"]), time_grid(settings.steps, shift=settings.shift)
    x = torch.zeros(1, 1, 2, 2, dtype=D)  # the gradient of a linear reward does not depend on any noise
    for i in range(settings.steps):
        t, t_next = times[i].expand(1), times[i + 1].expand(1)
        if i == settings.steps - 1:
            x = move(model.predict(x, t, cond, weights="reference"), *schedule(t_next))
        else:
            std = transition_std(*schedule(t), *schedule(t_next), settings.eta)
            x = stochastic_step(model.predict(x, t, cond), *schedule(t_next), std, torch.zeros_like(x))
    return torch.autograd.grad((x * C).sum(), model.parameters()[0])[0]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_mean_policy_gradient_is_the_reparameterised_gradient(schedule):
    """Within 4 standard errors, and the error is at most a fifth of the gradient."""
    settings = settings_of(steps=3, eta=1.0, density="joint", advantage_clip=1e9, history=0)
    n, estimates = 400, []
    for part in range(40):
        ids, seen = range(part * n, (part + 1) * n), []

        def reward(images, prompts, seen=seen):
            seen.append(linear(images, prompts))
            return seen[-1]

        (grad,), _ = run(settings, model=model_of(schedule), reward=reward, ids=ids)
        estimates.append(-grad * seen[0].std(correction=0) * (settings.steps - 1) * n / (n - 1))
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(len(estimates))
    exact = reparameterised(settings, schedule)
    assert bool(((estimates.mean(0) - exact).abs() < 4 * error).all())
    assert float(error.max()) < 0.2 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, D])
def test_equal_rewards_have_no_advantage_whatever_their_rounding(dtype):
    for value in torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=D).to(dtype):
        assert not any(standardised(value.repeat(count)).any() for count in (3, 7, 24))


def test_equal_rewards_give_no_update():
    (grad,), losses = run(settings_of(), reward=lambda images, prompts: torch.full((len(images),), 0.3, dtype=D))
    assert torch.equal(grad, torch.zeros_like(grad))
    assert all(float(loss.value.detach()) == 0 for loss in losses)


def test_clip_stops_the_gradient_only_in_the_advantages_direction():
    rho = torch.tensor([1.3, 0.7, 1.3, 0.7, 1.05], dtype=D, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0], dtype=D)
    value = clipped_loss(rho, advantages, 0.1)
    (grad,) = torch.autograd.grad(value, rho)
    assert grad.tolist() == [0.0, -0.2, 0.2, 0.0, -0.4]
    assert float(value.detach()) == pytest.approx(-(1.1 + 0.7 - 1.3 - 0.9 + 2.1) / 5)


def test_the_second_minibatch_is_off_policy():
    _, losses = run(settings_of(minibatches=2, density="joint", clip=0.01), ids=range(6), lr=0.5)
    assert [loss.update for loss in losses] == [None, None, "policy"] * 2
    assert all(float(loss.metrics["ratio"]) == 1 for loss in losses[:3])
    assert all(abs(float(loss.metrics["ratio"]) - 1) > 1e-6 for loss in losses[3:])
    assert max(float(loss.metrics["clipped"]) for loss in losses[3:]) > 0


def test_minibatches_share_the_samples_out():
    model, rows = model_of(), []
    original = model.predict

    def watched(xt, *args, **kwargs):
        if torch.is_grad_enabled():
            rows.append(xt)
        return original(xt, *args, **kwargs)

    model.predict = watched
    run(settings_of(minibatches=2, steps=3), model=model, ids=range(5))
    start = Random(0, 1, range(5)).normal("rollout", (1, 2, 2)).double()
    assert [len(x) for x in rows] == [3, 3, 2, 2]
    assert torch.equal(torch.cat([rows[0], rows[2]]), start[[0, 2, 4, 1, 3]])


def test_advantages_use_a_prompts_own_history_once_it_is_long_enough():
    algorithm = DDPO(settings_of(history=4, enough=3))
    torch.testing.assert_close(algorithm.advantages(["a", "b"], torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))
    algorithm.advantages(["a", "b"], torch.tensor([2.0, 3.0]))
    got = algorithm.advantages(["a", "c"], torch.tensor([6.0, 0.0]))  # a: 1, 2, 6; c is new
    torch.testing.assert_close(got, torch.tensor([3 / math.sqrt(14 / 3), -1.0]))
    again = DDPO(settings_of(history=4, enough=3))
    again.load_state_dict(algorithm.state_dict())
    args = ["a", "b"], torch.tensor([0.5, 9.0])
    assert torch.equal(algorithm.advantages(*args), again.advantages(*args))
    assert len(algorithm.seen["a"]) == 4 and list(algorithm.seen["b"]) == [3.0, 3.0, 9.0]
    extreme = DDPO(settings_of(advantage_clip=1.5)).advantages(["x"] * 9, torch.tensor([0.0] * 8 + [1.0]))
    assert float(extreme.max()) == 1.5
    torch.testing.assert_close(standardised(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))


def test_a_reward_that_is_not_finite_shows_and_is_in_no_history():
    """Not even where a prompt's own rewards were all equal, whose scores are 0."""
    algorithm = DDPO(settings_of(history=4, enough=2))
    for value in (2.0, 2.0, math.nan, math.inf, -math.inf, 2.0):
        got = algorithm.advantages(["a", "b"], torch.tensor([value, 2.0]))
        assert bool(torch.isfinite(got[0])) == math.isfinite(value)
    assert list(algorithm.seen["a"]) == [2.0] * 3 and got.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("minibatches, guidance", [(1, 1.0), (2, 3.0)])
def test_calls(minibatches, guidance):
    model, settings = model_of(), settings_of(minibatches=minibatches, guidance=guidance, steps=5)
    run(settings, model=model, ids=range(4))
    calls = calls_per_update(settings)
    assert [model.forward, model.backward, model.decoded] == [4 * calls[k] for k in ("forward", "backward", "decode")]


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 1},
        {"eta": 0},
        {"eta": 1.1},
        {"shift": 0},
        {"minibatches": 0},
        {"clip": 0},
        {"advantage_clip": 0},
        {"density": "mean"},
        {"history": 3},
        {"enough": 1},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="DDPOSettings expected"):
        DDPOSettings(**wrong)
    with pytest.raises(ValueError, match=r"trainer.micro_batches: a micro-batch of a rank has 1 sample;"):
        run(settings_of(), ids=(0,))

"""algorithms/flow_grpo.py: densities, groups, the policy gradient against the reparameterised one, KL, window."""

from __future__ import annotations

import math

import pytest
import torch
from support.gaussian import C, D, linear, model_of

from palate.algorithms.flow_grpo import (
    FlowGRPO,
    FlowGRPOSettings,
    calls_per_update,
    clipped_loss,
    group_advantages,
    kl,
    random_steps,
    ratio,
    rollout,
    trained_steps,
)
from palate.core import Batch, Random
from palate.path import flow_schedule, move
from palate.sampling import log_prob, sample, stochastic_step, time_grid, transition_std


def settings_of(**changes):
    small = {"group": 3, "steps": 4, "eta": 0.8, "guidance": 1.0, "shift": 1.0, "beta": 0.0}
    return FlowGRPOSettings(**(small | changes))


def run(settings, *, model=None, reward=linear, ids=(0,), step=1, lr=0.0):
    """Gradients of the first update, the losses; with `lr` every update is a step of gradient descent."""
    model = model or model_of()
    prompts = [f"cat {i}" for i in ids]
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)))
    for p in model.parameters():
        p.grad = None
    first, losses = None, []
    for loss in FlowGRPO(settings).step(model, reward, batch, Random(0, step, ids)):
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


def test_log_probabilities_of_the_drawn_steps_in_closed_form():
    """For a flow the posterior's variance is s'^2 (1 - (a s' / (a' s))^2), and log p that of z."""
    settings, rng = settings_of(steps=5, shift=2.0), Random(0, 1, [3, 4])
    model = model_of()
    cond = model.encode_prompts(["cat", "cat"])
    with torch.no_grad():
        x0, path = rollout(model, cond, rng, None, settings)
    t = time_grid(5, shift=2.0).tolist()
    for i, drawn in enumerate(path):
        std = 0.8 * t[i + 1] * math.sqrt(1 - ((1 - t[i]) * t[i + 1] / ((1 - t[i + 1]) * t[i])) ** 2)
        z = rng.normal(f"sde-{i}", (1, 2, 2)).double().flatten(1)
        exact = -0.5 * z.square().sum(1) - 4 * math.log(std) - 2 * math.log(2 * math.pi)
        torch.testing.assert_close(drawn.log_prob, exact, atol=1e-10, rtol=1e-10)
    noise = rng.normal("rollout", (1, 2, 2)).double()
    whole = sample(model, cond, noise, 5, eta=0.8, shift=2.0, rng_noise=lambda i: rng.normal(f"sde-{i}", (1, 2, 2)))
    torch.testing.assert_close(x0, whole, atol=1e-12, rtol=0)


def test_eta_is_the_papers_noise_level_over_root_two_for_short_steps():
    """Flow-GRPO adds noise of variance a^2 t / (1 - t) dt: std is eta sqrt(2 t / (1 - t) dt) up to O(dt)."""
    for t in (0.2, 0.5, 0.8):
        for dt, tolerance in ((1e-2, 0.1), (1e-4, 1e-3)):
            times = torch.tensor([t, t - dt], dtype=D)
            std = float(transition_std(*flow_schedule(times[:1]), *flow_schedule(times[1:]), 0.7 / math.sqrt(2)))
            assert std == pytest.approx(0.7 * math.sqrt(t / (1 - t) * dt), rel=tolerance)


def test_ratio_is_exactly_one_on_policy():
    _, losses = run(settings_of(minibatches=3), ids=(0, 1))
    assert all(float(loss.metrics["ratio"]) == 1.0 and float(loss.metrics["clipped"]) == 0 for loss in losses)
    assert [loss.update for loss in losses] == [None, None, "policy"] * 3
    _, losses = run(settings_of(minibatches=2, density="joint"), ids=(0, 1), lr=0.5)
    assert all(abs(float(loss.metrics["ratio"]) - 1) > 1e-6 for loss in losses[3:])


def test_the_density_per_element_is_the_joint_ones_root():
    old, now = torch.tensor([1.0], dtype=D), torch.tensor([1.4], dtype=D)
    assert float(ratio(now, old, 4)) == pytest.approx(math.exp(0.1))
    assert float(ratio(now, old, 1)) == pytest.approx(math.exp(0.4))
    (joint,), _ = run(settings_of(density="joint"))
    (each,), _ = run(settings_of())
    torch.testing.assert_close(each, joint / 4, atol=1e-14, rtol=1e-12)


def test_outside_the_window_sampling_is_deterministic():
    settings, model = settings_of(steps=4, window=1, window_every=1), model_of()
    cond = model.encode_prompts(["cat", "cat"])
    with torch.no_grad():
        x0, path = rollout(model, cond, Random(0, 2, [0, 1]), None, settings)  # step 2 of training: step 1 of sampling
        x, times = path[0].x_next, time_grid(4)
        assert len(path) == 1 and float(path[0].t[0]) == 0.75
        for i in (2, 3):
            x = move(model.predict(x, times[i].expand(2), cond), *flow_schedule(times[i + 1].expand(2)))
        start = Random(0, 2, [0, 1]).normal("rollout", (1, 2, 2)).double()
        before = move(model.predict(start, times[0].expand(2), cond), *flow_schedule(times[1].expand(2)))
    torch.testing.assert_close(x0, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(path[0].x, before, atol=1e-12, rtol=0)


def reparameterised(settings, step):
    """d E[R] / d velocity through the random steps only: elsewhere there is no density, so nothing is trained."""
    model = model_of()
    cond, times = model.encode_prompts(["cat"]), time_grid(settings.steps, shift=settings.shift)
    x = torch.zeros(1, 1, 2, 2, dtype=D)  # the gradient of a linear reward does not depend on any noise
    for i in range(settings.steps):
        t, t_next = times[i].expand(1), times[i + 1].expand(1)
        if i in random_steps(settings, step):
            std = transition_std(*flow_schedule(t), *flow_schedule(t_next), settings.eta)
            x = stochastic_step(model.predict(x, t, cond), *flow_schedule(t_next), std, torch.zeros_like(x))
        else:
            x = move(model.predict(x, t, cond, weights="reference"), *flow_schedule(t_next))
    return torch.autograd.grad((x * C).sum(), model.parameters()[0])[0]


@pytest.mark.slow
@pytest.mark.parametrize("window, same_noise", [(None, False), (None, True), (1, False)], ids=["all", "dance", "mix"])
def test_mean_policy_gradient_is_the_reparameterised_gradient(window, same_noise):
    settings = settings_of(
        group=400,
        steps=3,
        eta=1.0,
        density="joint",
        advantage_clip=1e9,
        window=window,
        window_every=1,
        same_noise=same_noise,
    )
    step, n, estimates = 2, settings.group, []
    for i in range(40):
        seen = []

        def reward(images, prompts, seen=seen):
            seen.append(linear(images, prompts))
            return seen[-1]

        (grad,), _ = run(settings, reward=reward, ids=(i,), step=step)
        estimates.append(-grad * seen[0].std(correction=0) * len(random_steps(settings, step)) * n / (n - 1))
    estimates = torch.stack(estimates)
    error = estimates.std(0) / math.sqrt(len(estimates))
    exact = reparameterised(settings, step)
    assert bool(((estimates.mean(0) - exact).abs() < 4 * error).all())
    assert float(error.max()) < 0.2 * float(exact.abs().max())


def test_advantages_are_relative_to_the_group():
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 10.0, 0.0, 0.0, 6.0], dtype=D)
    got = group_advantages(rewards, 3)
    scaled = math.sqrt(1.5)
    expected = torch.tensor([-scaled, 0, scaled, 0, 0, 0, -(0.5**0.5), -(0.5**0.5), 2 * 0.5**0.5], dtype=D)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=0)
    over = group_advantages(rewards, 3, "batch") * rewards.std(correction=0)
    torch.testing.assert_close(over, torch.tensor([-1, 0, 1, 0, 0, 0, -2, -2, 4.0], dtype=D), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, D])
def test_equal_rewards_have_no_advantage_whatever_their_rounding(dtype):
    values = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=D)
    for group in (3, 7, 8, 24):
        rewards = values.to(dtype).repeat_interleave(group)
        for baseline in ("group", "batch"):
            assert not group_advantages(rewards, group, baseline).any()


def test_equal_rewards_in_a_group_give_no_update():
    def per_prompt(images, prompts):  # differs between groups, not inside
        return torch.tensor([float(p.split()[1]) for p in prompts], dtype=D)

    for settings in (settings_of(), settings_of(beta=0.5), settings_of(baseline="batch")):
        (grad,), _ = run(settings, reward=per_prompt, ids=(0, 1))
        assert torch.equal(grad, torch.zeros_like(grad))


def test_a_group_shares_its_prompt_and_has_its_own_random_numbers():
    seen = []

    def reward(images, prompts):
        seen.append((images.clone(), list(prompts)))
        return linear(images, prompts)

    run(settings_of(), reward=reward, ids=(5, 7))
    run(settings_of(), reward=reward, ids=(7,))
    (both, prompts), (alone, _) = seen
    assert prompts == ["cat 5"] * 3 + ["cat 7"] * 3
    torch.testing.assert_close(both[3:], alone, atol=1e-14, rtol=0)  # a prompt's group does not depend on the batch
    assert len({float(x) for x in both.sum((1, 2, 3))}) == 6
    model, starts = model_of(), []
    original = model.predict

    def watched(xt, *args, **kwargs):
        starts.append(xt)
        return original(xt, *args, **kwargs)

    model.predict = watched
    run(settings_of(same_noise=True), model=model, ids=(5, 7))
    start = starts[0].view(2, 3, -1)
    assert torch.equal(start, start[:, :1].expand_as(start)) and not torch.equal(start[0], start[1])


def test_minibatches_share_every_group_out():
    model, rows = model_of(), []
    original = model.predict

    def watched(xt, *args, **kwargs):
        if torch.is_grad_enabled():
            rows.append(xt)
        return original(xt, *args, **kwargs)

    model.predict = watched
    run(settings_of(minibatches=2, steps=2), model=model, ids=(3, 4))
    start = Random(0, 1, range(9, 15)).normal("rollout", (1, 2, 2)).double()  # ids 3 * 3 + k and 4 * 3 + k
    assert torch.equal(torch.cat(rows), start[[0, 2, 4, 1, 3, 5]])


def test_kl_and_its_gradient_in_closed_form():
    """A velocity shift b moves the mean of a step by the same vector k b everywhere: KL = k^2 |b|^2 / (2 std^2)."""
    mean, reference = torch.zeros(2, 1, 2, 2, dtype=D), torch.full((2, 1, 2, 2), 0.3, dtype=D)
    std = torch.tensor([0.5, 0.1], dtype=D).view(2, 1, 1, 1)
    torch.testing.assert_close(kl(mean, reference, std), torch.tensor([0.72, 18.0], dtype=D))
    model = model_of()
    with torch.no_grad():
        model.parameters()[0].copy_(C)
    flat = lambda images, prompts: torch.zeros(len(images), dtype=D)  # noqa: E731
    for density, elements in (("joint", 1), ("per_element", 4)):
        settings = settings_of(beta=0.3, density=density, eta=0.7)
        (grad,), losses = run(settings, model=model, reward=flat, ids=(0, 1))
        expected, value = torch.zeros_like(C), 0.0
        times = time_grid(4)
        for i in range(3):
            (a, s), (a_next, s_next) = (flow_schedule(t.view(1)) for t in (times[i], times[i + 1]))
            std = transition_std(a, s, a_next, s_next, 0.7)
            k = ((s_next**2 - std**2).sqrt() * a - a_next * s) / (a + s)
            expected += 0.3 / 3 * (k**2 / std**2 * C)[0] / elements
            value += 0.3 / 3 * float(k**2 / std**2) * float(C.square().sum()) / 2 / elements
        torch.testing.assert_close(grad, expected, atol=1e-12, rtol=1e-10)
        assert sum(float(loss.value.detach()) for loss in losses) == pytest.approx(value)


def test_window_slides_from_high_to_low_noise_and_starts_again():
    settings = FlowGRPOSettings(steps=6, window=2, window_every=3, beta=0)
    firsts = [random_steps(settings, step)[0] for step in range(1, 16)]
    assert firsts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0]
    assert list(random_steps(settings, 12)) == [3, 4]  # never the last step, which has no density
    assert list(random_steps(FlowGRPOSettings(steps=6), 1)) == [0, 1, 2, 3, 4]
    _, losses = run(settings_of(window=2, steps=5), ids=(0,))
    assert [loss.update for loss in losses] == [None, "policy"]


def test_a_random_share_of_the_steps_is_trained():
    chosen = [tuple(trained_steps(15, 0.6, Random(0, step, [0]))) for step in range(1, 300)]
    assert {len(c) for c in chosen} == {9} and len(set(chosen)) > 250
    assert all(list(c) == sorted(set(c)) for c in chosen)
    counts = [sum(i in c for c in chosen) / len(chosen) for i in range(15)]
    assert max(abs(share - 0.6) for share in counts) < 4 * math.sqrt(0.24 / len(chosen))
    assert trained_steps(3, 1.0, Random(0, 1, [0])) == [0, 1, 2]
    assert trained_steps(15, 0.6, Random(0, 1, [0])) == trained_steps(15, 0.6, Random(0, 1, [8, 9]))


def test_clip():
    rho = torch.tensor([1.3, 0.7, 1.3, 0.7], dtype=D, requires_grad=True)
    value = clipped_loss(rho, torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=D), 0.1)
    (grad,) = torch.autograd.grad(value, rho)
    assert grad.tolist() == [0.0, -0.25, 0.25, 0.0]
    with pytest.raises(ValueError, match="no density"):
        log_prob(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.1},
        {"fraction": 0.5, "steps": 6},
        {"window": 2, "guidance": 2.0},
        {"minibatches": 2, "beta": 0.1, "guidance": 3.0},
    ],
)
def test_calls(changes):
    model, settings = model_of(), settings_of(**changes)
    run(settings, model=model, ids=(0, 1))
    calls = calls_per_update(settings)
    assert [model.forward, model.backward, model.decoded] == [2 * calls[k] for k in ("forward", "backward", "decode")]


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": 1},
        {"steps": 1},
        {"eta": 0},
        {"shift": 0},
        {"fraction": 0},
        {"window": 10},
        {"window": 0},
        {"window_every": 0},
        {"baseline": "all"},
        {"advantage_clip": 0},
        {"clip": 0},
        {"beta": -1},
        {"density": "sum"},
        {"minibatches": 25},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="FlowGRPOSettings expected"):
        FlowGRPOSettings(**wrong)

"""algorithms/refl.py: the gradient's closed form, L_pre, the window of steps, what is called."""

from __future__ import annotations

import pytest
import torch
from support.gaussian import VP, C, Counted, D

from palate.algorithms.refl import ReFL, ReFLSettings, approach, calls_per_update, reward_loss
from palate.core import Batch, Random
from palate.path import add_noise, flow_schedule
from palate.sampling import sample, time_grid


def linear(images, prompts):
    return (images * C).sum((1, 2, 3))


def run(settings, reward=linear, *, schedule=flow_schedule, trains=("velocity",), ids=(0,), step=1, latents=None):
    model = Counted(torch.full((1, 2, 2), 0.2, dtype=D), 0.6, schedule=schedule, trains=trains)
    prompts = ["cat"] * len(ids)
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(ids), latents)
    losses = []
    for loss in ReFL(settings).step(model, reward, batch, Random(0, step, ids)):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
    return [p.grad for p in model.parameters()], losses, model


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("left", [1, 3])
def test_gradient_of_a_linear_reward(schedule, left):
    """x0hat falls by sigma/(alpha + sigma) per unit of velocity, so dL/db = lambda sigma/(alpha + sigma) C."""
    settings = ReFLSettings(T=5, T1=left, T2=left, guidance=1.0, hinge=None, lam=0.3)
    (grad,), losses, _ = run(settings, schedule=schedule, ids=(0, 1))
    alpha, sigma = schedule(time_grid(5)[5 - left].view(1))
    torch.testing.assert_close(grad, (0.3 * sigma / (alpha + sigma) * C)[0], atol=1e-12, rtol=0)
    assert float(losses[0].metrics["t"]) == pytest.approx(left / 5)


def test_the_scored_image_is_the_one_call_prediction_at_a_state_of_the_sampler():
    seen = []

    def reward(images, prompts):
        seen.append(images.detach())
        return linear(images, prompts)

    settings = ReFLSettings(T=8, T1=3, T2=3, guidance=2.0, shift=3.0)
    _, _, model = run(settings, reward, ids=(4, 5))
    noise = Random(0, 1, [4, 5]).normal("rollout", (1, 2, 2)).double()
    cond = model.encode_prompts(["cat"] * 2)
    xt, t = approach(model, cond, noise, settings, 3)
    torch.testing.assert_close(seen[0], model.predict(xt, t, cond, guidance=2.0).x0, atol=1e-12, rtol=0)
    whole, _ = approach(model, cond, noise, ReFLSettings(T=8, T1=1, T2=1, guidance=2.0, shift=3.0), 1)
    last = model.predict(whole, time_grid(8, shift=3.0)[7].expand(2), cond, guidance=2.0).x0  # the sample itself
    torch.testing.assert_close(last, sample(model, cond, noise, 8, guidance=2.0, shift=3.0), atol=1e-12, rtol=0)


def test_hinge():
    r = torch.tensor([1.0, 1.9, 2.0, 3.0], dtype=D, requires_grad=True)
    (grad,) = torch.autograd.grad(reward_loss(r, 2.0), r)
    assert grad.tolist() == [-0.25, -0.25, 0.0, 0.0]
    assert float(reward_loss(r, 2.0).detach()) == pytest.approx(1.1 / 4)
    (grad,) = torch.autograd.grad(reward_loss(r, None), r)
    assert grad.tolist() == [-0.25] * 4
    (grad,), _, _ = run(ReFLSettings(T=3, T1=1, T2=1, hinge=-1e9))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_pretraining_loss_gradient():
    """A velocity shift b moves eps_theta by alpha/(alpha + sigma) b: dL/db = 2 w alpha/(alpha + sigma) wrong / D."""
    real = Random(9, 0, [0]).normal("real", (1, 2, 2)).double()
    settings = ReFLSettings(T=3, T1=1, T2=1, guidance=1.0, hinge=-1e9, pretrain=0.7)
    (grad,), losses, model = run(settings, latents=real)
    rng = Random(0, 1, [0])
    eps, t = rng.normal("pretrain", (1, 2, 2)).double(), 1 - rng.uniform("pretrain-level")
    alpha, sigma = flow_schedule(t)
    wrong = model.predict(add_noise(real, eps, alpha, sigma), t, model.encode_prompts(["cat"])).eps.detach() - eps
    torch.testing.assert_close(grad, (0.7 * 2 * alpha / (alpha + sigma) * wrong / 4)[0], atol=1e-12, rtol=0)
    assert [loss.update for loss in losses] == [None, "policy"]
    with pytest.raises(ValueError, match=r"prompts.images"):
        run(settings)


def test_steps_left_are_drawn_from_the_window_and_calls_are_counted():
    settings = ReFLSettings(T=12, T1=2, T2=5, guidance=3.0)
    drawn, forwards = set(), []
    for step in range(1, 40):
        _, losses, model = run(settings, ids=(0, 1, 2), step=step)
        left = int(losses[0].metrics["steps_left"])
        drawn.add(left)
        calls = calls_per_update(settings, left)
        assert (model.forward, model.backward, model.decoded) == (3 * calls["forward"], 3 * calls["backward"], 3)
        forwards.append(model.forward / 3)
    assert drawn == {2, 3, 4, 5}
    assert calls_per_update(settings)["forward"] == (12 - 3.5 + 1) * 2
    real = torch.zeros(1, 1, 2, 2, dtype=D)
    plain = ReFLSettings(T=4, T1=2, T2=2, guidance=1.0, pretrain=1.0)
    _, _, model = run(plain, latents=real)
    assert (model.forward, model.backward) == (calls_per_update(plain)["forward"], 2) == (4, 2)


@pytest.mark.parametrize(
    "wrong", [{"T1": 0}, {"T1": 5, "T2": 4}, {"T2": 41}, {"lam": 0}, {"pretrain": -1}, {"shift": 0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="ReFLSettings expected"):
        ReFLSettings(**wrong)

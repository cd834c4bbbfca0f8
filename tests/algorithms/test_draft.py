"""algorithms/draft.py: K = all against autograd through the chain, truncation, LV unbiased with a lower variance."""

from __future__ import annotations

import math

import pytest
import torch
from support.gaussian import VP, D, model_of

from palate.algorithms.draft import DRaFT, DRaFTSettings, calls_per_update
from palate.core import Batch, Random
from palate.models.gaussian import GaussianModel
from palate.path import flow_schedule, move
from palate.sampling import time_grid

Y = torch.randn(1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(3))


def quadratic(images, prompts):
    return -0.5 * (images - Y).square().sum((1, 2, 3))


def run(settings, *, model=None, reward=quadratic, ids=(0,), step=1):
    model = model or model_of()
    for p in model.parameters():
        p.grad = None
    prompts = ["cat"] * len(ids)
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(ids))
    losses = []
    for loss in DRaFT(settings).step(model, reward, batch, Random(0, step, ids)):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
    return [p.grad for p in model.parameters()], losses


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_gradient_is_that_of_the_last_k_steps(schedule, K):
    """K = 5 = steps: autograd through the whole chain, written out here; smaller K detaches what came before."""
    model = model_of(schedule, ("velocity", "linear", "log_std"))
    grads, losses = run(DRaFTSettings(steps=5, K=K, guidance=1.0, shift=2.0), model=model, ids=(0, 1, 2))
    x = Random(0, 1, [0, 1, 2]).normal("rollout", (1, 2, 2)).double()
    cond, times = model.encode_prompts(["cat"] * 3), time_grid(5, shift=2.0)
    for i in range(5):
        if i <= 5 - K:
            x = x.detach()
        pred = model.predict(x, times[i].expand(3), cond)
        x = move(pred, *schedule(times[i + 1].expand(3)))
    expected = torch.autograd.grad(-quadratic(x, None).mean(), model.parameters())
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert [loss.update for loss in losses] == ["policy"]


def test_closed_form_of_one_step():
    """x0 falls by sigma_1 per unit of velocity (a flow): d(-R)/db = -sigma_1 (x0 - Y)."""
    seen = []

    def reward(images, prompts):
        seen.append(images.detach())
        return quadratic(images, prompts)

    (grad,), _ = run(DRaFTSettings(steps=5, K=1, guidance=1.0), reward=reward, ids=(0, 1))
    torch.testing.assert_close(grad, -0.2 * (seen[0] - Y).mean(0), atol=1e-12, rtol=0)


def test_lv_is_unbiased_and_its_variance_falls():
    """The gradient is linear in x0hat, whose mean is mu at any number of Euler steps: E[grad] = -sigma_1 (mu - Y) with
    and without LV. Given x0, the renoised terms are independent, so LV's variance is lower.
    """
    count, sigma1 = 2000, 0.5
    exact = -sigma1 * (0.2 - Y)
    spread = {}
    for n in (0, 1, 4):
        rows = []
        for part in range(count // 500):
            ids = range(500 * part, 500 * (part + 1))
            rows.append(per_sample(DRaFTSettings(steps=2, K=1, n=n, guidance=1.0), ids))
        grads = torch.cat(rows)
        error = grads.std(0) / math.sqrt(count)
        assert bool(((grads.mean(0) - exact[0]).abs() < 4 * error).all())
        spread[n] = float(grads.var(0).mean())
    assert spread[4] < 0.75 * spread[1] < 0.75 * spread[0]


def per_sample(settings, ids):
    """Gradients (B, 2, 2) of each sample: velocity enters per sample when the model's parameter is expanded."""
    model = model_of()
    own = torch.zeros(len(ids), 1, 2, 2, dtype=D, requires_grad=True)

    def predict(xt, t, cond, *, guidance=1.0, weights="policy"):
        pred = GaussianModel.predict(model, xt, t, cond, weights="reference")
        alpha, sigma = model.schedule(t)
        return type(pred)(pred.x0 - sigma / (alpha + sigma) * own, pred.eps + alpha / (alpha + sigma) * own)

    model.predict = predict
    prompts = ["cat"] * len(ids)
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)))
    for loss in DRaFT(settings).step(model, quadratic, batch, Random(0, 1, ids)):
        loss.value.backward()
    return own.grad[:, 0] * len(ids)


def test_lv_averages_terms_of_the_same_size():
    """A linear reward's gradient is the same for every noise, so n does not change it."""

    def linear(images, prompts):
        return (images * Y).sum((1, 2, 3))

    grads = [run(DRaFTSettings(steps=4, n=n, guidance=1.0), reward=linear, ids=(0, 1))[0][0] for n in (0, 1, 3)]
    for grad in grads:
        torch.testing.assert_close(grad, 0.25 * Y, atol=1e-12, rtol=0)
    _, losses = run(DRaFTSettings(steps=4, n=3))
    assert [loss.update for loss in losses] == [None, None, None, "policy"]
    renoised = [float(loss.metrics["reward_renoised"]) for loss in losses[1:]]
    assert len(set(renoised)) == 3


@pytest.mark.parametrize(
    "settings",
    [
        DRaFTSettings(steps=6, K=3, guidance=2.0),
        DRaFTSettings(steps=4, n=2, guidance=1.0),
        DRaFTSettings(steps=3, n=1, guidance=7.5),
    ],
)
def test_calls(settings):
    model = model_of()
    run(settings, model=model, ids=(0, 1, 2))
    calls = calls_per_update(settings)
    assert [model.forward, model.backward, model.decoded] == [3 * calls[k] for k in ("forward", "backward", "decode")]


@pytest.mark.parametrize("wrong", [{"K": 0}, {"K": 51}, {"n": -1}, {"n": 2, "K": 2}, {"shift": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="DRaFTSettings expected"):
        DRaFTSettings(**wrong)

"""algorithms/leap_align.py: values are the rollout's, the gradient's closed form, and the relatives to the digit."""

from __future__ import annotations

import pytest
import torch
from support.gaussian import VP, C, D, model_of

from palate.algorithms.draft import DRaFT, DRaFTSettings
from palate.algorithms.leap_align import (
    LeapAlign,
    LeapAlignSettings,
    calls_per_update,
    connected,
    discounted,
    drawn_steps,
    remembered,
    reward_loss,
    similarity,
)
from palate.algorithms.refl import ReFL, ReFLSettings
from palate.core import Batch, Random
from palate.path import flow_schedule, move
from palate.sampling import sample, time_grid

SHAPE = (1, 2, 2)


def differentiable(images, prompts):
    return (images * C).sum((1, 2, 3)) + 0.1 * images.square().sum((1, 2, 3))


def settings_of(**changes):
    return LeapAlignSettings(**({"steps": 5, "guidance": 1.0, "shift": 1.0} | changes))


def gradient(algorithm, model, reward=differentiable, ids=(0, 1, 2)):
    prompts = [f"cat {i}" for i in ids]
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)))
    for p in model.parameters():
        p.grad = None
    losses = []
    for loss in algorithm.step(model, reward, batch, Random(0, 1, ids)):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
    return [p.grad.clone() for p in model.parameters()], losses


def rich(schedule=flow_schedule):
    """A network whose velocity depends on its input: the nested term is not zero."""
    model = model_of(schedule, trains=("velocity", "linear"))
    with torch.no_grad():
        model.networks["policy"]["linear"].copy_(
            0.3 * torch.randn(4, 4, dtype=D, generator=torch.Generator().manual_seed(2))
        )
    return model


def test_values_are_the_rollouts_to_the_last_bit():
    model, seen = rich(), []

    def reward(images, prompts):
        seen.append(images.detach().clone())
        return differentiable(images, prompts)

    for changes in ({}, {"nested": 1.0}, {"leaps": 1}, {"j": "last"}):
        gradient(LeapAlign(settings_of(**changes)), model, reward)
    noise = Random(0, 1, [0, 1, 2]).normal("rollout", SHAPE).double()
    with torch.no_grad():
        x0 = sample(model, model.encode_prompts(["cat"] * 3), noise, 5, shift=1.0)
    assert all(torch.equal(images, x0) for images in seen)


@pytest.mark.parametrize("nested", [0.0, 0.3, 1.0])
def test_the_gradient_has_its_closed_form(nested):
    """eq. 10 for v = v*(x, t) + b + L x, at each sample's own k and j: dv/dx = (t - (1 - t) s^2)/q + L."""
    model, settings = rich(), settings_of(nested=nested, weighted=False)
    grads, _ = gradient(LeapAlign(settings), model)
    rng = Random(0, 1, [0, 1, 2])
    k, j = drawn_steps(settings, rng)
    times, cond = time_grid(5), model.encode_prompts(["cat"] * 3)
    with torch.no_grad():
        x_k, x_j, x0 = remembered(model, cond, rng.normal("rollout", SHAPE).double(), times, 1.0, k, j)
    expected_b, expected_linear = torch.zeros(4, dtype=D), torch.zeros(4, 4, dtype=D)
    for i in range(3):
        a, b = float(times[k[i]]), float(times[j[i]])
        q = (1 - b) ** 2 * 0.36 + b**2
        jacobian = (b - (1 - b) * 0.36) / q * torch.eye(4, dtype=D) + model.networks["policy"]["linear"].detach()
        pull = (C + 0.2 * x0[i]).flatten() / 3  # dR/dx0 over the batch
        on_v_j = b * pull  # of the loss -R: d x0 / d v_j = -b
        on_v_k = (a - b) * pull - nested * b * (a - b) * jacobian.T @ pull
        expected_b += on_v_j + on_v_k
        expected_linear += torch.outer(on_v_j, x_j[i].flatten()) + torch.outer(on_v_k, x_k[i].flatten())
    torch.testing.assert_close(grads[0].flatten(), expected_b, atol=1e-9, rtol=0)
    torch.testing.assert_close(grads[1], expected_linear, atol=1e-9, rtol=0)


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_two_steps_and_scale_1_are_drafts_whole_chain_to_the_digit(schedule):
    model = rich(schedule)
    leaps, _ = gradient(LeapAlign(settings_of(steps=2, nested=1.0, weighted=False)), model)
    whole, _ = gradient(DRaFT(DRaFTSettings(steps=2, K=2, guidance=1.0, shift=1.0)), model)
    for ours, theirs in zip(leaps, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_one_leap_from_the_last_step_is_draft_1_to_the_digit(schedule):
    model = rich(schedule)
    for nested in (0.0, 1.0):
        leaps, _ = gradient(LeapAlign(settings_of(leaps=1, j="last", nested=nested, weighted=False)), model)
        draft, _ = gradient(DRaFT(DRaFTSettings(steps=5, K=1, guidance=1.0, shift=1.0)), model)
        for ours, theirs in zip(leaps, draft, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_one_leap_from_the_last_step_is_refl_with_one_step_left_to_the_digit(schedule):
    """There the leap from the last state is the rollout's own last step, ReFL's prediction."""
    model = rich(schedule)
    leaps, _ = gradient(LeapAlign(settings_of(leaps=1, j="last", weighted=False)), model)
    refl, _ = gradient(ReFL(ReFLSettings(T=5, T1=1, T2=1, guidance=1.0, lam=1.0, hinge=None)), model)
    for ours, theirs in zip(leaps, refl, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_scale_0_is_drtune_to_the_digit():
    """DRTune stops the gradient at the network's input and keeps the sampler's own: here on both steps of two."""
    model = rich()
    leaps, _ = gradient(LeapAlign(settings_of(steps=2, nested=0.0, weighted=False)), model)
    times, cond = time_grid(2), model.encode_prompts(["cat"] * 3)
    x = Random(0, 1, [0, 1, 2]).normal("rollout", SHAPE).double()
    for i in range(2):
        pred = model.predict(x.detach(), times[i].expand(3), cond)
        x = x + (times[i + 1] - times[i]) * (pred.eps - pred.x0)
    for p in model.parameters():
        p.grad = None
    (-differentiable(x, None).mean()).backward()
    for ours, p in zip(leaps, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, atol=1e-12, rtol=0)


def test_weights_say_how_well_leap_and_rollout_agree():
    off_j, off_0 = torch.tensor([0.0, 0.3, 0.0], dtype=D), torch.tensor([0.05, 0.1, 0.3], dtype=D)
    torch.testing.assert_close(similarity(off_j, off_0, 0.1), torch.tensor([1.0, 0.5, 0.5], dtype=D))
    model, settings = rich(), settings_of(tau=0.01)
    grads, losses = gradient(LeapAlign(settings), model)
    rng = Random(0, 1, [0, 1, 2])
    k, j = drawn_steps(settings, rng)
    times, cond = time_grid(5), model.encode_prompts(["cat"] * 3)
    with torch.no_grad():
        x_k, x_j, x0 = remembered(model, cond, rng.normal("rollout", SHAPE).double(), times, 1.0, k, j)
        off_j = (move(model.predict(x_k, times[k], cond), *flow_schedule(times[j])) - x_j).abs().mean((1, 2, 3))
        off_0 = (model.predict(x_j, times[j], cond).x0 - x0).abs().mean((1, 2, 3))
    weight = similarity(off_j, off_0, 0.01)
    assert float(weight.min()) < 0.9 and float(losses[0].metrics["leap_weight"]) == pytest.approx(float(weight.mean()))
    expected = -(weight * differentiable(x0, None)).mean()
    torch.testing.assert_close(losses[0].value.detach(), expected, atol=1e-12, rtol=0)
    single = [gradient(LeapAlign(settings_of(weighted=False)), model, ids=(i,))[0] for i in range(3)]
    for part, got in enumerate(grads):  # weights scale each sample's own gradient
        mixed = sum(float(w) * one[part] for w, one in zip(weight, single, strict=True)) / 3
        torch.testing.assert_close(got, mixed, atol=1e-12, rtol=0)


def test_a_finer_grid_mends_no_leap():
    """A leap is as long whatever the steps; with few of them, more leaps are the rollout's own steps."""
    ids = range(200)
    model, prompts = model_of(), ["cat"] * len(ids)
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)))
    weights = []
    for steps in (4, 25):
        loss = next(
            LeapAlign(settings_of(steps=steps, shift=3.0)).step(model, differentiable, batch, Random(0, 1, ids))
        )
        weights.append(float(loss.metrics["leap_weight"]))
    assert weights[0] > 0.8 and weights[1] < 0.7


def test_every_pair_of_steps_is_drawn_equally_often():
    k, j = drawn_steps(settings_of(), Random(0, 1, range(4000)))
    pairs, counts = torch.unique(torch.stack([k, j], 1), dim=0, return_counts=True)
    assert bool((k < j).all()) and len(pairs) == 10 and float((counts - 400).abs().max()) < 5 * 400**0.5
    k, j = drawn_steps(settings_of(j="last"), Random(0, 1, range(100)))
    assert set(j.tolist()) == {4} and set(k.tolist()) == {0, 1, 2, 3}
    assert set(drawn_steps(settings_of(leaps=1), Random(0, 1, range(100)))[1].tolist()) == {0, 1, 2, 3, 4}


def test_values_and_gradients_of_the_connectors():
    value, predicted = torch.tensor([0.1], dtype=D), torch.tensor([0.7], dtype=D, requires_grad=True)
    out = connected(value, predicted)
    assert torch.equal(out.detach(), value) and torch.autograd.grad(3 * out, predicted)[0].item() == 3.0
    x = torch.tensor([0.3], dtype=D, requires_grad=True)
    out = discounted(x, 0.25)
    assert torch.equal(out.detach(), x.detach()) and torch.autograd.grad(out, x)[0].item() == 0.25
    r = torch.tensor([1.0, 3.0], dtype=D)
    weight = torch.tensor([1.0, 0.5], dtype=D)
    assert float(reward_loss(r, weight, None)) == -1.25 and float(reward_loss(r, weight, 2.0)) == 0.5


def test_two_micro_batches_add_up_to_the_whole_batch():
    model = rich()
    whole, _ = gradient(LeapAlign(settings_of()), model, ids=(0, 1, 2, 3))
    halves = [gradient(LeapAlign(settings_of()), model, ids=ids)[0] for ids in ((0, 1), (2, 3))]
    for part, got in enumerate(whole):
        torch.testing.assert_close(got, (halves[0][part] + halves[1][part]) / 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"steps": 9}, {"guidance": 3.0}, {"leaps": 1}, {"leaps": 1, "j": "last", "guidance": 2.0}]
)
def test_calls(changes):
    model, settings = model_of(), settings_of(**changes)
    gradient(LeapAlign(settings), model, ids=(0, 1))
    calls = calls_per_update(settings)
    assert [model.forward, model.backward, model.decoded] == [2 * calls[n] for n in ("forward", "backward", "decode")]


def test_training_raises_the_reward():
    model, settings = model_of(), settings_of()
    noise, cond = torch.randn(64, *SHAPE, dtype=D), model.encode_prompts(["cat"] * 64)
    before = float(differentiable(sample(model, cond, noise, 5), None).mean().detach())
    for _ in range(5):
        grads, _ = gradient(LeapAlign(settings), model, ids=range(16))
        with torch.no_grad():
            model.parameters()[0].sub_(0.05 * grads[0])
    assert float(differentiable(sample(model, cond, noise, 5), None).mean().detach()) > before + 0.1


@pytest.mark.parametrize(
    "wrong", [{"steps": 1}, {"shift": 0}, {"nested": 1.5}, {"leaps": 3}, {"j": "first"}, {"tau": 0}, {"steps": 0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="LeapAlignSettings expected"):
        LeapAlignSettings(**wrong)

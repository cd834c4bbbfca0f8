"""algorithms/nft.py: the fixed point, the mirrored policies, theta_old, what is called."""

from __future__ import annotations

import pytest
import torch
from support.gaussian import VP, C, Counted, D, linear, model_of

from palate import recipe
from palate.algorithms.nft import (
    NFT,
    NFTSettings,
    calls_per_update,
    mirrored,
    old_decay,
    optimality,
    self_normalised,
    velocity,
)
from palate.core import Batch, Random
from palate.path import add_noise, flow_schedule
from palate.sampling import sample, shift_time


def settings_of(**changes):
    return NFTSettings(**({"group": 4, "steps": 3, "shift": 1.0, "n": 1, "kl": 0.0, "adaptive": False} | changes))


def run(settings, *, model=None, reward=linear, ids=(0,), step=1, algorithm=None, lr=0.0):
    model, algorithm = model or model_of(), algorithm or NFT(settings)
    prompts = [f"cat {i}" for i in ids]
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)))
    for p in model.parameters():
        p.grad = None
    losses = []
    for loss in algorithm.step(model, reward, batch, Random(0, step, ids)):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
        if loss.update:
            grads = [p.grad.clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(lr * p.grad)
    return grads, losses


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_fixed_point_is_v_old_plus_the_guidance(schedule, beta):
    """For a shift d of the velocity: gradient 2 beta/D [beta d - mean (2 r - 1)(v - v_old)], so it vanishes at
    d = (1/beta) mean (2 r - 1)(v - v_old), the theorem's guidance over the drawn samples.
    """
    settings = settings_of(beta=beta, group=50)
    model = model_of(schedule)
    rng = Random(0, 1, [2 * 50 + k for k in range(50)])
    cond = model.encode_prompts(["cat 2"] * 50)
    x0 = sample(model, cond, rng.normal("rollout", (1, 2, 2)).double(), 3)
    r = optimality(linear(x0, None), 50, 1.0).view(-1, 1, 1, 1)
    eps, t = rng.normal("inject-0", (1, 2, 2)).double(), 1 - rng.uniform("level-0")
    v_old = velocity(model.predict(add_noise(x0, eps, *schedule(t)), t, cond, weights="reference"))
    guidance = ((2 * r - 1) * (eps - x0 - v_old)).mean(0)
    (grad,), losses = run(settings, model=model, ids=(2,))
    torch.testing.assert_close(grad, -2 * beta / 4 * guidance, atol=1e-12, rtol=0)

    algorithm = NFT(settings)
    algorithm.old = [torch.zeros(1, 2, 2, dtype=D)]
    with torch.no_grad():
        model.parameters()[0].copy_(guidance / beta)
    (grad,), losses = run(settings, model=model, ids=(2,), algorithm=algorithm)
    assert float(grad.abs().max()) < 1e-12
    assert float(losses[0].metrics["from_old"]) == pytest.approx(float((guidance / beta).square().mean()))


@pytest.mark.parametrize("shared_noise", [False, True])
def test_two_updates_per_batch_of_samples_are_mirrored_about_the_weights_that_drew_it(shared_noise):
    """Each update trains one half of every group, with r of the whole group. The first moves the policy by d, about
    which the second's gradient is 2 beta/D [beta d - mean (2 r - 1)(v - v_old)]; theta_old moves once, after both, by
    eta of two updates per step."""
    beta, lr, groups, group = 0.3, 0.4, [2, 5], 6
    settings = settings_of(beta=beta, group=group, minibatches=2, old_rate=0.1, shared_noise=shared_noise)
    model, algorithm = model_of(), NFT(settings)
    whole, rng = Random(0, 1, groups), Random(0, 1, groups).grouped(group)
    cond = model.encode_prompts([f"cat {i}" for i in groups for _ in range(group)])
    x0 = sample(model, cond, rng.normal("rollout", (1, 2, 2)).double(), 3)
    r = optimality(linear(x0, None), group, 1.0).view(-1, 1, 1, 1)
    noise = whole.normal("inject-0", (1, 2, 2)).repeat_interleave(group, 0)
    eps = (noise if shared_noise else rng.normal("inject-0", (1, 2, 2))).double()
    t = 1 - rng.uniform("level-0")
    v_old = velocity(model.predict(add_noise(x0, eps, *flow_schedule(t)), t, cond, weights="reference"))
    pull = (2 * r - 1) * (eps - x0 - v_old)
    (second,), losses = run(settings, model=model, algorithm=algorithm, ids=groups, lr=lr)
    assert [loss.update for loss in losses] == ["policy", "policy"]
    first = -2 * beta / 4 * pull[0::2].mean(0)
    moved = -lr * first
    expected = 2 * beta / 4 * (beta * moved - pull[1::2].mean(0))
    torch.testing.assert_close(second, first + expected, atol=1e-12, rtol=0)  # `run` adds gradients up
    theta = model.parameters()[0].detach()
    torch.testing.assert_close(theta, moved - lr * (first + expected), atol=1e-12, rtol=0)
    torch.testing.assert_close(algorithm.old[0], 0.8 * theta, atol=1e-12, rtol=0)  # eta = .1 times 2 updates, of zeros


def test_one_update_per_batch_is_that_of_runs_from_before_the_setting():
    """The key is not part of what a run is known by while it has its first value."""
    before, after = (recipe.fingerprint(recipe.read("nft-emoji", given)) for given in ([], ["algorithm.minibatches=1"]))
    assert before == after != recipe.fingerprint(recipe.read("nft-emoji", ["algorithm.minibatches=2"]))
    tree = recipe.as_tree(recipe.read("nft-emoji"))
    assert tree["algorithm"]["minibatches"] == 1


def test_the_update_guides_towards_the_good_samples():
    """Descending raises the reward of what the model then draws, also with the self-normalised error and the KL."""
    for changes in ({}, {"adaptive": True}, {"adaptive": True, "kl": 1e-3, "n": 3}):
        model = model_of()
        noise, cond = torch.randn(64, 1, 2, 2, dtype=D), model.encode_prompts(["cat"] * 64)
        before = linear(sample(model, cond, noise, 6), None).mean()
        run(settings_of(group=64, **changes), model=model, lr=0.5)
        assert float(linear(sample(model, cond, noise, 6), None).mean()) > float(before) + 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, D])
def test_equal_rewards_are_half_optimal_whatever_their_rounding(dtype):
    values = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=D)
    for group in (3, 7, 8, 24):
        assert bool((optimality(values.to(dtype).repeat_interleave(group), group, 1.0) == 0.5).all())


def test_equal_rewards_give_no_update():
    """r = 1/2 and v_theta = v_old: the two errors pull in opposite directions, sample by sample."""
    for changes in ({}, {"adaptive": True}, {"kl": 0.5}):
        (grad,), _ = run(settings_of(**changes), reward=lambda images, prompts: torch.ones(len(images), dtype=D))
        assert float(grad.abs().max()) < 1e-15


def test_the_kl_pulls_back_to_the_reference():
    """v_theta - v_ref = b for a velocity shift b: with equal rewards dL/db = kl 2 b / D, whatever n."""
    settings, model = settings_of(kl=0.3, n=3), model_of()
    algorithm = NFT(settings)
    algorithm.old = [C.clone()]
    with torch.no_grad():
        model.parameters()[0].copy_(C)
    flat = lambda images, prompts: torch.ones(len(images), dtype=D)  # noqa: E731
    (grad,), losses = run(settings, model=model, reward=flat, algorithm=algorithm)
    torch.testing.assert_close(grad, 0.3 * 2 * C / 4, atol=1e-12, rtol=0)
    assert float(losses[0].metrics["kl"]) == pytest.approx(float(C.square().mean()))


def test_optimality():
    r = optimality(torch.tensor([0.0, 2.0, 1.0, 5.0, 5.0, 5.0], dtype=D), 3, 1.0)
    torch.testing.assert_close(r, torch.tensor([0.0, 1.0, 0.5, 0.5, 0.5, 0.5], dtype=D), atol=1e-7, rtol=0)
    r = optimality(torch.tensor([0.0, 2.0, 1.0], dtype=D), 3, 5.0)
    std = (2 / 3) ** 0.5
    torch.testing.assert_close(r, torch.tensor([0.5 - 0.1 / std, 0.5 + 0.1 / std, 0.5], dtype=D), atol=1e-7, rtol=0)


def test_mirrored_and_self_normalised():
    theta, old = torch.tensor([3.0], dtype=D), torch.tensor([1.0], dtype=D)
    plus, minus = mirrored(theta, old, 0.5)
    assert (float(plus), float(minus)) == (2.0, 0.0)  # (1 - b) old + b theta and (1 + b) old - b theta
    x0hat = torch.tensor([[1.0, -3.0]], dtype=D, requires_grad=True)
    value = self_normalised(x0hat.view(1, 1, 1, 2), torch.zeros(1, 1, 1, 2, dtype=D))
    (grad,) = torch.autograd.grad(value.sum(), x0hat)
    assert float(value.detach()) == pytest.approx(5 / 2) and grad.tolist() == [[0.5, -1.5]]


def test_old_weights_draw_the_samples_and_follow_the_policy():
    assert [old_decay(i, 0.1, 0.5) for i in (1, 4, 9)] == [0.1, 0.4, 0.5]
    settings = settings_of(old_rate=0.1)
    model, algorithm, seen = model_of(), NFT(settings), []

    def reward(images, prompts):
        seen.append(images.clone())
        return linear(images, prompts)

    run(settings, model=model, algorithm=algorithm, reward=reward, lr=0.7)
    theta = model.parameters()[0].detach().clone()
    assert float(theta.abs().max()) > 0.01
    torch.testing.assert_close(algorithm.old[0], 0.9 * theta, atol=1e-12, rtol=0)  # eta_1 = .1 of the zeros, .9 theta
    again = NFT(settings)
    again.load_state_dict(algorithm.state_dict())
    grads = [run(settings, model=model, algorithm=a, reward=reward, step=2)[0][0] for a in (algorithm, again)]
    assert torch.equal(*grads)
    assert torch.equal(model.parameters()[0].detach(), theta)  # the swap of weights leaves the policy as it was
    noise = Random(0, 2, [0, 1, 2, 3]).normal("rollout", (1, 2, 2)).double()
    with torch.no_grad():
        model.parameters()[0].copy_(0.9 * theta)
        drawn = sample(model, model.encode_prompts(["cat 0"] * 4), noise, 3)
    torch.testing.assert_close(seen[1], drawn, atol=1e-12, rtol=0)


def test_times_are_shifted_and_groups_do_not_depend_on_the_batch():
    told, seen = [], []

    class Watched(Counted):
        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            told.append(t)
            return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    def reward(images, prompts):
        seen.append((images.clone(), list(prompts)))
        return linear(images, prompts)

    model = Watched(torch.full((1, 2, 2), 0.2, dtype=D), 0.6)
    run(settings_of(shift=3.0), model=model, ids=(5, 7), reward=reward)
    run(settings_of(shift=3.0), ids=(7,), reward=reward)
    ids = [5 * 4 + k for k in range(4)] + [7 * 4 + k for k in range(4)]
    torch.testing.assert_close(told[-1], shift_time(1 - Random(0, 1, ids).uniform("level-0"), 3.0))
    assert seen[0][1] == ["cat 5"] * 4 + ["cat 7"] * 4
    torch.testing.assert_close(seen[0][0][4:], seen[1][0], atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"kl": 0.1, "n": 3}, {"guidance": 2.0, "kl": 0.1}, {"kl": 0.1, "n": 2, "minibatches": 2}]
)
def test_calls(changes):
    model, settings = model_of(), settings_of(**changes)
    _, losses = run(settings, model=model, ids=(0, 1))
    calls = calls_per_update(settings)
    assert [model.forward, model.backward, model.decoded] == [2 * calls[k] for k in ("forward", "backward", "decode")]
    assert [loss.update for loss in losses] == ([None] * (settings.n - 1) + ["policy"]) * settings.minibatches


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": 1},
        {"steps": 0},
        {"shift": 0},
        {"n": 0},
        {"beta": 0},
        {"z": 0},
        {"kl": -1},
        {"old_rate": -1},
        {"old_most": 1},
        {"minibatches": 0},
        {"minibatches": 5},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="NFTSettings expected"):
        NFTSettings(**wrong)

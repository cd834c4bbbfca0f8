"""algorithms/dgpo.py: the gradient's closed form, DPO as a group of two, AWM as its first order, clip, old weights."""

from __future__ import annotations

import pytest
import torch
from support.gaussian import VP, C, Counted, D, linear, model_of

from palate.algorithms.dgpo import (
    DGPO,
    DGPOSettings,
    calls_per_update,
    group_loss,
    matching_error,
    old_decay,
    past_clip,
    velocity,
    weighed,
)
from palate.algorithms.dpo import pair_loss
from palate.core import Batch, Random
from palate.path import add_noise, flow_schedule
from palate.rewards.groups import standard_scores
from palate.sampling import sample, shift_time

SHAPE = (1, 2, 2)


def settings_of(**changes):
    small = {"group": 4, "steps": 3, "guidance": 1.0, "shift": 1.0, "n": 1, "kl": 0.0, "clip": None, "beta": 5.0}
    return DGPOSettings(**(small | changes))


def run(settings, *, model=None, reward=linear, ids=(0,), step=1, algorithm=None, lr=0.0):
    model, algorithm = model or model_of(), algorithm or DGPO(settings)
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
            grad = model.parameters()[0].grad.clone()
            with torch.no_grad():
                model.parameters()[0].sub_(lr * grad)
    return grad, losses


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("objective", ["dgpo", "awm"])
@pytest.mark.parametrize("moved", [0.0, 0.4])
def test_gradient_in_closed_form(schedule, objective, moved):
    """dL/db = w beta mean_i A_i 2/D (v_theta - v)_i, w = sigmoid(beta mean A (d - d_ref)) or 1/2, for a shift b."""
    settings, model = settings_of(objective=objective, group=6), model_of(schedule)
    with torch.no_grad():
        model.parameters()[0].fill_(moved)
    grad, losses = run(settings, model=model, ids=(2,))
    images = Random(0, 1, [12 + k for k in range(6)])
    cond = model.encode_prompts(["cat"] * 6)
    with torch.no_grad():
        x0 = sample(model, cond, images.normal("rollout", SHAPE).double(), 3, shift=1.0)
        a = standard_scores(linear(x0, None), 6)
        eps = Random(0, 1, [2]).normal("inject-0", SHAPE).double().expand(6, -1, -1, -1)
        t = (1 - Random(0, 1, [2]).uniform("level-0")).expand(6)
        xt = add_noise(x0, eps, *schedule(t))
        v, v_ref = (velocity(model.predict(xt, t, cond, weights=w)) for w in ("policy", "reference"))
        apart = (a * (matching_error(v, eps - x0) - matching_error(v_ref, eps - x0))).mean()
        weight = torch.sigmoid(5.0 * apart) if objective == "dgpo" else torch.tensor(0.5, dtype=D)
        expected = weight * 5.0 * (a.view(-1, 1, 1, 1) * 2 / 4 * (v - (eps - x0))).mean(0)
    torch.testing.assert_close(grad, expected, atol=1e-12, rtol=0)
    assert float(losses[0].metrics["weight"]) == pytest.approx(float(weight))
    assert float(losses[0].metrics["implicit_reward"]) == pytest.approx(
        float((matching_error(v_ref, eps - x0) - matching_error(v, eps - x0)).mean()), abs=1e-12
    )


def group_of_six(model):
    """Prompt 2's group as the algorithm draws it: images, condition, advantages, and the noise and level all share."""
    images, cond = Random(0, 1, [12 + k for k in range(6)]), model.encode_prompts(["cat"] * 6)
    x0 = sample(model, cond, images.normal("rollout", SHAPE).double(), 3, shift=1.0)
    eps = Random(0, 1, [2]).normal("inject-0", SHAPE).double().expand(6, -1, -1, -1)
    t = (1 - Random(0, 1, [2]).uniform("level-0")).expand(6)
    return x0, cond, standard_scores(linear(x0, None), 6), eps, t


def test_awms_weighting_in_closed_form():
    """The gradient of t d^p / p is t d^(p - 1) times d's own: large errors pull less, late times too."""
    error = torch.tensor([0.01, 0.5, 2.0], dtype=D, requires_grad=True)
    t = torch.tensor([0.9, 0.5, 0.1], dtype=D)
    (slope,) = torch.autograd.grad(weighed(error, t, 0.25).sum(), error)
    torch.testing.assert_close(slope, t * (error.detach() + 1e-10) ** -0.75, atol=1e-12, rtol=0)
    assert weighed(error, t, None) is error
    settings, model = settings_of(objective="awm", group=6, power=0.25), model_of()
    with torch.no_grad():
        model.parameters()[0].fill_(0.4)
    grad, _ = run(settings, model=model, ids=(2,))
    with torch.no_grad():
        x0, cond, a, eps, t = group_of_six(model)
        v = velocity(model.predict(add_noise(x0, eps, *flow_schedule(t)), t, cond))
        pull = a * t * (matching_error(v, eps - x0) + 1e-10) ** -0.75
        expected = 0.5 * 5.0 * (pull.view(-1, 1, 1, 1) * 2 / 4 * (v - (eps - x0))).mean(0)
    torch.testing.assert_close(grad, expected, atol=1e-12, rtol=0)


def test_the_trust_region_pulls_back_to_the_old_weights():
    """kl_old |v_theta - v_old|^2 has the gradient kl_old 2/D (b - b_old); at the old weights it is none."""
    flat = lambda images, prompts: torch.ones(len(images), dtype=D)  # noqa: E731
    settings, model = settings_of(kl_old=0.7, n=2), model_of()
    algorithm = DGPO(settings)
    grad, _ = run(settings, model=model, algorithm=algorithm, reward=flat)
    assert float(grad.abs().max()) == 0.0 and algorithm.old is not None
    with torch.no_grad():
        model.parameters()[0].add_(C)
    grad, losses = run(settings, model=model, algorithm=algorithm, reward=flat, step=2)
    torch.testing.assert_close(grad, 0.7 * 2 * C / 4, atol=1e-12, rtol=0)
    assert float(losses[0].metrics["kl_old"]) == pytest.approx(float(C.square().mean()))


def test_a_group_of_two_is_diffusion_dpo():
    """A = 1, -1: -log sigmoid(-beta/2 (m_w - m_l)), and awm has its gradient at the reference."""
    error, reference = torch.tensor([0.4, 0.9, 0.2, 0.3], dtype=D), torch.tensor([0.5, 0.7, 0.3, 0.3], dtype=D)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=D)
    m = error - reference
    value, _ = group_loss(error, reference, advantages, 7.0, 2)
    expected = pair_loss(m[[0, 3]], m[[1, 2]], 7.0).mean()
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    slopes = []
    for objective in ("dgpo", "awm"):
        leaf = reference.clone().requires_grad_()
        value, _ = group_loss(leaf, reference, advantages, 7.0, 2, objective)
        slopes.append(torch.autograd.grad(value, leaf)[0])
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=0)


def test_equal_rewards_give_no_update_and_the_kl_pulls_back():
    flat = lambda images, prompts: torch.ones(len(images), dtype=D)  # noqa: E731
    for changes in ({}, {"clip": 0.1}, {"reference": "old"}, {"objective": "awm"}):
        grad, _ = run(settings_of(**changes), reward=flat)
        assert float(grad.abs().max()) == 0.0
    model = model_of()
    with torch.no_grad():
        model.parameters()[0].copy_(C)
    grad, losses = run(settings_of(kl=0.3, n=3), model=model, reward=flat)
    torch.testing.assert_close(grad, 0.3 * 2 * C / 4, atol=1e-12, rtol=0)
    assert float(losses[0].metrics["kl"]) == pytest.approx(float(C.square().mean()))


def test_the_kl_can_be_to_the_guided_reference():
    model = model_of()
    model.means = {"cat 0": torch.full(SHAPE, 1.0, dtype=D)}
    flat = lambda images, prompts: torch.ones(len(images), dtype=D)  # noqa: E731
    grad, _ = run(settings_of(kl=0.3, kl_guidance=3.0), model=model, reward=flat)
    assert float(grad.abs().max()) > 1e-3  # unguided policy and guided reference differ at the start


@pytest.mark.parametrize("objective", ["dgpo", "awm"])
def test_descending_raises_the_reward_of_what_is_drawn(objective):
    model = model_of()
    noise, cond = torch.randn(64, *SHAPE, dtype=D), model.encode_prompts(["cat"] * 64)
    before = float(linear(sample(model, cond, noise, 6), None).mean())
    algorithm = DGPO(settings_of(group=32, objective=objective))
    for step in range(1, 6):
        run(algorithm.settings, model=model, algorithm=algorithm, step=step, lr=0.3)
    assert float(linear(sample(model, cond, noise, 6), None).mean()) > before + 0.05


def test_past_the_clip_in_the_advantages_direction_there_is_no_gradient():
    old, advantages = torch.zeros(4, dtype=D), torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=D)
    error = torch.tensor([-0.2, 0.2, 0.2, -0.2], dtype=D)  # rho = 1.22, .82, .82, 1.22
    assert past_clip(error, old, advantages, 0.1).tolist() == [True, False, True, False]
    assert past_clip(error, old, advantages, 0.3).tolist() == [False] * 4
    settings, model = settings_of(clip=1e-4, old_most=0.9, old_rate=1.0), model_of()
    algorithm = DGPO(settings)
    _, losses = run(settings, model=model, algorithm=algorithm, lr=0.5)
    assert float(losses[0].metrics["clipped"]) == 0.0  # theta_old is the policy
    _, losses = run(settings, model=model, algorithm=algorithm, step=2)
    assert float(losses[0].metrics["clipped"]) > 0.2


@pytest.mark.parametrize("changes", [{"clip": 1e-3}, {"reference": "old"}], ids=["clip", "old"])
def test_the_old_weights_enter_in_closed_form(changes):
    """As reference their error is what is subtracted; for the clip an image that went too far has no gradient."""
    settings, model = settings_of(group=6, **changes), model_of()
    algorithm = DGPO(settings)
    algorithm.old = [torch.full_like(model.parameters()[0], 0.15)]
    with torch.no_grad():
        model.parameters()[0].fill_(0.4)
    grad, losses = run(settings, model=model, algorithm=algorithm, ids=(2,), step=1)
    with torch.no_grad():
        x0, cond, a, eps, t = group_of_six(model)
        xt = add_noise(x0, eps, *flow_schedule(t))
        v, v_ref = (velocity(model.predict(xt, t, cond, weights=w)) for w in ("policy", "reference"))
        v_old = v_ref + 0.15  # the shift is the trained parameter
        d, d_old = matching_error(v, eps - x0), matching_error(v_old, eps - x0)
        stopped = past_clip(d, d_old, a, 1e-3) if "clip" in changes else torch.zeros(6, dtype=torch.bool)
        against = d_old if "reference" in changes else matching_error(v_ref, eps - x0)
        weight = torch.sigmoid(5.0 * (a * (d - against)).mean())
        each = a.view(-1, 1, 1, 1) * 2 / 4 * (v - (eps - x0)) * (~stopped).view(-1, 1, 1, 1)
    torch.testing.assert_close(grad, weight * 5.0 * each.mean(0), atol=1e-12, rtol=0)
    assert float(losses[0].metrics["weight"]) == pytest.approx(float(weight))
    assert "reference" in changes or 0 < int(stopped.sum()) < 6


def test_old_weights_follow_the_policy_and_survive_a_checkpoint():
    assert [old_decay(i, 0.1, 0.3) for i in (1, 2, 9)] == [0.1, 0.2, 0.3]
    settings, model = settings_of(reference="old", old_rate=0.1), model_of()
    algorithm = DGPO(settings)
    run(settings, model=model, algorithm=algorithm, lr=0.7)
    theta = model.parameters()[0].detach().clone()
    torch.testing.assert_close(algorithm.old[0], 0.9 * theta, atol=1e-12, rtol=0)
    again = DGPO(settings)
    again.load_state_dict(algorithm.state_dict())
    got = [run(settings, model=model, algorithm=a, step=2)[0] for a in (algorithm, again)]
    assert torch.equal(*got) and torch.equal(model.parameters()[0].detach(), theta)
    assert DGPO(settings_of()).state_dict() == {"old": None}


def test_times_noise_and_groups():
    told, seen = [], []

    class Watched(Counted):
        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            if torch.is_grad_enabled():
                told.append(t)
            return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    def reward(images, prompts):
        seen.append((images.clone(), list(prompts)))
        return linear(images, prompts)

    model = Watched(torch.full(SHAPE, 0.2, dtype=D), 0.6, trains=("velocity",))
    run(settings_of(shift=3.0, times=(0.4, 1.0)), model=model, ids=(5, 7), reward=reward)
    u = 1 - Random(0, 1, [5, 7]).uniform("level-0")
    torch.testing.assert_close(told[0], (0.4 + 0.6 * shift_time(u, 3.0)).repeat_interleave(4))
    run(settings_of(shift=3.0, shared_time=False, shared_noise=False), model=model, ids=(7,), reward=reward)
    torch.testing.assert_close(told[1], shift_time(1 - Random(0, 1, range(28, 32)).uniform("level-0"), 3.0))
    assert seen[0][1] == ["cat 5"] * 4 + ["cat 7"] * 4
    torch.testing.assert_close(seen[0][0][4:], seen[1][0], atol=1e-14, rtol=0)


def test_two_micro_batches_add_up_to_the_whole_batch():
    settings = settings_of(clip=0.1, kl=0.1, n=2)
    whole, _ = run(settings, ids=(0, 1, 2, 3))
    halves = [run(settings, ids=ids)[0] for ids in ((0, 1), (2, 3))]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl": 0.1, "n": 3},
        {"kl": 0.1, "kl_guidance": 2.0, "guidance": 2.0},
        {"clip": 0.1},
        {"reference": "old", "kl": 0.1},
        {"reference": "old"},
        {"kl_old": 0.1, "power": 0.25, "objective": "awm"},
    ],
)
def test_calls(changes):
    model, settings = model_of(), settings_of(**changes)
    _, losses = run(settings, model=model, ids=(0, 1))
    calls = calls_per_update(settings)
    assert [model.forward, model.backward, model.decoded] == [2 * calls[k] for k in ("forward", "backward", "decode")]
    assert [loss.update for loss in losses] == [None] * (settings.n - 1) + ["policy"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": 1},
        {"steps": 0},
        {"shift": 0},
        {"n": 0},
        {"times": (0.5, 0.5)},
        {"objective": "dpo"},
        {"beta": 0},
        {"reference": "policy"},
        {"baseline": "all"},
        {"advantage_clip": 0},
        {"clip": 0},
        {"kl": -1},
        {"kl_old": -1},
        {"power": 0},
        {"old_rate": -1},
        {"old_most": 1},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="DGPOSettings expected"):
        DGPOSettings(**wrong)

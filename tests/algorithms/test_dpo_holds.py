"""algorithms/dpo.py: the safeguard, tracked noise, other losses, ties, single likes, online and iterative pairs."""

from __future__ import annotations

import math

import pytest
import torch
from support.gaussian import VP, D, linear, model_of

from palate import recipe
from palate.algorithms.dpo import (
    DPO,
    DPOSettings,
    bounded,
    calls_per_update,
    excess_error,
    pair_loss,
    pair_slope,
    safe_scale,
    scaled_gradient,
)
from palate.core import Batch, Random
from palate.path import add_noise, flow_schedule
from palate.runtime.errors import InputError
from palate.sampling import sample
from palate.testing import PROMPTS, TinyFlow, tiny_reward

SHAPE = (1, 2, 2)


def never(images, prompts):
    raise AssertionError("given pairs need no reward")


def run(settings, *, model=None, reward=linear, ids=(0, 1), pairs=None, algorithm=None, step=1, lr=0.0):
    model, algorithm = model or model_of(), algorithm or DPO(settings)
    prompts = [f"cat {i}" for i in ids]
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)), pairs)
    for p in model.parameters():
        p.grad = None
    losses, grads = [], []
    for loss in algorithm.step(model, reward, batch, Random(0, step, ids)):
        loss.value.backward()
        losses.append(loss)
        grads = [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(lr * p.grad)
    return grads, losses


def pairs_of(n, sides=2, apart=1.0):
    pairs = torch.randn(n, sides, *SHAPE, dtype=D, generator=torch.Generator().manual_seed(1))
    pairs[:, 1] = pairs[:, 0] + apart * (pairs[:, 1] - pairs[:, 0])
    return pairs


# ---------------------------------------------------------------- the safeguard


def test_the_scale_is_the_largest_that_keeps_the_condition():
    """<g_w, g_w - lambda g_l> >= mu |g_w|^2 holds at lambda, and not at any larger one below 1."""
    g = torch.randn(500, 2, 6, dtype=D, generator=torch.Generator().manual_seed(0))
    for mu in (0.0, 0.5, 0.9, 1.0):
        scale = safe_scale(g[:, 0], g[:, 1], mu)
        assert bool((scale >= 0).all() and (scale <= 1).all())

        def kept(scale, mu=mu):
            return (g[:, 0] * (g[:, 0] - scale[:, None] * g[:, 1])).sum(1) - mu * g[:, 0].square().sum(1)

        assert float(kept(scale).min()) > -1e-12
        more = kept(scale + 1e-6)
        assert bool((more[scale < 1] < 0).all())
    assert bounded(torch.tensor(-1.0), torch.tensor(2.0), 0.5).item() == 0.0  # its own step already raises the error
    assert bounded(torch.tensor(-1.0), torch.tensor(-2.0), 0.5).item() == 1.0


def test_only_the_rejected_sides_gradient_is_scaled_and_no_value_changes():
    pairs, model = pairs_of(2, apart=0.2), model_of()
    with torch.no_grad():
        model.parameters()[0].fill_(0.1)
    (plain,), losses = run(DPOSettings(beta=3.0), model=model, pairs=pairs, reward=never)
    (safe,), safe_losses = run(DPOSettings(beta=3.0, safeguard="output"), model=model, pairs=pairs, reward=never)
    for name in ("excess_preferred", "excess_rejected", "prefers"):
        assert float(losses[0].metrics[name]) == float(safe_losses[0].metrics[name])
    assert float(losses[0].value.detach()) == float(safe_losses[0].value.detach())
    rng, cond = Random(0, 1, [0, 1]), model.encode_prompts(["cat"] * 2)
    eps, t = rng.normal("inject", SHAPE).double(), 1 - rng.uniform("level")
    e, m, on_b = [], [], []
    for k in (0, 1):
        xt = add_noise(pairs[:, k], eps, *flow_schedule(t))
        with torch.no_grad():
            policy, reference = (model.predict(xt, t, cond, weights=w).eps for w in ("policy", "reference"))
        e.append(policy - eps)
        m.append(excess_error(policy, reference, eps))
        on_b.append((1 - t).view(-1, 1, 1, 1) * 2 / 4 * (policy - eps))  # d m / d b: eps moves by (1 - t) b
    scale = safe_scale(e[0].flatten(1), e[1].flatten(1), 0.9)
    assert float(scale.max()) < 1 and float(safe_losses[0].metrics["safe_scale"]) == pytest.approx(float(scale.mean()))
    weight = (3.0 / 2 * torch.sigmoid(3.0 / 2 * (m[0] - m[1]))).view(-1, 1, 1, 1)
    expected = (weight * (on_b[0] - scale.view(-1, 1, 1, 1) * on_b[1])).mean(0)
    torch.testing.assert_close(safe, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(plain, (weight * (on_b[0] - on_b[1])).mean(0), atol=1e-12, rtol=0)


def preferred_error(model, pairs, ids, step):
    """excess_preferred of exactly the noise and times of a step."""
    _, losses = run(DPOSettings(), model=model, ids=ids, pairs=pairs, reward=never, step=step)
    return float(losses[0].metrics["excess_preferred"])


@pytest.mark.parametrize("mu", [0.1, 0.5])
def test_one_small_step_never_raises_the_preferred_error_and_a_plain_one_does(mu):
    """In parameter space the condition is exact to first order, whatever the network: many pairs that are alike, so
    that the rejected image's push hits the preferred one. Plain DPO raises the error in many of these steps."""
    raised = {"off": 0, "parameters": 0}
    for step in range(1, 41):
        pairs = torch.randn(2, 2, *SHAPE, dtype=D, generator=torch.Generator().manual_seed(step))
        pairs[:, 1] = 1.3 * pairs[:, 0] + 0.05 * pairs[:, 1]
        for safeguard in raised:
            model = model_of(trains=("velocity", "linear"))
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.2 * torch.randn(p.shape, dtype=D, generator=torch.Generator().manual_seed(100 + step)))
            before = preferred_error(model, pairs, (0, 1), step)
            settings = DPOSettings(beta=5.0, safeguard=safeguard, mu=mu)
            run(settings, model=model, pairs=pairs, reward=never, step=step, lr=1e-6)
            raised[safeguard] += preferred_error(model, pairs, (0, 1), step) > before + 1e-15
    assert raised["parameters"] == 0 and raised["off"] > 10


def test_gradients_of_a_network_that_is_cut_are_refused(monkeypatch):
    """FSDP2's pieces are in no graph: torch would end the run in the middle of its first step."""
    full = ["model.weights=full", "trainer.sharding=full"]
    with pytest.raises(InputError, match=r"trainer\.sharding cuts them"):
        recipe.read("dpo-emoji", [*full, "algorithm.safeguard=parameters"])
    recipe.read("dpo-emoji", [*full, "algorithm.safeguard=output"])
    monkeypatch.setattr("palate.algorithms.dpo.is_cut", lambda weight: True)
    with pytest.raises(InputError, match=r"trainer\.sharding cuts them"):
        run(DPOSettings(safeguard="parameters"), pairs=pairs_of(2), reward=never)
    run(DPOSettings(safeguard="output"), pairs=pairs_of(2), reward=never)


def test_parameters_that_no_prediction_depends_on_change_nothing():
    """As the last block of Qwen-Image has them: torch ends the run if it is asked for their gradient as it is."""

    class Idle(TinyFlow):
        idle = torch.nn.Parameter(torch.zeros(3))

        def parameters(self, weights="policy"):
            return [*super().parameters(weights), self.idle]

    found = []
    for model in (TinyFlow(), Idle()):
        batch = Batch(PROMPTS[:4], model.encode_prompts(PROMPTS[:4]), torch.arange(4))
        settings = DPOSettings(steps=2, guidance=1.0, beta=10.0, safeguard="parameters")
        (loss,) = DPO(settings).step(model, tiny_reward, batch, Random(0, 1, range(4)))
        loss.value.backward()
        found.append([p.grad for p in model.net.parameters()])
        assert float(loss.metrics["safe_scale"]) < 1
    assert all(torch.equal(plain, idle) for plain, idle in zip(*found, strict=True))


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "kto"])
def test_the_scale_counts_how_strongly_each_loss_pulls_at_either_side(loss):
    """A constant network, whose gradients in its parameters are those in its output: there the proxy is exact. kto
    pulls at the two sides with forces of its own, and ipo past its margin the other way round."""
    raised = {"off": 0, "output": 0}
    for step in range(1, 61):
        pairs = torch.randn(1, 2, *SHAPE, dtype=D, generator=torch.Generator().manual_seed(step))
        pairs[:, 1] = 1.3 * pairs[:, 0] + 0.05 * pairs[:, 1]
        for safeguard in raised:
            model = model_of()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.6 * torch.randn(p.shape, dtype=D, generator=torch.Generator().manual_seed(100 + step)))
            before = preferred_error(model, pairs, (0,), step)
            settings = DPOSettings(beta=20.0, loss=loss, safeguard=safeguard, mu=0.1)
            run(settings, model=model, ids=(0,), pairs=pairs, reward=never, step=step, lr=1e-6)
            raised[safeguard] += preferred_error(model, pairs, (0,), step) > before + 1e-15
    assert raised["output"] == 0 and raised["off"] > 30


@pytest.mark.slow
def test_the_safeguard_holds_over_a_run_at_ten_times_the_rate_at_which_plain_dpo_fails():
    """Gradient descent on pairs that are alike, 200 updates; the preferred error on noise and times of no update, 0 at
    the start. SDPO's scale alone holds it for some 160 of them, with `keep` it stays far below."""
    pairs = pairs_of(8)
    pairs[:, 1] = 1.3 * pairs[:, 0] + 0.05 * pairs[:, 1]
    worst = {}
    for safeguard, lr, keep in (("off", 2e-3, 0), ("off", 2e-2, 0), ("output", 2e-2, 0.3), ("parameters", 2e-2, 0.3)):
        model, errors = model_of(trains=("velocity", "linear")), []
        settings = DPOSettings(beta=50.0, safeguard=safeguard, keep=keep)
        for step in range(1, 201):
            run(settings, model=model, ids=range(8), pairs=pairs, reward=never, step=step, lr=lr)
            if step % 20 == 0:
                errors.append(sum(preferred_error(model, pairs, range(8), 1000 + k) for k in range(6)) / 6)
        worst[safeguard, lr] = max(errors)
    assert worst["off", 2e-3] > 0.01 and worst["off", 2e-2] > 0.1
    assert worst["output", 2e-2] < -0.02 and worst["parameters", 2e-2] < -0.02


def test_keep_pulls_only_where_the_preferred_error_has_risen():
    """Its gradient is keep beta/2 of the error's own, in closed form; at the reference, where m_w = 0, it is none."""
    pairs, settings = pairs_of(2), {"beta": 3.0}
    (plain,), _ = run(DPOSettings(**settings), pairs=pairs, reward=never)
    (same,), _ = run(DPOSettings(**settings, keep=2.0), pairs=pairs, reward=never)
    assert torch.equal(plain, same)
    model = model_of()
    with torch.no_grad():
        model.parameters()[0].fill_(-0.3)
    (plain,), losses = run(DPOSettings(**settings), model=model, pairs=pairs, reward=never)
    (kept,), more = run(DPOSettings(**settings, keep=2.0), model=model, pairs=pairs, reward=never)
    rng, cond = Random(0, 1, [0, 1]), model.encode_prompts(["cat"] * 2)
    eps, t = rng.normal("inject", SHAPE).double(), 1 - rng.uniform("level")
    xt = add_noise(pairs[:, 0], eps, *flow_schedule(t))
    with torch.no_grad():
        policy, reference = (model.predict(xt, t, cond, weights=w).eps for w in ("policy", "reference"))
    m = excess_error(policy, reference, eps)
    on_b = (1 - t).view(-1, 1, 1, 1) * 2 / 4 * (policy - eps)  # d m / d b: eps moves by (1 - t) b
    expected = plain + 2.0 * 3.0 / 2 * ((m > 0).view(-1, 1, 1, 1) * on_b).mean(0)
    torch.testing.assert_close(kept, expected, atol=1e-12, rtol=0)
    assert bool((m > 0).any())
    assert float(more[0].value) - float(losses[0].value) == pytest.approx(float((3.0 * m.relu()).mean()))


def test_scaled_gradient_keeps_the_value_to_the_last_bit():
    x = torch.tensor([0.1, 0.7], dtype=D, requires_grad=True)
    out = scaled_gradient(x, torch.tensor([0.3, 1.0], dtype=D))
    assert torch.equal(out.detach(), x.detach())
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [0.3, 1.0]


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "kto"])
def test_slopes_are_derivatives_of_the_losses_in_closed_form(loss):
    m_w, m_l, beta = torch.tensor([-0.1, 0.2, 0.9], dtype=D), torch.tensor([0.3, -0.1, 0.1], dtype=D), 4.0
    s = -beta / 2 * (m_w - m_l)
    exact = {
        "sigmoid": (-torch.nn.functional.logsigmoid(s), -torch.sigmoid(-s)),
        "hinge": ((1 - s).relu(), -(s < 1).double()),
        "ipo": ((s - 0.5) ** 2, 2 * (s - 0.5)),
    }
    if loss == "kto":
        a, b = torch.sigmoid(-beta / 2 * m_w), torch.sigmoid(beta / 2 * m_l)
        value, slopes = (1 - a) / 2 + (1 - b) / 2, (beta / 4 * a * (1 - a), -beta / 4 * b * (1 - b))
    else:
        value, ds = exact[loss]
        slopes = (-beta / 2 * ds, beta / 2 * ds)
    torch.testing.assert_close(pair_loss(m_w, m_l, beta, loss), value, atol=1e-12, rtol=0)
    for got, expected in zip(pair_slope(m_w, m_l, beta, loss), slopes, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_a_tie_is_least_where_the_policy_has_no_preference(loss):
    m = torch.linspace(-0.3, 0.3, 61, dtype=D)
    losses = pair_loss(m, torch.zeros_like(m), 10.0, loss, 0.5)
    assert float(losses[30]) <= float(losses.min()) + 1e-15
    torch.testing.assert_close(losses, losses.flip(0), atol=1e-12, rtol=0)


def test_ties_are_dropped_or_teach_indifference():
    settings = {"beta": 3.0, "steps": 2, "guidance": 1.0}
    close = 1e9  # everything is a tie
    model = model_of()
    with torch.no_grad():
        model.parameters()[0].fill_(0.3)
    (none,), losses = run(DPOSettings(tie_margin=close, **settings), model=model)
    assert torch.equal(none, torch.zeros_like(none)) and float(losses[0].metrics["ties"]) == 1.0
    (some,), _ = run(DPOSettings(tie_margin=close, ties="equal", **settings), model=model)
    (forth,), _ = run(DPOSettings(**settings), model=model)
    (back,), _ = run(DPOSettings(**settings), model=model, reward=lambda images, prompts: -linear(images, prompts))
    torch.testing.assert_close(some, (forth + back) / 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize("safeguard", ["output", "parameters"])
def test_a_pair_that_is_left_out_is_in_no_mean_and_protected_by_nobody(safeguard):
    """Of two drawn pairs one is a tie: gradient and metrics are those of the other one alone, the mean aside."""
    settings = {"beta": 2.0, "steps": 2, "guidance": 1.0, "safeguard": safeguard, "mu": 0.9}
    model = model_of(trains=("velocity", "linear"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn(p.shape, dtype=D, generator=torch.Generator().manual_seed(6)))
    (_, (tied,)), (own, (alone,)) = (run(DPOSettings(**settings), model=model, ids=(i,)) for i in (0, 1))
    close, far = float(tied.metrics["reward_gap"]), float(alone.metrics["reward_gap"])
    assert close < far
    both, (loss,) = run(DPOSettings(tie_margin=close, **settings), model=model, ids=(0, 1))
    assert float(loss.metrics["ties"]) == 0.5
    for name in ("prefers", "excess_preferred", "excess_rejected", "safe_scale"):
        assert float(loss.metrics[name]) == pytest.approx(float(alone.metrics[name]), abs=1e-12), name
    for mean, single in zip(both, own, strict=True):
        torch.testing.assert_close(mean, single / 2, atol=1e-12, rtol=0)
    _, (loss,) = run(DPOSettings(tie_margin=far, **settings), model=model, ids=(0, 1))
    assert set(loss.metrics) == {"reward", "reward_gap", "ties"}


def test_an_absent_image_is_not_looked_at_and_in_no_mean():
    """A like, a dislike and a pair: three networks' calls fewer than three pairs, and metrics of what is there. In
    `prefers` an absent image counts as the reference denoises it, which is an excess of 0."""
    settings, pairs, ids = DPOSettings(beta=3.0, loss="kto"), pairs_of(3), range(3)
    model = model_of()
    with torch.no_grad():
        model.parameters()[0].fill_(0.2)
    each = [run(settings, model=model, pairs=pairs[i : i + 1], ids=(i,))[1][0].metrics for i in ids]
    better, worse = ([float(m[f"excess_{side}"]) for m in each] for side in ("preferred", "rejected"))
    mixed = pairs.clone()
    mixed[0, 1] = mixed[1, 0] = math.nan
    model.forward = model.backward = 0
    _, (loss,) = run(settings, model=model, pairs=mixed, ids=ids)
    assert (model.forward, model.backward) == (2 * 4, 4)
    found = {name: float(value) for name, value in loss.metrics.items()}
    assert found["excess_preferred"] == pytest.approx((better[0] + better[2]) / 2, abs=1e-12)
    assert found["excess_rejected"] == pytest.approx((worse[1] + worse[2]) / 2, abs=1e-12)
    right = [better[0] < 0, worse[1] > 0, better[2] < worse[2]]
    assert found["prefers"] == pytest.approx(sum(right) / 3) and 0 < sum(right) < 3
    disliked = pairs.clone()
    disliked[:, 0] = math.nan
    _, (loss,) = run(DPOSettings(beta=3.0, loss="kto", safeguard="parameters"), model=model, pairs=disliked, ids=ids)
    assert "excess_preferred" not in loss.metrics and float(loss.metrics["safe_scale"]) == 1.0  # nothing to protect


def test_single_likes_and_dislikes():
    """kto of a pair is the sum of its two sides; a side that is NaN is absent, and only kto takes it."""
    pairs, settings = pairs_of(2), DPOSettings(beta=3.0, loss="kto")
    (both,), _ = run(settings, pairs=pairs, reward=never)
    liked, disliked = pairs.clone(), pairs.clone()
    liked[:, 1], disliked[:, 0] = math.nan, math.nan
    (like,), _ = run(settings, pairs=liked, reward=never)
    (dislike,), _ = run(settings, pairs=disliked, reward=never)
    torch.testing.assert_close(both, like + dislike, atol=1e-12, rtol=0)
    assert float(like.abs().max()) > 1e-3 and float(dislike.abs().max()) > 1e-3
    with pytest.raises(ValueError, match="single likes"):
        run(DPOSettings(), pairs=liked, reward=never)


def test_a_like_and_a_dislike_count_by_their_weights():
    """lambda_D times the like's gradient and lambda_U times the dislike's (KTO, eq. 7), and so in what the safeguard
    lets pass of the dislike: a drag twice as large, half the scale; lift as well, the same."""
    pairs = pairs_of(2, apart=0.2)
    model = model_of()
    with torch.no_grad():
        model.parameters()[0].fill_(0.1)

    def gradient(pairs=pairs, **settings):
        (found,), losses = run(DPOSettings(beta=3.0, loss="kto", **settings), model=model, pairs=pairs, reward=never)
        return found, float(losses[0].metrics.get("safe_scale", 0))

    liked, disliked = pairs.clone(), pairs.clone()
    liked[:, 1], disliked[:, 0] = math.nan, math.nan
    expected = 0.5 * gradient(liked)[0] + 3 * gradient(disliked)[0]
    weighed = gradient(desirable_weight=0.5, undesirable_weight=3.0)[0]
    torch.testing.assert_close(weighed, expected, atol=1e-12, rtol=0)
    plain = gradient(safeguard="parameters")[1]
    assert 0 < plain < 1
    assert gradient(safeguard="parameters", undesirable_weight=2.0)[1] == pytest.approx(plain / 2)
    assert gradient(safeguard="parameters", undesirable_weight=2.0, desirable_weight=2.0)[1] == pytest.approx(plain)


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_tracked_noise_is_what_each_image_was_made_from(schedule):
    settings, model = DPOSettings(beta=2.0, steps=3, guidance=1.0, noise="tracked"), model_of(schedule)
    (drawn,), _ = run(settings, model=model, ids=(5, 7))
    noise = Random(0, 1, [10, 11, 14, 15]).normal("rollout", SHAPE).double()
    x0 = sample(model, model.encode_prompts(["cat"] * 4), noise, 3, shift=1.0, weights="reference")
    order = [torch.argsort(linear(x0[i : i + 2], None), descending=True) + i for i in (0, 2)]
    sides = torch.stack([torch.cat([x0[o], noise[o]]) for o in order])  # preferred, rejected, their noises
    (given,), _ = run(settings, model=model, ids=(5, 7), pairs=sides, reward=never)
    torch.testing.assert_close(drawn, given, atol=1e-12, rtol=0)
    t, cond = 1 - Random(0, 1, [5, 7]).uniform("level"), model.encode_prompts(["cat"] * 2)
    alpha, sigma = schedule(t)
    expected = torch.zeros_like(drawn)
    for k, sign in ((0, 1), (1, -1)):  # at the reference s = 0: beta/2 1/2 d(m_w - m_l)/db, eps moves by c b
        eps = sides[:, 2 + k]
        e = model.predict(add_noise(sides[:, k], eps, alpha, sigma), t, cond, weights="reference").eps - eps
        expected += sign * (alpha / (alpha + sigma) * 2 / 4 * e).mean(0) * 2.0 / 4
    torch.testing.assert_close(drawn, expected, atol=1e-12, rtol=0)
    fresh, _ = run(DPOSettings(beta=2.0, steps=3, guidance=1.0), model=model, ids=(5, 7))
    assert float((fresh[0] - drawn).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="needs the noise"):
        run(settings, pairs=pairs_of(2), reward=never)


def test_the_best_and_the_worst_of_the_candidates_make_the_pair():
    settings, model = DPOSettings(beta=2.0, steps=2, guidance=1.0, candidates=4), model_of()
    (drawn,), losses = run(settings, model=model, ids=(3,))
    noise = Random(0, 1, [12, 13, 14, 15]).normal("rollout", SHAPE).double()
    x0 = sample(model, model.encode_prompts(["cat"] * 4), noise, 2, shift=1.0, weights="reference")
    scores = linear(x0, None)
    pairs = torch.stack([x0[scores.argmax()], x0[scores.argmin()]])[None]
    (given,), _ = run(settings, model=model, ids=(3,), pairs=pairs, reward=never)
    torch.testing.assert_close(drawn, given, atol=1e-12, rtol=0)
    assert float(losses[0].metrics["reward_gap"]) == pytest.approx(float(scores.max() - scores.min()))
    assert float(losses[0].metrics["reward"]) == pytest.approx(float(scores.mean()))


def test_online_pairs_come_from_the_policy():
    settings, model = DPOSettings(beta=2.0, steps=2, guidance=1.0, pairs_from="policy"), model_of()
    with torch.no_grad():
        model.parameters()[0].fill_(0.5)
    seen = []

    def reward(images, prompts):
        seen.append(images.clone())
        return linear(images, prompts)

    run(settings, model=model, reward=reward, ids=(3,))
    noise = Random(0, 1, [6, 7]).normal("rollout", SHAPE).double()
    with torch.no_grad():
        x0 = sample(model, model.encode_prompts(["cat"] * 2), noise, 2, shift=1.0)
    torch.testing.assert_close(seen[0], x0, atol=1e-12, rtol=0)


def test_the_reference_is_refreshed_and_survives_a_checkpoint():
    """After the refresh the reference is the policy: m = 0, and pairs of the reference are the policy's samples."""
    settings, model = DPOSettings(beta=2.0, steps=2, guidance=1.0, refresh_every=2), model_of()
    algorithm = DPO(settings)
    run(settings, model=model, algorithm=algorithm, step=1, lr=5.0)
    assert algorithm.reference is None
    run(settings, model=model, algorithm=algorithm, step=2, lr=5.0)
    theta = model.parameters()[0].detach().clone()
    assert torch.equal(algorithm.reference[0], theta) and float(theta.abs().max()) > 0.01
    _, losses = run(settings, model=model, algorithm=algorithm, step=3)
    assert float(losses[0].metrics["excess_preferred"]) == 0.0 == float(losses[0].metrics["excess_rejected"])
    with torch.no_grad():
        model.parameters()[0].add_(0.3)
    again = DPO(settings)
    again.load_state_dict(algorithm.state_dict())
    got = [run(settings, model=model, algorithm=a, step=3)[0][0] for a in (algorithm, again)]
    assert torch.equal(*got) and torch.equal(model.parameters()[0].detach(), theta + 0.3)
    fresh, _ = run(settings, model=model, step=3)
    assert not torch.equal(fresh[0], got[0])


def test_captions_are_dropped_and_pairs_flipped_in_their_share():
    model = model_of()
    model.means = {f"cat {i}": torch.full(SHAPE, 1.0, dtype=D) for i in range(200)}
    settings = DPOSettings(caption_dropout=0.3)
    prompts = [f"cat {i}" for i in range(200)]
    captions = DPO(settings)._captions(prompts, Random(0, 1, range(200)))
    assert 40 < captions.count("") < 80 and all(c in ("", p) for c, p in zip(captions, prompts, strict=True))
    settings = {"beta": 2.0, "steps": 2, "guidance": 1.0}
    drawn, _ = run(DPOSettings(**settings, flip=True), ids=range(40))
    noise = Random(0, 1, range(80)).normal("rollout", SHAPE).double()
    x0 = sample(model_of(), model.encode_prompts(["dog"] * 80), noise, 2, shift=1.0, weights="reference")
    x0 = x0.view(40, 2, *SHAPE)
    order = linear(x0.flatten(0, 1), None).view(40, 2).argsort(1, descending=True)
    pairs = torch.stack([x0[k, order[k]] for k in range(40)])
    plain, _ = run(DPOSettings(beta=2.0), ids=range(40), pairs=pairs, reward=never)
    flip = (Random(0, 1, range(40)).uniform("flip") < 0.5).view(-1, 1, 1, 1, 1)
    eps = Random(0, 1, range(40)).normal("inject", SHAPE).double()[:, None].expand(-1, 2, -1, -1, -1)
    mirrored = [torch.where(flip, part.flip(-1), part) for part in (pairs, eps)]  # the noise as well
    tracked, _ = run(DPOSettings(beta=2.0, noise="tracked"), ids=range(40), pairs=torch.cat(mirrored, 1), reward=never)
    torch.testing.assert_close(tracked[0], drawn[0], atol=1e-12, rtol=0)
    assert 10 < int(flip.sum()) < 30 and not torch.equal(plain[0], drawn[0])
    given, _ = run(DPOSettings(beta=2.0, flip=True), ids=range(40), pairs=pairs, reward=never)
    assert torch.equal(given[0], plain[0])  # given ones were mirrored as images, before they were encoded


def test_latents_are_drawn_from_the_encoders_gaussian():
    mean, std = pairs_of(2), 0.1 + pairs_of(2).abs()
    encoded = torch.cat([mean, std], 2)
    (got,), _ = run(DPOSettings(beta=2.0, posterior=True), pairs=encoded, reward=never)
    noise = Random(0, 1, [0, 1]).normal("posterior", (2, *SHAPE)).double()
    (expected,), _ = run(DPOSettings(beta=2.0), pairs=mean + std * noise, reward=never)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"algorithm\.posterior needs latents"):
        run(DPOSettings(posterior=True), pairs=mean, reward=never)


# ---------------------------------------------------------------- contracts


def test_two_micro_batches_add_up_to_the_whole_batch():
    settings = DPOSettings(beta=2.0, steps=2, guidance=1.0, safeguard="output", noise="tracked", pairs_from="policy")
    whole, _ = run(settings, ids=(0, 1, 2, 3))
    halves = [run(settings, ids=ids)[0][0] for ids in ((0, 1), (2, 3))]
    torch.testing.assert_close(whole[0], (halves[0] + halves[1]) / 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs_from": "policy"},
        {"candidates": 3, "guidance": 2.0},
        {"safeguard": "output"},
        {"safeguard": "parameters", "noise": "tracked", "caption_dropout": 0.5},
    ],
)
def test_calls(changes):
    model, settings = model_of(), DPOSettings(**({"beta": 2.0, "steps": 3, "guidance": 1.0} | changes))
    run(settings, model=model, ids=(0, 1, 2))
    calls = calls_per_update(settings)
    assert [model.forward, model.backward, model.decoded] == [3 * calls[n] for n in ("forward", "backward", "decode")]


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": "log"},
        {"safeguard": "on"},
        {"mu": 2},
        {"keep": -1},
        {"noise": "old"},
        {"pairs_from": "data"},
        {"candidates": 1},
        {"tie_margin": -1},
        {"ties": "keep"},
        {"ties": "equal", "loss": "kto"},
        {"refresh_every": -1},
        {"caption_dropout": 1},
        {"desirable_weight": 0},
        {"undesirable_weight": -1},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="DPOSettings expected"):
        DPOSettings(**wrong)

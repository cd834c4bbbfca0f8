"""What the authors' programs do: their noise, grids, units and constants, each against its formula or known figures."""

from __future__ import annotations

import math

import pytest
import torch
from support.gaussian import VP, C, Counted, D, linear, model_of

from palate.algorithms.ddpo import DDPOSettings
from palate.algorithms.dpo import DPOSettings
from palate.algorithms.flow_grpo import (
    FlowGRPO,
    FlowGRPOSettings,
    clipped_loss,
    divergence_mask,
    guarded_ratio,
    kl,
    own_steps,
    random_steps,
    ratio,
    rollout,
    trained_count,
)
from palate.algorithms.nft import NFT, NFTSettings, kl_of_released, old_decay, optimality, stratified
from palate.algorithms.refl import ReFL, ReFLSettings, approach
from palate.algorithms.sqdf import SQDFSettings, levels, released_levels, transition
from palate.algorithms.srpo import SRPO, SRPOSettings, truncated
from palate.core import Batch, Random
from palate.path import Prediction, add_noise, flow_schedule, move, vp_schedule
from palate.rewards.combine import weighted
from palate.rewards.groups import decoupled, standard_scores, win_rate
from palate.sampling import (
    eta_of_noise_level,
    log_prob,
    random_step,
    sample,
    time_grid,
    transition_std,
)


def pair(t, t_next):
    return flow_schedule(torch.tensor([t], dtype=D)), flow_schedule(torch.tensor([t_next], dtype=D))


# ---------------------------------------------------------------- the noise of a step


def euler_maruyama(x, velocity, t, t_next, std_per_root_time):
    """dx = [v + s^2/(2 t) (x + (1 - t) v)] dt + s dW, one step of the flow SDE as the papers write it."""
    drift = velocity + std_per_root_time**2 / (2 * t) * (x + (1 - t) * velocity)
    return x + drift * (t_next - t), std_per_root_time * math.sqrt(t - t_next)


@pytest.mark.parametrize("kind", ["flow_sde", "constant_sde"])
@pytest.mark.parametrize("t, t_next", [(0.9, 0.8), (0.3, 0.1), (0.5, 0.0)])
def test_the_published_sdes_take_their_euler_maruyama_step(kind, t, t_next):
    x0, eps = (torch.randn(1, 1, 2, 2, dtype=D) for _ in range(2))
    x, level = (1 - t) * x0 + t * eps, 0.7
    s = level * math.sqrt(t / (1 - t)) if kind == "flow_sde" else level
    mean, std = random_step(Prediction(x0, eps), *pair(t, t_next), level, kind)
    expected, expected_std = euler_maruyama(x, eps - x0, t, t_next, s)
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)
    assert float(std) == pytest.approx(expected_std, rel=1e-12)


def test_at_t_1_the_flow_sde_divides_by_the_next_level():
    zeros = torch.zeros(1, 1, 1, 1, dtype=D)
    _, std = random_step(Prediction(zeros, zeros), *pair(1.0, 0.875), 0.7, "flow_sde")
    assert float(std) == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.875)) * math.sqrt(0.125))


def test_the_coefficients_are_preserved_by_flow_cps_and_by_the_posterior_only():
    """alpha' x0 + sqrt(sigma'^2 - std^2) eps + std z has the variance sigma'^2; Euler-Maruyama has more."""
    levels_, zeros = pair(0.75, 0.5), torch.zeros(1, 1, 1, 1, dtype=D)
    unit = Prediction(zeros, zeros + 1)
    for kind, exact in (("posterior", True), ("coefficients", True), ("flow_sde", False), ("constant_sde", False)):
        mean, std = random_step(unit, *levels_, 0.7, kind)
        variance = float(mean) ** 2 + float(std) ** 2
        assert (abs(variance - 0.25) < 1e-12) == exact, kind
    _, std = random_step(unit, *levels_, 0.7, "coefficients")
    assert float(std) == pytest.approx(0.5 * math.sin(0.7 * math.pi / 2))
    with pytest.raises(ValueError, match="rectified flow"):
        random_step(unit, VP(torch.tensor([0.5], dtype=D)), VP(torch.tensor([0.4], dtype=D)), 0.7, "flow_sde")


def test_eta_of_a_noise_level_is_exact_at_every_step():
    times = time_grid(8)
    t, t_next = times[:-2], times[1:-1]
    eta = eta_of_noise_level(0.7, t, t_next)
    for i in range(7):
        now, following = flow_schedule(t[i : i + 1]), flow_schedule(t_next[i : i + 1])
        _, std = random_step(Prediction(*(torch.zeros(1, 1, 1, 1, dtype=D),) * 2), now, following, 0.7, "flow_sde")
        assert float(eta[i] * transition_std(*now, *following, 1.0)) == pytest.approx(float(std), rel=1e-12)
    assert float(eta.min()) == pytest.approx(0.8, abs=5e-3) and float(eta.max()) == pytest.approx(1.2652, abs=1e-4)
    short = eta_of_noise_level(0.7, torch.tensor([0.4], dtype=D), torch.tensor([0.4 - 1e-6], dtype=D))
    assert float(short) == pytest.approx(0.7 / math.sqrt(2), rel=1e-4)


# ---------------------------------------------------------------- Flow-GRPO, DanceGRPO, MixGRPO


def grpo(**changes):
    small = {"group": 3, "steps": 4, "eta": 0.8, "guidance": 1.0, "shift": 1.0, "beta": 0.0}
    return FlowGRPOSettings(**(small | changes))


def run(settings, *, model=None, reward=linear, ids=(0,), step=1, lr=0.0):
    model = model or model_of()
    prompts = [f"cat {i}" for i in ids]
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)))
    for p in model.parameters():
        p.grad = None
    first, losses = None, []
    for loss in FlowGRPO(settings).step(model, reward, batch, Random(0, step, ids)):
        loss.value.backward()
        losses.append(loss)
        if loss.update:
            first = first if first is not None else model.parameters()[0].grad.clone()
            with torch.no_grad():
                model.parameters()[0].sub_(lr * model.parameters()[0].grad)
            model.parameters()[0].grad = None
    return first, losses


@pytest.mark.parametrize("kind", ["posterior", "coefficients", "flow_sde", "constant_sde"])
def test_the_gradient_of_a_drawn_step_is_that_of_its_own_density(kind):
    """d log p / d mean = z / std, whichever noise; a velocity shift b moves the mean by its coefficient times b."""
    settings = grpo(noise=kind, density="joint", advantage_clip=1e9, steps=3)
    grad, _ = run(settings)
    model, rng = model_of(), Random(0, 1, [0, 1, 2])
    with torch.no_grad():
        x0, path = rollout(model, model.encode_prompts(["cat 0"] * 3), rng, None, settings)
    advantages = standard_scores(linear(x0, None), 3)
    expected = torch.zeros_like(C)
    for i, drawn in enumerate(path):
        now, following = flow_schedule(drawn.t), flow_schedule(drawn.t_next)
        unit = torch.ones(3, 1, 2, 2, dtype=D)  # velocity + 1: x0 - sigma, eps + alpha
        shift, std = random_step(Prediction(-now[1] * unit, now[0] * unit), now, following, 0.8, kind)
        z = rng.normal(f"sde-{i}", (1, 2, 2)).double()
        expected = expected - (advantages.view(-1, 1, 1, 1) * z / std * shift).mean(0) / len(path)
    torch.testing.assert_close(grad, expected, atol=1e-9, rtol=0)


def test_the_released_kl_is_the_exact_one_times_the_time_step():
    model = model_of()
    with torch.no_grad():
        model.parameters()[0].fill_(0.3)
    sizes = {}
    for unit in ("exact", "released"):
        _, losses = run(grpo(beta=0.1, kl_unit=unit), model=model)
        sizes[unit] = [float(loss.metrics["kl"]) for loss in losses]
    lengths = (time_grid(4)[:-2] - time_grid(4)[1:-1]).tolist()
    assert sizes["released"] == pytest.approx([k * dt for k, dt in zip(sizes["exact"], lengths, strict=True)], rel=1e-9)


def test_with_two_updates_per_batch_ratios_leave_1_and_the_clip_acts():
    _, losses = run(grpo(minibatches=1), ids=(0, 1), lr=5.0)
    assert all(float(loss.metrics["clipped"]) == 0 for loss in losses)
    _, losses = run(grpo(minibatches=3), ids=(0, 1), lr=5.0)
    assert all(float(loss.metrics["clipped"]) > 0 for loss in losses[3:])


def test_dance_grpo_trains_a_floor_of_the_steps_and_others_for_each_image():
    assert trained_count(15, 0.6) == 9 and trained_count(11, 0.6) == 7 and trained_count(11, 0.6, "down") == 6
    settings = grpo(group=50, steps=6, fraction=0.6, fraction_rounding="down", steps_per="sample")
    model, rng = model_of(), Random(0, 1, range(50))
    with torch.no_grad():
        _, path = rollout(model, model.encode_prompts(["cat"] * 50), rng, None, settings)
    chosen = own_steps(path, 3, rng)
    times = torch.stack([drawn.t for drawn in chosen])
    assert len(chosen) == 3 and all(len(set(times[:, k].tolist())) == 3 for k in range(50))
    assert len({tuple(sorted(times[:, k].tolist())) for k in range(50)}) > 3
    for drawn in chosen:  # every row is one that was drawn, whole
        for k in range(50):
            source = next(one for one in path if float(one.t[k]) == float(drawn.t[k]))
            assert torch.equal(source.x_next[k], drawn.x_next[k]) and torch.equal(source.x[k], drawn.x[k])
            assert float(source.log_prob[k]) == float(drawn.log_prob[k])
    mean, std = random_step(  # and its ratio is 1 under the policy that drew it
        model.predict(chosen[0].x, chosen[0].t, model.encode_prompts(["cat"] * 50)),
        flow_schedule(chosen[0].t), flow_schedule(chosen[0].t_next), settings.eta,
    )  # fmt: skip
    torch.testing.assert_close(log_prob(chosen[0].x_next, mean, std), chosen[0].log_prob, atol=1e-9, rtol=0)
    _, losses = run(settings, ids=(0,))
    assert len(losses) == 3 and all(float(loss.metrics["ratio"]) == pytest.approx(1, abs=1e-12) for loss in losses)
    _, losses = run(grpo(group=9, steps=5, fraction=0.6, steps_per="sample", ratio="guard"))
    assert all(float(loss.metrics["kl_old"]) < 1e-20 for loss in losses)  # means that were drawn with, each its own
    with pytest.raises(ValueError, match="so that a random step is left"):
        grpo(fraction=0.2, fraction_rounding="down")


def test_one_noise_for_a_group_or_for_all():
    model, cond = model_of(), model_of().encode_prompts(["cat"] * 6)
    images, groups = Random(0, 1, range(6)), Random(0, 1, [0, 1])
    starts = {}
    for same in (True, "all"):
        with torch.no_grad():
            _, path = rollout(model, cond, images, groups, grpo(same_noise=same))
        starts[same] = path[0].x
    assert torch.equal(starts[True][:1].expand(3, -1, -1, -1), starts[True][:3])
    assert not torch.equal(starts[True][0], starts[True][3])
    noise = Random(0, 1, [9]).shared_normal("rollout", (1, 2, 2)).double()
    assert torch.equal(starts["all"], noise.expand(6, -1, -1, -1))
    with pytest.raises(ValueError, match="same_noise"):
        grpo(same_noise="some")


def test_guarded_log_ratios_are_linear_in_the_noise_with_mean_zero():
    """log p / p_old + KL = z . (mean - mean_old) / std, so times std it is z . (mean - mean_old)."""
    old, now, z = (torch.randn(2000, 1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(i)) for i in range(3))
    now = old + 0.3 * now[:1]
    for std in (torch.full((2000, 1, 1, 1), s, dtype=D) for s in (0.05, 0.8)):
        x = old + std * z
        rho = guarded_ratio(log_prob(x, now, std), log_prob(x, old, std), kl(now, old, std), std, 4)
        torch.testing.assert_close(rho.log(), (z * (now - old)).flatten(1).mean(1), atol=1e-9, rtol=0)
        plain = ratio(log_prob(x, now, std), log_prob(x, old, std), 4).log().mean()
        assert float(plain) < -0.5 * float(kl(now, old, std).mean() / 4)  # biased downwards by the KL
        assert abs(float(rho.log().mean())) < 0.02


def test_the_guard_gives_every_step_the_same_weight():
    """d/db of -A rho / dt at the old policy is -A z . shift / (elements dt): it does not grow as std shrinks."""
    grad, losses = run(grpo(ratio="guard", steps=3, advantage_clip=1e9))
    model, rng, settings = model_of(), Random(0, 1, [0, 1, 2]), grpo(ratio="guard", steps=3)
    with torch.no_grad():
        x0, path = rollout(model, model.encode_prompts(["cat 0"] * 3), rng, None, settings)
    a = standard_scores(linear(x0, None), 3)
    expected = torch.zeros_like(C)
    for i, drawn in enumerate(path):
        now, following = flow_schedule(drawn.t), flow_schedule(drawn.t_next)
        unit = torch.ones(3, 1, 2, 2, dtype=D)
        shift, _ = random_step(Prediction(-now[1] * unit, now[0] * unit), now, following, 0.8)
        z, dt = rng.normal(f"sde-{i}", (1, 2, 2)).double(), (drawn.t - drawn.t_next).view(-1, 1, 1, 1)
        expected = expected - (a.view(-1, 1, 1, 1) * z * shift / dt).mean(0) / 4 / len(path)
    torch.testing.assert_close(grad, expected, atol=1e-9, rtol=0)
    assert all(float(loss.metrics["kl_old"]) < 1e-20 for loss in losses)


def test_the_guards_ratio_of_a_later_update_is_the_closed_form():
    """After an update by b the mean has moved by shift b, so rho = exp(mean z . (shift b)) and KL_old its square."""
    settings, model = grpo(ratio="guard", steps=3, minibatches=3), model_of()
    first, losses = run(settings, model=model, lr=3.0)
    rng, moved = Random(0, 1, [0, 1, 2]), -3.0 * first
    times = time_grid(3)
    for i in range(2):
        now, following = (flow_schedule(times[k : k + 1]) for k in (i, i + 1))
        unit = torch.ones(1, 1, 2, 2, dtype=D)
        shift, std = random_step(Prediction(-now[1] * unit, now[0] * unit), now, following, 0.8)
        z = rng.normal(f"sde-{i}", (1, 2, 2)).double()[1]  # the second minibatch is the second image
        metrics = losses[2 + i].metrics
        assert float(metrics["ratio"]) == pytest.approx(float((z * shift[0] * moved).mean().exp()), abs=1e-12)
        assert float(metrics["kl_old"]) == pytest.approx(float(((shift[0] * moved / std) ** 2 / 2).mean()), rel=1e-9)
        assert float(metrics["kl_old"]) > 1e-4


def test_the_divergence_mask_blocks_only_what_moves_away_beyond_the_limit():
    rho = torch.tensor([1.1, 1.1, 0.9, 0.9, 1.1, 0.9], dtype=D)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=D)
    moved = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.5, 0.5], dtype=D)
    assert divergence_mask(rho, advantages, moved, 1.0).tolist() == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]


def test_with_the_divergence_constraint_the_first_update_is_the_clips_and_later_ones_are_masked():
    first, _ = run(grpo(trust="kl", minibatches=3), ids=(0, 1))
    plain, _ = run(grpo(minibatches=3), ids=(0, 1))
    torch.testing.assert_close(first, plain, atol=1e-12, rtol=0)
    _, losses = run(grpo(trust="kl", minibatches=3, kl_limit=1e-9), ids=(0, 1), lr=5.0)
    assert float(losses[0].metrics["masked"]) == 0 and max(float(loss.metrics["masked"]) for loss in losses[3:]) > 0
    _, losses = run(grpo(trust="kl", minibatches=3, kl_limit=1e9), ids=(0, 1), lr=5.0)
    assert all(float(loss.metrics["masked"]) == 0 for loss in losses)


def test_a_reward_of_parts_is_compared_part_by_part():
    parts = {"a": (1.0, linear), "b": (0.5, lambda images, prompts: images.square().sum((1, 2, 3)))}
    grad, losses = run(grpo(per_reward=True, advantage_clip=1e9), reward=weighted(parts))
    model, rng, settings = model_of(), Random(0, 1, [0, 1, 2]), grpo()
    with torch.no_grad():
        x0, _ = rollout(model, model.encode_prompts(["cat 0"] * 3), rng, None, settings)
    scores = {name: (weight, part(x0, None)) for name, (weight, part) in parts.items()}
    total = sum(weight * values for weight, values in scores.values())
    assert float(losses[0].metrics["reward"]) == pytest.approx(float(total.mean()))
    joint, _ = run(grpo(advantage_clip=1e9), reward=weighted(parts))
    advantages, plain = decoupled(scores, 3), (total - total.mean()) / total.std(correction=0)
    assert float((advantages - plain).abs().max()) > 0.01 and float((grad - joint).abs().max()) > 1e-5
    by_hand, _ = run(grpo(advantage_clip=1e9), reward=lambda images, prompts: advantages)  # of mean 0 and std 1
    torch.testing.assert_close(grad, by_hand, atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match=r"reward\.weights"):
        run(grpo(per_reward=True))


def test_win_rate_makes_the_gradient_blind_to_the_rewards_scale():
    grad, _ = run(grpo(compare="win_rate"), reward=lambda images, prompts: linear(images, prompts).exp())
    same, _ = run(grpo(compare="win_rate"))
    other, _ = run(grpo(), reward=lambda images, prompts: linear(images, prompts).exp())
    assert torch.equal(grad, same) and not torch.equal(grad, other)
    wins, _ = run(grpo(), reward=lambda images, prompts: win_rate(linear(images, prompts), 3))
    torch.testing.assert_close(grad, wins, atol=1e-12, rtol=0)  # upwards, and not away from, the winners


# ---------------------------------------------------------------- DiffusionNFT


def test_the_programs_schedule_of_old_weights_of_its_ocr_run():
    assert [old_decay(i, 0.0075, 0.999, 75) for i in (1, 75, 76, 175, 400)] == [0.0, 0.0, 0.0075, 0.75, 0.999]
    assert [old_decay(i, 0.001, 0.5) for i in (1, 300, 700)] == [0.001, 0.3, 0.5]


def test_the_programs_optimality_is_advantages_clipped_at_five():
    """r = (clip(A, -5, 5) / 5) / 2 + 1/2 with A = (R - mean of the group) / std of all rewards."""
    rewards = torch.cat([torch.randn(8, dtype=D), 9 + 30 * torch.randn(8, dtype=D)])
    a = (rewards.view(2, 8) - rewards.view(2, 8).mean(1, keepdim=True)).flatten() / rewards.std(correction=0)
    expected = a.clamp(-5, 5) / 5 / 2 + 0.5
    torch.testing.assert_close(optimality(rewards, 8, 5.0, "batch"), expected, atol=1e-8, rtol=0)


def test_the_released_kl_weight_of_nft_gives_the_programs_gradient_up_to_a_factor():
    policy, apart = torch.randn(5, dtype=D), torch.randn(5, dtype=D)
    beta, weight = 0.1, 1e-4
    program = 5 / beta * policy + weight * apart
    ours = policy + kl_of_released(weight, beta) * apart
    torch.testing.assert_close(program / (5 / beta), ours, atol=1e-15, rtol=0)


def nft_gradient(model=None, ids=(0, 1), **changes):
    settings = NFTSettings(**({"group": 4, "steps": 2, "shift": 1.0, "n": 2, "kl": 0.0, "adaptive": False} | changes))
    model = model or model_of()
    prompts = [f"cat {i}" for i in ids]
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)))
    for loss in NFT(settings).step(model, linear, batch, Random(0, 1, ids)):
        loss.value.backward()
    return model.parameters()[0].grad


@pytest.mark.parametrize("shared_time", [False, True])
@pytest.mark.parametrize("is_stratified", [False, True])
def test_shared_noise_and_stratified_times_are_what_the_network_sees(shared_time, is_stratified):
    seen, noised = [], []

    class Watched(Counted):
        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            if torch.is_grad_enabled():
                seen.append(t)
                noised.append(xt)
            return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    model = Watched(torch.full((1, 2, 2), 0.2, dtype=D), 0.6, trains=("velocity",))
    nft_gradient(model, shared_noise=True, shared_time=shared_time, stratified=is_stratified)
    images, prompts = Random(0, 1, range(8)), [f"cat {k // 4}" for k in range(8)]
    with torch.no_grad():
        noise = images.normal("rollout", (1, 2, 2)).double()
        x0 = sample(model, model.encode_prompts(prompts), noise, 2, shift=1.0, weights="reference")
    for j, (t, xt) in enumerate(zip(seen, noised, strict=True)):  # each image is noised with its own group's noise
        eps = Random(0, 1, [0, 1]).normal(f"inject-{j}", (1, 2, 2)).double().repeat_interleave(4, 0)
        torch.testing.assert_close(xt, add_noise(x0, eps, *flow_schedule(t)), atol=1e-12, rtol=0)
    u = torch.stack([1 - t for t in seen])  # (n, images)
    for group in (u[:, :4], u[:, 4:]):
        assert (len(set(group[0].tolist())) == 1) == shared_time
        if is_stratified:
            assert bool((group[0] < 0.5).all()) and bool((group[1] >= 0.5).all())
            if not shared_time:
                assert sorted((8 * group.flatten()).floor().tolist()) == list(range(8))  # one in each of group n cells


def test_each_stratified_number_is_uniform():
    rng = Random(0, 1, range(4000))
    u = stratified(rng.uniform("a"), rng.uniform("b"), 4, 1, 2)
    assert bool((u >= 0.5).all()) and bool((u < 1).all())
    first = u.view(-1, 4)[:, 0]  # the first image of every group, whose cell must not be a favoured one
    counts = torch.histc(first.float(), 4, 0.5, 1.0)
    assert float((counts - 250).abs().max()) < 5 * math.sqrt(250 * 0.75)


def test_shared_noise_lowers_the_variance_of_the_gradient_and_keeps_its_mean():
    """The group's mean is subtracted, so what its images' noise has in common cancels: 400 steps of one group."""
    plain = torch.stack([nft_gradient(ids=(i,), n=1) for i in range(400)])
    shared = torch.stack([nft_gradient(ids=(i,), n=1, shared_noise=True, shared_time=True) for i in range(400)])
    error = (plain.var(0) / 400 + shared.var(0) / 400).sqrt()
    assert bool(((plain.mean(0) - shared.mean(0)).abs() < 4 * error).all())
    assert float(shared.var(0).sum()) < float(plain.var(0).sum())


# ---------------------------------------------------------------- constants, ReFL, SRPO, SQDF


def test_confirmed_constants():
    assert DDPOSettings().advantage_clip == 5.0 and DPOSettings().beta == 5000.0


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_refl_samples_by_the_ancestral_sampler_where_it_is_asked_to(schedule):
    """eta = 1 keeps the marginals of an exact model: x_t ~ N(alpha mu, alpha^2 s^2 + sigma^2), and each step is the
    posterior's; eta = 0 is the deterministic step."""
    settings, model = ReFLSettings(T=4, T1=2, T2=2, guidance=1.0, eta=1.0, hinge=None), model_of(schedule)
    rng = Random(0, 1, range(5))
    noise = rng.normal("rollout", (1, 2, 2)).double()
    cond = model.encode_prompts(["cat"] * 5)
    got, t = approach(model, cond, noise, settings, 2, lambda i: rng.normal(f"sde-{i}", (1, 2, 2)))
    x, times = noise, time_grid(4)
    for i in range(2):
        now, following = (schedule(times[k].expand(5)) for k in (i, i + 1))
        std = transition_std(*now, *following, 1.0)
        z = rng.normal(f"sde-{i}", (1, 2, 2)).double()
        x = move(model.predict(x, times[i].expand(5), cond), *following, std) + std * z
    torch.testing.assert_close(got, x, atol=1e-12, rtol=0)
    assert float(t[0]) == 0.5
    batch = Batch(["cat"], model.encode_prompts(["cat"]), torch.tensor([0]))
    seen = []

    def reward(images, prompts):
        seen.append(images.detach())
        return (images * C).sum((1, 2, 3))

    for eta in (0.0, 1.0):
        settings = ReFLSettings(T=4, T1=2, T2=2, guidance=1.0, eta=eta, hinge=None)
        for loss in ReFL(settings).step(model, reward, batch, Random(0, 1, [0])):
            loss.value.backward()
    assert not torch.equal(*seen)
    with pytest.raises(ValueError, match="eta"):
        ReFLSettings(eta=1.5)


def test_the_released_srpo_tells_the_network_truncated_times_in_the_rollout_too():
    told = []

    class Watched(Counted):
        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            told.append(float(t[0]))
            return super().predict(xt, t, cond, guidance=guidance, weights=weights)

    def watched():
        return Watched(torch.full((1, 2, 2), 0.2, dtype=D), 0.6, trains=("velocity",))

    def reward(images, prompts):
        return (images * C).sum((1, 2, 3))

    model = watched()
    batch = Batch(["cat"], model.encode_prompts(["cat"]), torch.tensor([0]))
    common = {"positive": ("a",), "negative": ("b",), "rollout_steps": 7}
    list(SRPO(SRPOSettings(levels="released", **common)).step(model, reward, batch, Random(0, 1, [0])))
    exact = time_grid(7, shift=3.0)[:-1]
    assert told[:7] == pytest.approx(truncated(exact).tolist(), abs=1e-15)
    assert any(abs(a - b) > 1e-4 for a, b in zip(told[:7], exact.tolist(), strict=True))
    told.clear()
    list(SRPO(SRPOSettings(**common)).step(watched(), reward, batch, Random(0, 1, [0])))
    assert told[:7] == pytest.approx(exact.tolist(), abs=1e-15)


def test_a_network_that_is_told_another_time_still_moves_from_where_it_is():
    """A constant velocity does not depend on what the network is told, so x0 = noise - velocity at any told time."""

    class Constant:
        schedule = staticmethod(flow_schedule)

        def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
            alpha, sigma = flow_schedule(t)
            return Prediction(xt - sigma * 3.0, xt + alpha * 3.0)

    noise = torch.randn(2, 1, 2, 2, dtype=D)
    got = sample(Constant(), None, noise, 7, shift=3.0, timestep=truncated)
    torch.testing.assert_close(got, noise - 3.0, atol=1e-12, rtol=0)


def test_the_released_grid_of_sqdf_weighs_the_last_step_twenty_times_less():
    """Training steps 981, 961, ..., 1, then 0 of Stable Diffusion's table: std and KL weights of the program."""
    times = released_levels(50)
    assert ((1000 * times).round() - 1).tolist() == [*range(981, 0, -20), 0]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=D) ** 2
    schedule = vp_schedule(torch.cumprod(1 - betas, 0))

    def weight(grid, i):  # KL = weight |d eps|^2
        now, following = (schedule(grid[k : k + 1]) for k in (i, i + 1))
        unit = torch.ones(1, 1, 1, 1, dtype=D)
        mean, std = transition(Prediction(-now[1] / now[0] * unit, unit), *now, *following, 1.0)
        return float(std), float(mean**2 / (2 * std**2))

    known = {0: (0.454463, 0.262709), 25: (0.287685, 0.141139), 48: (0.039480, 10.724235), 49: (0.020648, 1.006388)}
    for i, (std, twice) in known.items():
        got = weight(times, i)
        assert got[0] == pytest.approx(std, abs=1e-6) and 2 * got[1] == pytest.approx(twice, abs=1e-5)
    even = levels(50, shift=1.0, final_time=0.001)
    assert 20 < weight(even, 49)[1] / weight(times, 49)[1] < 22
    for wrong in ({"shift": 2.0}, {"final_time": 0.01}, {"rollout_steps": 700}):
        with pytest.raises(ValueError, match="released"):
            SQDFSettings(grid="released", **wrong)


def test_mix_grpos_window_is_unchanged():
    assert list(random_steps(grpo(window=1, window_every=2), 3)) == [1]
    assert clipped_loss(torch.tensor([1.2]), torch.tensor([1.0]), 0.1).item() == pytest.approx(-1.1)

"""algorithms/opd.py: the student's gradient in closed form, whose teacher speaks, the fixed point, what is called."""

from __future__ import annotations

import pytest
import torch
from support.gaussian import VP, C, Counted, D

from palate.algorithms.opd import (
    OPD,
    OPDSettings,
    Teacher,
    calls_per_update,
    chosen_steps,
    matching,
    route,
    routes_of,
    step_kl,
    visited,
)
from palate.core import Batch, Random
from palate.path import flow_schedule
from palate.sampling import random_step, sample, time_grid, transition_std

SHAPE = (1, 2, 2)
TEACHERS = {
    "warm": Teacher("runs/a", prompts=("cat 0", "cat 2")),
    "cold": Teacher("runs/a", prompts=("cat 1", "cat 2")),
}
SHIFT = {"warm": C, "cold": -0.5 * C.flip(-1)}


def never(images, prompts):
    raise AssertionError("teachers need no reward")


def model_of(schedule=flow_schedule):
    model = Counted(
        torch.full(SHAPE, 0.2, dtype=D), 0.6, schedule=schedule, trains=("velocity",), networks=("policy", *SHIFT)
    )
    with torch.no_grad():
        for name, shift in SHIFT.items():
            model.networks[name]["velocity"].copy_(shift)
    return model


def settings_of(**changes):
    return OPDSettings(**({"teachers": TEACHERS, "steps": 4, "shift": 1.0} | changes))


def run(settings, *, model=None, ids=(0, 1), prompts=None, step=1, lr=0.0):
    model = model or model_of()
    prompts = prompts or [f"cat {i}" for i in ids]
    batch = Batch(prompts, model.encode_prompts(prompts), torch.tensor(list(ids)))
    for p in model.parameters():
        p.grad = None
    losses = []
    for loss in OPD(settings).step(model, never, batch, Random(0, step, ids)):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
    grad = model.parameters()[0].grad.clone()
    with torch.no_grad():
        model.parameters()[0].sub_(lr * grad)
    return grad, losses


@pytest.mark.parametrize("target", ["velocity", "x_next", "x0"])
def test_gradient_of_matched_means_in_closed_form(target):
    """Velocities differ by b - c at every state: d/db = mean over steps of w 2 (b - c) / D, w = 1, dt^2 or t^2."""
    times = time_grid(4)
    weight = {
        "velocity": 1.0,
        "x_next": float((times[:-1] - times[1:]).square().mean()),
        "x0": float(times[:-1].square().mean()),
    }[target]
    model = model_of()
    with torch.no_grad():
        model.parameters()[0].fill_(0.3)
    grad, losses = run(settings_of(target=target), model=model)
    expected = sum(weight * 2 / 4 * (0.3 - shift) for shift in SHIFT.values()) / 2
    torch.testing.assert_close(grad, expected, atol=1e-12, rtol=0)
    for name, shift in SHIFT.items():
        got = sum(float(loss.metrics[f"distance_{name}"]) for loss in losses) / len(losses)
        assert got == pytest.approx(weight * float((0.3 - shift).square().mean()))


@pytest.mark.parametrize("schedule", [flow_schedule, VP], ids=["flow", "vp"])
def test_with_noise_it_is_the_exact_kl_of_the_step(schedule):
    """KL = |shift of the mean|^2 / (2 std^2) per element; a velocity shift moves the mean by its own coefficient."""
    model, times = model_of(schedule), time_grid(4)
    grad, losses = run(settings_of(eta=0.7), model=model, ids=(0,))
    assert len(losses) == 3
    expected = torch.zeros(1, *SHAPE, dtype=D)
    for i in range(3):
        (alpha, sigma), (a, s) = (schedule(times[k : k + 1]) for k in (i, i + 1))
        std = transition_std(alpha, sigma, a, s, 0.7)
        moved = (-a * sigma + (s * s - std * std).sqrt() * alpha) / (alpha + sigma)  # d mean / d velocity
        expected += moved**2 * -C / std**2 / 4 / 3
        value = float((moved * C).square().mean() / (2 * std**2))
        assert float(losses[i].metrics["distance"]) == pytest.approx(value)
    torch.testing.assert_close(grad, expected[0], atol=1e-12, rtol=0)


def test_the_student_becomes_its_teachers_and_a_prompt_of_two_teachers_their_mean():
    for prompt, target in (("cat 0", SHIFT["warm"]), ("cat 1", SHIFT["cold"]), ("cat 2", sum(SHIFT.values()) / 2)):
        model = model_of()
        for step in range(1, 40):
            run(settings_of(), model=model, ids=(0, 1), prompts=[prompt] * 2, step=step, lr=0.5)
        torch.testing.assert_close(model.parameters()[0].detach(), target, atol=1e-3, rtol=0)


def test_states_are_the_students_own():
    model, settings = model_of(), settings_of()
    with torch.no_grad():
        model.parameters()[0].fill_(0.3)
        states, times = visited(model, model.encode_prompts(["cat"] * 2), Random(0, 1, [0, 1]), settings)
        noise = Random(0, 1, [0, 1]).normal("rollout", SHAPE).double()
        assert torch.equal(states[0], noise) and len(states) == 4 and len(times) == 5
        pred = model.predict(states[-1], times[3].expand(2), model.encode_prompts(["cat"] * 2))
        torch.testing.assert_close(
            pred.x0, sample(model, model.encode_prompts(["cat"] * 2), noise, 4, shift=1.0), atol=1e-12, rtol=0
        )
        states, _ = visited(model, model.encode_prompts(["cat"] * 2), Random(0, 1, [0, 1]), settings_of(eta=0.7))
        now, following = (flow_schedule(times[k].expand(2)) for k in (0, 1))
        first = model.predict(noise, times[0].expand(2), model.encode_prompts(["cat"] * 2))
        mean, std = random_step(first, now, following, 0.7)
        drawn = mean + std * Random(0, 1, [0, 1]).normal("sde-0", SHAPE).double()
        torch.testing.assert_close(states[1], drawn, atol=1e-12, rtol=0)


def test_routes():
    routes = routes_of(TEACHERS)
    assert [route(routes, "cat 2", i) for i in range(4)] == ["warm", "cold", "warm", "cold"]
    assert route(routes, "cat 0", 5) == "warm"
    with pytest.raises(ValueError, match="no teacher has the prompt 'dog'"):
        route(routes, "dog", 0)
    animals = routes_of({"zoo": Teacher("runs/a", prompts=("a unicorn",), file="animals")})
    assert route(animals, "zebra", 0) == route(animals, "a unicorn", 0) == "zoo" and len(animals) == 46
    routes = routes_of({"warm": Teacher("runs/a", prompts=("cat 0",)), "all": Teacher("runs/a")})
    assert route(routes, "dog", 3) == "all" and [route(routes, "cat 0", i) for i in (0, 1)] == ["warm", "all"]


def test_a_teacher_may_be_guided_where_the_student_is_not():
    model = model_of()
    model.means = {"cat 0": torch.full(SHAPE, 1.0, dtype=D)}
    with torch.no_grad():
        for name in SHIFT:
            model.networks[name]["velocity"].zero_()
    plain, _ = run(settings_of(), model=model, ids=(0,))
    guided, _ = run(settings_of(teachers={"warm": Teacher("runs/a", guidance=3.0)}), model=model, ids=(0,))
    assert float(plain.abs().max()) < 1e-12 and float(guided.abs().max()) > 1e-2


def test_a_teacher_hears_the_prompts_and_sees_the_states_of_its_own_samples():
    """Teachers by turns, prompts of means of their own: two samples together are what each of them is alone."""
    model = model_of()
    model.means = {"cat 0": torch.full(SHAPE, 1.0, dtype=D), "cat 1": torch.full(SHAPE, -2.0, dtype=D)}
    mixed = settings_of(teachers={n: Teacher("runs/a", prompts=TEACHERS[n].prompts, guidance=2.0) for n in SHIFT})
    prompts = ["cat 1", "cat 0", "cat 1", "cat 0"]  # cold, warm, cold, warm: no teacher's samples come first
    together, losses = run(mixed, model=model, ids=range(4), prompts=prompts)
    alone = [run(mixed, model=model, ids=(i,), prompts=[prompts[i]]) for i in range(4)]
    torch.testing.assert_close(together, sum(grad for grad, _ in alone) / 4, atol=1e-12, rtol=0)
    for name, rows in (("cold", (0, 2)), ("warm", (1, 3))):
        own = sum(float(alone[i][1][0].metrics["distance"]) for i in rows) / 2
        assert float(losses[0].metrics[f"distance_{name}"]) == pytest.approx(own)


def test_part_of_the_steps():
    chosen = [tuple(chosen_steps(6, 2, Random(0, step, [0]))) for step in range(1, 100)]
    assert {len(c) for c in chosen} == {2} and len(set(chosen)) > 10 and all(a < b for a, b in chosen)
    assert chosen_steps(6, 2, Random(0, 1, [0])) == chosen_steps(6, 2, Random(0, 1, [8, 9]))
    assert chosen_steps(3, None, Random(0, 1, [0])) == [0, 1, 2]
    _, losses = run(settings_of(steps_trained=2))
    assert [loss.update for loss in losses] == [None, "policy"]


def test_equations():
    ours, theirs = torch.tensor([[[[1.0, 3.0]]]], dtype=D), torch.tensor([[[[0.0, 0.0]]]], dtype=D)
    assert float(matching(ours, theirs)) == 5.0 and float(matching(ours, theirs, normalised=True)) == 2.5
    assert float(step_kl(ours, theirs, torch.full((1, 1, 1, 1), 0.5, dtype=D))) == 10.0
    leaf = ours.clone().requires_grad_()
    (grad,) = torch.autograd.grad(matching(leaf, theirs, normalised=True).sum(), leaf)
    assert grad.flatten().tolist() == [0.5, 1.5]  # the divisor has no gradient


def test_two_micro_batches_add_up_to_the_whole_batch():
    whole, _ = run(settings_of(eta=0.5), ids=(0, 1, 2, 3), prompts=["cat 0", "cat 1", "cat 2", "cat 2"])
    halves = [
        run(settings_of(eta=0.5), ids=ids, prompts=prompts)[0]
        for ids, prompts in (((0, 1), ["cat 0", "cat 1"]), ((2, 3), ["cat 2", "cat 2"]))
    ]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"eta": 0.5}, {"steps_trained": 1}, {"guidance": 2.0, "target": "x0"}])
def test_calls(changes):
    model, settings = model_of(), settings_of(**changes)
    run(settings, model=model, ids=(0, 1, 2))
    calls = calls_per_update(settings)
    assert [model.forward, model.backward, model.decoded] == [3 * calls[k] for k in ("forward", "backward", "decode")]


@pytest.mark.parametrize(
    "wrong",
    [
        {"teachers": {}},
        {"teachers": {"policy": Teacher("runs/a")}},
        *({"teachers": {name: Teacher("runs/a")}} for name in ("v1.5", "keys", "training", "")),
        {"steps": 0},
        {"steps_trained": 5},
        {"steps_trained": 0},
        {"shift": 0},
        {"eta": 2},
        {"eta": 0.5, "steps": 1},
        {"eta": 0.5, "target": "x0"},
        {"eta": 0.5, "normalised": True},
        {"target": "x"},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="OPDSettings expected"):
        settings_of(**wrong)

"""rewards/learned.py: the head's closed form, its memory, its gradient."""

from __future__ import annotations

import pytest
import torch

from palate.rewards.learned import RIDGES, BlackBox, RewardHead, fitted, leave_one_out, ridge_head

D = torch.float64


def data(n=40, f=3, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, f, dtype=D, generator=generator) * torch.tensor([1.0, 10.0, 0.1], dtype=D)[:f] + 2
    answers = 5 + features @ torch.tensor([1.0, -0.2, 3.0], dtype=D)[:f]
    return features, answers + noise * torch.randn(n, dtype=D, generator=generator)


def test_the_head_is_the_minimum_and_the_constant_is_not_penalised():
    features, answers = data()
    phi = torch.cat([features, torch.ones(len(features), 1, dtype=D)], 1)
    w = ridge_head(phi, answers, 3.0).requires_grad_()
    value = (phi @ w - answers).square().sum() + 3.0 * w[:-1].square().sum()
    assert float(torch.autograd.grad(value, w)[0].abs().max()) < 1e-9


def test_leave_one_out_is_what_fitting_n_times_gives():
    features, answers = data(n=12)
    phi = torch.cat([features, torch.ones(len(features), 1, dtype=D)], 1)
    got = leave_one_out(phi, answers, 0.5)
    for i in range(12):
        rest = torch.arange(12) != i
        expected = answers[i] - phi[i] @ ridge_head(phi[rest], answers[rest], 0.5)
        assert float(got[i]) == pytest.approx(float(expected), abs=1e-9)


def test_it_predicts_in_standard_deviations_with_a_constant_gradient():
    features, answers = data(n=200)
    head = RewardHead(500)
    head.tell(features, answers)
    leaf = features.clone().requires_grad_()
    predicted = head(leaf)
    standard = (answers - answers.mean()) / answers.std(correction=0)
    assert float((predicted - standard).detach().abs().mean()) < 0.1 and head.fit.explained > 0.98
    (grad,) = torch.autograd.grad(predicted.sum(), leaf)
    slope = torch.tensor([1.0, -0.2, 3.0], dtype=D) / answers.std(correction=0)
    torch.testing.assert_close(grad, slope.expand_as(grad), atol=0.02, rtol=0.05)
    best = {ridge: float(leave_one_out_error(features, answers, ridge)) for ridge in RIDGES}
    assert fitted(features, answers).ridge == min(best, key=best.get)


def leave_one_out_error(features, answers, ridge):
    phi = (features - features.mean(0)) / features.std(0, correction=0)
    targets = (answers - answers.mean()) / answers.std(correction=0)
    return leave_one_out(torch.cat([phi, torch.ones_like(phi[:, :1])], 1), targets, ridge).square().mean()


def test_memory_is_the_newest_answers_and_survives_a_checkpoint():
    features, answers = data(n=30)
    head, whole = RewardHead(20), RewardHead(20)
    for k in range(0, 30, 5):
        head.tell(features[k : k + 5], answers[k : k + 5])
    whole.tell(features[10:], answers[10:])
    assert len(head) == 20 and torch.equal(head(features), whole(features))
    again = RewardHead(20)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(features), head(features))


def test_answers_that_say_nothing_or_are_not_numbers():
    head = RewardHead(10)
    head.tell(torch.randn(5, 2, dtype=D), torch.ones(5, dtype=D))
    assert head.fit.explained == 0.0 and float(head(torch.randn(3, 2, dtype=D)).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="not finite"):
        head.tell(torch.randn(1, 2, dtype=D), torch.tensor([torch.nan], dtype=D))
    with pytest.raises(ValueError, match="no answers"):
        RewardHead(10)(torch.randn(1, 2))
    with pytest.raises(ValueError, match="memory"):
        RewardHead(1)


def test_a_black_box_has_no_gradient():
    box = BlackBox(lambda images, prompts: images.mean((1, 2, 3)), lambda images, prompts: images.flatten(1))
    images = torch.rand(2, 3, 2, 2, requires_grad=True)
    assert not box(images, ["a", "b"]).requires_grad and box.features(images, ["a", "b"]).requires_grad

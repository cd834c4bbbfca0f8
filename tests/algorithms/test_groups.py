"""rewards/groups.py: scores inside a group; rewards that are equal up to rounding, in every method that compares."""

from __future__ import annotations

import pytest
import torch
from support.gaussian import D

from palate.algorithms import ddpo, flow_grpo, nft
from palate.algorithms.ddpo import DDPO, DDPOSettings
from palate.rewards.groups import decoupled, differences, standard_scores, win_rate


def draw(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def nearly_equal(dtype):
    """A group whose rewards differ in the last bit only, beside one that really differs."""
    one = torch.tensor(21.7, dtype=dtype)
    up, down = torch.nextafter(one, one + 1), torch.nextafter(one, one - 1)
    return torch.stack([one, up, down, one, *draw(4, dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a_group_that_is_equal_up_to_the_last_bit_says_nothing_in_any_method(dtype):
    rewards = nearly_equal(dtype)
    for baseline in ("group", "batch"):
        scores = flow_grpo.group_advantages(rewards, 4, baseline)
        assert scores[:4].tolist() == [0.0] * 4 and float(scores[4:].abs().min()) > 0.01
        assert nft.optimality(rewards, 4, 1.0, baseline)[:4].tolist() == [0.5] * 4
    assert win_rate(rewards, 4)[:4].tolist() == [0.5] * 4
    assert decoupled({"a": (1.0, rewards)}, 4)[:4].tolist() == [0.0] * 4
    assert ddpo.standardised(rewards[:4]).tolist() == [0.0] * 4
    algorithm = DDPO(DDPOSettings(history=4, enough=4))
    algorithm.advantages(["cat"] * 2, rewards[:2])
    assert algorithm.advantages(["cat"] * 2, rewards[2:4]).tolist() == [0.0] * 2  # from the prompt's own history


@pytest.mark.parametrize("unit", [1e-9, 1e-3, 1.0, 1e6])
def test_scores_do_not_depend_on_the_rewards_unit_or_origin(unit):
    rewards = draw(24)
    exact = standard_scores(rewards, 6)
    grouped = rewards.view(-1, 6)
    plain = (grouped - grouped.mean(1, keepdim=True)) / grouped.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(exact, plain.flatten(), atol=1e-7, rtol=0)
    torch.testing.assert_close(standard_scores(unit * rewards, 6), exact, atol=1.1e-4 * 3, rtol=0)
    torch.testing.assert_close(win_rate(unit * rewards + 3 * unit, 6), win_rate(rewards, 6), atol=0, rtol=0)


def test_unbiased_and_batch_wide_deviations():
    rewards = draw(12)
    grouped = rewards.view(-1, 4)
    centred = grouped - grouped.mean(1, keepdim=True)
    for unbiased in (False, True):
        own = centred / grouped.std(1, correction=int(unbiased), keepdim=True)
        wide = centred / rewards.std(correction=int(unbiased))
        torch.testing.assert_close(standard_scores(rewards, 4, unbiased=unbiased), own.flatten(), atol=1e-7, rtol=0)
        got = standard_scores(rewards, 4, baseline="batch", unbiased=unbiased)
        torch.testing.assert_close(got, wide.flatten(), atol=1e-7, rtol=0)


def test_win_rate_counts_ties_half():
    assert win_rate(torch.tensor([3.0, 1.0, 1.0, 0.0]), 4).tolist() == pytest.approx([1.0, 0.5, 0.5, 0.0])
    rewards = draw(10)
    torch.testing.assert_close(win_rate(rewards.exp(), 5), win_rate(rewards, 5), atol=0, rtol=0)
    torch.testing.assert_close(win_rate(rewards, 5).view(-1, 5).mean(1), torch.full((2,), 0.5, dtype=D))


def test_decoupled_weighs_standard_scores_and_not_units():
    """GDPO: with equal weights a reward of a thousandth of the spread has the same say; the sum does not hear it."""
    large, small = 1000 * draw(8, seed=1), draw(8, seed=2)
    parts = {"large": (1.0, large), "small": (1.0, small)}
    total = standard_scores(large, 4) + standard_scores(small, 4)
    torch.testing.assert_close(decoupled(parts, 4), total / total.std(correction=0), atol=1e-7, rtol=0)
    swapped = decoupled({"large": (1.0, large / 1e6), "small": (1.0, small)}, 4)
    torch.testing.assert_close(decoupled(parts, 4), swapped, atol=1e-3, rtol=0)
    uneven = standard_scores(large, 4) + 3 * standard_scores(small, 4)
    torch.testing.assert_close(
        decoupled({"large": (1.0, large), "small": (3.0, small)}, 4),
        uneven / uneven.std(correction=0),
        atol=1e-7,
        rtol=0,
    )
    weighted = decoupled({"large": (0.0, large), "small": (2.0, small)}, 4)
    alone = standard_scores(small, 4)
    torch.testing.assert_close(weighted, alone / alone.std(correction=0), atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match="got no rewards"):
        decoupled({}, 4)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_decoupled_rewards_that_cancel_say_nothing(dtype):
    """b = 7 - a / 3: equal weights cancel but for rounding, which must not become advantages of size 1; where one group
    cancels and another does not, the second alone is heard."""
    a = draw(8, seed=1).to(dtype)
    b = 7 - a / 3
    assert float(decoupled({"a": (1.0, a), "b": (1.0, b)}, 4).abs().max()) == 0
    b[4:] = a[4:]
    found = decoupled({"a": (1.0, a), "b": (1.0, b)}, 4)
    assert float(found[:4].abs().max()) == 0 and float(found[4:].abs().max()) > 0.5
    little = decoupled({"a": (1.0, a), "b": (1.0, b + 1e-3 * draw(8, seed=3).to(dtype))}, 4)
    assert float(little[:4].abs().max()) > 0  # not rounding


def test_differences_are_exact():
    rewards = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0])
    assert differences(rewards, 3).tolist() == [[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]]

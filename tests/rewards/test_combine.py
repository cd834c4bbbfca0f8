"""rewards/combine.py: the formulas of SRPO's rewards on a linear two-tower reward, and what a bad reward is told."""

from __future__ import annotations

import math

import pytest
import torch

from palate.rewards.combine import (
    checked,
    interpolated,
    noised_relative,
    normalised,
    relative,
    reward_scale,
    score_pair,
    semantic_interpolated,
    semantic_relative,
    weighted,
    with_control,
)

WORDS = {
    "3d": torch.tensor([1.0, 0.0, 2.0]),
    "flat": torch.tensor([0.0, -1.0, 2.0]),
    "cat": torch.tensor([0.5, 0.5, 7.0]),
}


class Linear:
    """R(x, p) = <mean colour of x, sum of the prompt's word vectors>, counting what each tower does."""

    def __init__(self):
        self.image_calls = self.text_calls = 0

    def image_features(self, images):
        self.image_calls += 1
        return images.mean((2, 3))

    def score(self, features, prompts):
        self.text_calls += 1
        texts = torch.stack([sum(WORDS[w] for w in p.replace(".", "").split()) for p in prompts])
        return (features * texts).sum(1)

    def __call__(self, images, prompts):
        return self.score(self.image_features(images), prompts)


IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = ["cat", "cat flat"]


def test_control_words_stand_before_the_prompt():
    assert with_control("3d", ["a cat", "{prompt}"]) == ["3d. a cat", "3d. {prompt}"]
    assert with_control("", ["a cat"]) == ["a cat"]
    assert with_control("3d", ["a cat"], "{prompt}, {control}") == ["a cat, 3d"]


@pytest.mark.parametrize("k", [0.0, 0.3, -0.1])
def test_semantic_relative_is_the_formula_and_sees_the_image_once(k):
    reward = Linear()
    got = semantic_relative(reward, "3d", "flat", k)(IMAGES, PROMPTS)
    assert (reward.image_calls, reward.text_calls) == (1, 2)
    expected = (1 + k) * reward(IMAGES, ["3d. cat", "3d. cat flat"]) - reward(IMAGES, ["flat. cat", "flat. cat flat"])
    torch.testing.assert_close(got, expected)
    plain = semantic_relative(lambda x, p: Linear()(x, p), "3d", "flat", k)(IMAGES, PROMPTS)
    torch.testing.assert_close(plain, expected)


def test_relative_cancels_what_the_prompts_share():
    images = IMAGES.double()
    value = semantic_relative(Linear(), "3d", "flat")(images, PROMPTS)
    torch.testing.assert_close(value, images.mean((2, 3)) @ (WORDS["3d"] - WORDS["flat"]).double())  # no "cat" in it
    swapped = semantic_relative(Linear(), "flat", "3d")(images, PROMPTS)
    torch.testing.assert_close(swapped, -value)
    same = images.clone().requires_grad_()
    zero = semantic_relative(Linear(), "3d", "3d")(same, PROMPTS)
    zero.sum().backward()
    assert torch.equal(zero, torch.zeros_like(zero)) and torch.equal(same.grad, torch.zeros_like(images))


def test_the_two_cfg_forms_differ_by_where_the_absolute_reward_stays():
    first, second = score_pair(Linear(), IMAGES, ["3d"] * 2, ["flat"] * 2)
    for k in (0.0, 0.25, 1.0):
        torch.testing.assert_close(interpolated(first, second, k), second + k * (first - second))
        torch.testing.assert_close(relative(first, second, k), (first - second) + k * first)
    built = semantic_interpolated(Linear(), "3d", "flat", 0.25)(IMAGES, PROMPTS)
    pair = score_pair(Linear(), IMAGES, with_control("3d", PROMPTS), with_control("flat", PROMPTS))
    torch.testing.assert_close(built, 0.75 * pair[1] + 0.25 * pair[0])


def test_weighted_sums_and_stays_two_tower():
    one, two = Linear(), Linear()
    bright = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    mixed = weighted({"one": (2.0, one), "two": (-0.5, two), "bright": (3.0, bright)})
    expected = 1.5 * Linear()(IMAGES, PROMPTS) + 3.0 * IMAGES.mean((1, 2, 3))
    torch.testing.assert_close(mixed(IMAGES, PROMPTS), expected)
    semantic_relative(mixed, "3d", "flat")(IMAGES, PROMPTS)
    assert one.image_calls == two.image_calls == 2
    with pytest.raises(ValueError, match="at least one"):
        weighted({})


def test_normalised_has_mean_zero_and_deviation_one_on_its_reference():
    mean, std = reward_scale(Linear(), IMAGES, PROMPTS)
    values = normalised(Linear(), mean, std)(IMAGES, PROMPTS)
    assert abs(values.mean()) < 1e-5 and abs(values.std(correction=0) - 1) < 1e-4
    with pytest.raises(ValueError, match="does not vary"):
        normalised(Linear(), 0.0, 0.0)


def test_noised_negative_rewards_what_noise_destroys():
    smooth = torch.full((4, 3, 16, 16), 0.5)

    def roughness(images, prompts):  # E[.] = 2 std^2 for white noise on a flat image
        return (images[..., 1:] - images[..., :-1]).square().mean((1, 2, 3))

    value = noised_relative(roughness, 0.1)(smooth, [""] * 4)
    n = 3 * 16 * 15
    assert abs(float(value.mean()) + 2 * 0.1**2) < 4 * 2 * 0.1**2 * math.sqrt(3 / (4 * n))
    torch.testing.assert_close(noised_relative(roughness, 0.1, weight=0.5)(smooth, [""] * 4), 0.5 * value)
    torch.testing.assert_close(noised_relative(roughness, 0.1)(smooth, [""] * 4), value)
    noise = []
    for image in (smooth, smooth + 0.01):
        noised_relative(lambda x, p: noise.append(x) or x.mean((1, 2, 3)), 0.1)(image, [""] * 4)
    assert not torch.allclose(noise[1] - noise[0], noise[3] - noise[2], atol=1e-3)


def test_checked_passes_good_rewards_and_names_bad_ones():
    good = checked(Linear(), "linear")
    torch.testing.assert_close(good(IMAGES, PROMPTS), Linear()(IMAGES, PROMPTS))
    torch.testing.assert_close(good.score(good.image_features(IMAGES), PROMPTS), Linear()(IMAGES, PROMPTS))
    assert not hasattr(checked(lambda x, p: x.mean((1, 2, 3)), "plain"), "image_features")
    for bad, message in (
        (lambda x, p: x.mean(), r"'mine' returned \(\).* expected a float tensor of shape \(2,\)"),
        (lambda x, p: x.mean((2, 3)), r"\(2, 3\)"),
        (lambda x, p: [0.0, 1.0], "list"),
        (lambda x, p: torch.tensor([1, 2]), "int64"),
        (lambda x, p: torch.tensor([1.0, float("nan")]), "1 values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            checked(bad, "mine")(IMAGES, PROMPTS)

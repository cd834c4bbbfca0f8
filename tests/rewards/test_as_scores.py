"""Rewards that need no gradient may answer with lists, arrays or whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palate.rewards.combine import Towers, as_scores, as_tensor_reward
from palate.train import check_reward

IMAGES = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize("answer", [[1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2]), np.array([1, 2])])
def test_numbers_of_any_kind_are_a_float_tensor(answer):
    reward = check_reward(lambda images, prompts: answer, IMAGES, ["a", "b"])
    values = reward(IMAGES, ["a", "b"])
    assert values.dtype == torch.float32 and values.tolist() == [float(x) for x in answer]


@pytest.mark.parametrize("answer", [[1.0], [[1.0], [2.0]], None, "ab", {"a": 1}, [1.0, "x"], torch.tensor(1.0)])
def test_what_is_not_one_number_per_image_is_refused(answer):
    with pytest.raises(ValueError, match="expected a tensor of shape"):
        check_reward(lambda images, prompts: answer, IMAGES, ["a", "b"])


def test_a_tensor_reward_stays_the_object_that_it_is():
    def reward(images, prompts):
        return images.mean((1, 2, 3))

    assert check_reward(reward, IMAGES, ["a", "b"]) is reward
    values = IMAGES.mean((1, 2, 3))
    assert as_scores(values, values.device) is values


def test_two_towers_stay_two_towers():
    towers = Towers(lambda images: images.mean((1, 2, 3)), lambda seen, prompts: [float(x) for x in seen])
    wrapped = as_tensor_reward(towers)
    assert isinstance(wrapped, Towers) and torch.allclose(wrapped(IMAGES, ["a", "b"]), IMAGES.mean((1, 2, 3)))

"""taste/features.py: what each column means, standardisation, gradients."""

from __future__ import annotations

import pytest
import torch

from palate.models.vocabulary import vocabulary
from palate.runtime.errors import InputError
from palate.taste.features import COLOUR_COLUMNS, WORD_PAIRS, colour, concept_of, features_of, scaling_of


class Tower:
    """Sees the mean colour; a prompt's score is how red it sounds."""

    def image_features(self, images):
        return images.mean((2, 3))

    def score(self, features, prompts):
        return features[:, 0] * torch.tensor([float(len(prompt)) for prompt in prompts])

    def __call__(self, images, prompts):
        return self.score(self.image_features(images), prompts)


def drawing(ground=(0.2, 0.4, 0.6), ink=(1.0, 0.0, 0.0), side=64, square=32):
    image = torch.tensor(ground).view(3, 1, 1).repeat(1, side, side)
    low = (side - square) // 2
    image[:, low : low + square, low : low + square] = torch.tensor(ink).view(3, 1, 1)
    return image[None]


def column(images, name):
    return float(colour(images)[0, COLOUR_COLUMNS.index(name)])


def test_colour_columns_of_a_red_square_on_a_blue_ground():
    image = drawing()
    share = 0.25
    means = [0.2 + share * 0.8, 0.4 - share * 0.4, 0.6 - share * 0.6]
    for name, mean, ground, ink in zip(("red", "green", "blue"), means, (0.2, 0.4, 0.6), (1.0, 0.0, 0.0), strict=True):
        assert column(image, f"{name} light") == pytest.approx(mean, abs=1e-5)
        assert column(image, f"{name} light in the background") == pytest.approx(ground, abs=1e-6)
        spread = abs(ink - ground) * (share * (1 - share)) ** 0.5
        assert column(image, f"contrasts in {name}") == pytest.approx(spread, abs=1e-5)
        assert column(image, f"{name} light in the drawing") == pytest.approx(ink, abs=0.03)  # 16 pixels are added
    assert column(image, "a large drawing") == pytest.approx(share, abs=0.01)
    assert column(image, "warm colours") == pytest.approx(means[0] - means[2], abs=1e-5)
    assert column(image, "a vivid background") == pytest.approx(0.4, abs=1e-6)
    dark, bright = 0.299, 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6  # luma of the square and of the ground
    assert column(image, "a bright background") == pytest.approx(bright, abs=1e-5)
    assert column(image, "brightness") == pytest.approx(bright + share * (dark - bright), abs=1e-5)
    assert column(image, "contrast") == pytest.approx((bright - dark) * (share * (1 - share)) ** 0.5, abs=1e-5)


def test_colour_has_a_finite_gradient_on_a_plain_picture_too():
    image = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    colour(image).sum().backward()
    assert torch.isfinite(image.grad).all()


def test_colour_does_not_depend_on_the_size_of_the_picture():
    small, large = colour(drawing(side=64, square=32))[0], colour(drawing(side=128, square=64))[0]
    for k, name in enumerate(COLOUR_COLUMNS):
        if name != "sharp edges":  # a mean over more pixels
            assert float(small[k]) == pytest.approx(float(large[k]), abs=0.03), name


def test_pairs_are_differences_of_opposite_words():
    features = features_of(Tower(), "clip-score")
    image = drawing()
    row = features(image, ["anything"])[0]
    assert features.sizes == [len(WORD_PAIRS), len(COLOUR_COLUMNS)]
    first, second = WORD_PAIRS[3]
    assert float(row[3]) == pytest.approx(float(image[:, 0].mean()) * (len(first) - len(second)), rel=1e-5)


def test_words_are_what_the_embedded_reward_says_of_the_picture_with_its_concept():
    from palate.rewards.emoji import load_reward

    vocab, reward = vocabulary(), load_reward("emoji")
    features = features_of(reward, "emoji", ["words"])
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    concept = vocab.concepts[3]
    rows = features(image, [f"a {concept}", f"a {concept}"])
    scale = float(reward.model.logit_scale.exp())
    styles = torch.stack([scale * reward(image, [f"{s} {concept}"] * 2) for s in vocab.styles], 1)
    n = len(vocab.styles)
    assert torch.allclose(rows[:, :n], styles - styles.mean(1, keepdim=True), atol=1e-3)
    small, large = (scale * reward(image, [f"{vocab.sizes[k]} {concept}"] * 2) for k in (0, -1))
    assert torch.allclose(rows[:, n], large - small, atol=1e-3)
    colours = len(vocab.colours)
    grounds = torch.stack([scale * reward(image, [f"{concept} on a {c} background"] * 2) for c in vocab.colours], 1)
    assert torch.allclose(rows[:, n + 1 : n + 1 + colours], grounds - grounds.mean(1, keepdim=True), atol=1e-3)
    surely = rows[:, n + 1 + colours : 2 * n + 1 + colours]
    assert torch.allclose(surely, 4 * styles.softmax(1), atol=1e-4)
    assert features.sizes == [2 * n + 1 + 2 * colours] and len(features.columns) == features.sizes[0]


def test_a_concept_is_found_in_any_prompt_and_missing_in_strange_ones():
    concept = vocabulary().concepts[0]
    assert concept_of(f"a 3d {concept} on a blue background") == concept
    assert concept_of("a nonsensical gizmoid") == "" and concept_of("") == ""


def test_standardised_features_have_the_size_of_their_number_and_blocks_weigh_alike():
    g = torch.Generator().manual_seed(0)
    sizes = [5, 2]
    raw = torch.randn(400, 7, generator=g) * torch.tensor([1.0, 10, 100, 0.1, 3, 1000, 1])
    groups = [f"p{i % 20}" for i in range(400)]
    scaling = scaling_of(raw, groups, sizes)
    z = scaling(raw.double())
    assert float(z.square().sum(1).mean()) == pytest.approx(7.0, rel=1e-6)
    first, second = (float(block.square().sum(1).mean()) for block in z.split(sizes, 1))
    assert first == pytest.approx(second, rel=1e-6)


def test_a_difference_between_prompts_does_not_count_as_variation():
    """Two columns of equal spread inside a prompt, one of which also differs between prompts, have the same gain."""
    inside = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    inside[:, 1] = inside[:, 0]
    inside[:, 1] += 100.0 * (torch.arange(200) % 2)
    scaling = scaling_of(inside, [str(i % 2) for i in range(200)], [2])
    assert float(scaling.gain[0] / scaling.gain[1]) == pytest.approx(1.0, rel=1e-4)


def test_a_column_that_never_varies_weighs_nothing():
    raw = torch.cat([torch.randn(50, 1), torch.full((50, 1), 3.0)], 1)
    scaling = scaling_of(raw, ["p"] * 50, [1, 1])
    assert float(scaling.gain[1]) == 0.0 and torch.isfinite(scaling.gain).all()


def test_unknown_blocks_and_none_are_refused():
    with pytest.raises(InputError, match="words"):
        features_of(Tower(), "clip-score", ["words"])
    with pytest.raises(InputError, match="at least one"):
        features_of(Tower(), "clip-score", [])

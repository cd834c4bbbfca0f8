"""The tools that build the embedded assets: what they draw is what they say, and it is a function of the seed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from support import ROOT

from palate.models.vocabulary import parse_prompt, vocabulary
from palate.rewards.emoji import COLOURS, background, position

sys.path.insert(0, str(ROOT / "tools"))
data = pytest.importorskip("data")


@pytest.fixture(scope="module")
def samples():
    return data.Composer(data.Atlas.load()).compose(np.random.default_rng(0), 400)


def test_composition_is_a_function_of_the_seed(samples):
    again = data.Composer(data.Atlas.load()).compose(np.random.default_rng(0), 400)
    assert torch.equal(again.images, samples.images) and again.captions == samples.captions


def test_captions_are_true_of_their_images(samples):
    vocab = vocabulary()
    found, centre = background(samples.images), position(samples.images)
    right = sided = 0
    for k, caption in enumerate(map(parse_prompt, samples.captions)):
        assert caption.concept == vocab.concepts[samples.concept[k]]
        assert caption.style in (None, vocab.styles[samples.style[k]])
        assert caption.background in (None, COLOURS[samples.colour[k]])
        right += int(found[k] == samples.colour[k])
        if caption.position in ("left", "right") and not centre[k].isnan().any():
            sided += 1
            assert float(centre[k, 0]) * (1 if caption.position == "right" else -1) > 0, samples.captions[k]
    assert right >= 396 and sided > 20


def test_unnamed_things_are_random_and_follow_the_prior(samples):
    unnamed = [k for k, c in enumerate(samples.captions) if parse_prompt(c).style is None]
    flat = np.mean([vocabulary().styles[samples.style[k]] == "flat" for k in unnamed])
    assert abs(flat - data.STYLE_PRIOR["flat"]) < 4 * np.sqrt(0.25 / len(unnamed))
    assert (
        len({int(samples.colour[k]) for k, c in enumerate(samples.captions) if parse_prompt(c).background is None})
        == 10
    )


def test_held_out_pairs_are_left_out():
    pairs = data.held_out_pairs()
    drawn = data.Composer(data.Atlas.load(), exclude=pairs).compose(np.random.default_rng(1), 600)
    share = len(pairs) / len(vocabulary().concepts) / len(vocabulary().styles)
    assert 0.025 < share < 0.03 and len({concept for concept, _ in pairs}) == len(pairs)
    assert not pairs & set(zip(drawn.concept.tolist(), drawn.style.tolist(), strict=True))


def test_outline_is_white_on_dark_colours():
    """Line art must be seen: its own ink, which no caption names, differs from the background wherever it is drawn."""
    drawn = data.Composer(data.Atlas.load()).compose(np.random.default_rng(2), 400)
    outline = vocabulary().styles.index("outline")
    ink = [k for k, scene in enumerate(drawn.scenes) if scene.style == outline and scene.things[0].paint is None]
    assert len(ink) > 40
    for k in ink:
        image = drawn.images[k]
        corner = torch.tensor(vocabulary().colours[COLOURS[drawn.colour[k]]]) / 255
        assert (image - corner[:, None, None]).abs().amax(0).max() > 0.4

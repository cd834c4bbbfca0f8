"""The guard's measures on sets of images whose cast, saturation, detail, duplicates and distances are known."""

from __future__ import annotations

import math

import pytest
import torch

from palate.evaluate import shift
from palate.rewards.simple import saturation


def flat(*colours) -> torch.Tensor:
    """One image of each colour."""
    return torch.tensor(colours, dtype=torch.float32)[..., None, None].expand(-1, -1, 16, 16).contiguous()


def tones(amplitudes, frequency: float = 0.5, side: int = 16) -> torch.Tensor:
    """Grey images .5 + a cos(2 pi f x): at f = .5 a checker of columns, of amplitude a and root mean square a."""
    x = torch.arange(side)
    wave = torch.cos(2 * math.pi * frequency * x).expand(3, side, side)
    return torch.stack([0.5 + a * wave for a in amplitudes])


def test_grey_has_no_cast_and_a_tint_has_its_opponent_colours():
    assert torch.allclose(shift.colour_cast(flat((0.2, 0.2, 0.2), (0.9, 0.9, 0.9))), torch.zeros(2, 2).double())
    red, blue = shift.colour_cast(flat((0.6, 0.2, 0.2), (0.2, 0.2, 0.7)))
    assert torch.allclose(red, torch.tensor([0.4, 0.2]).double())  # R - G = .4, (R + G) / 2 - B = .4 - .2
    assert torch.allclose(blue, torch.tensor([0.0, -0.5]).double())


def test_a_cast_over_all_images_shifts_by_its_length_in_units_of_what_they_had():
    base = flat((0.5, 0.4, 0.4), (0.4, 0.5, 0.4))  # casts (.1, .05) and (-.1, .05): mean (0, .05), spread .1
    warmer = base + torch.tensor([0.06, 0.06, 0.0])[:, None, None]  # (R + G) / 2 - B grows by .06
    rows = shift.colour_cast(warmer), shift.colour_cast(base)
    assert shift.spread(rows[1]) == pytest.approx(0.1, abs=1e-6)
    assert shift.shift(*rows) == pytest.approx(0.6, abs=1e-5)
    brighter = shift.colour_cast(base + 0.2)  # grey light is no cast
    assert shift.shift(brighter, rows[1]) == pytest.approx(0.0, abs=1e-5)


def test_a_shift_is_the_distance_of_means_over_the_base_s_standard_deviation():
    base, now = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0, 5.0])  # mean 2, deviation 1
    assert shift.shift(now, base) == pytest.approx(3.0)
    assert shift.shift(base - 3, base) == pytest.approx(3.0)  # either way
    alike = torch.tensor([0.5, 0.5])
    assert shift.shift(alike + 0.01, alike) == pytest.approx(0.01 / shift.SMALLEST_SPREAD)  # images that do not differ


def test_saturation_of_washed_out_images_falls_by_its_known_amount():
    base = flat((0.8, 0.4, 0.4), (0.8, 0.2, 0.2))  # (max - min) / max = .5 and .75: mean .625, deviation .125
    washed = flat((0.8, 0.6, 0.6), (0.8, 0.6, 0.6))  # .25
    assert shift.shift(saturation(washed), saturation(base)) == pytest.approx(0.375 / 0.125, abs=1e-5)


def test_detail_is_the_logarithm_of_a_tone_s_amplitude_and_blind_to_slow_ones():
    fine = shift.fine_detail(tones([0.1, 0.2, 0.4]))
    assert torch.allclose(fine, torch.tensor([math.log(a + shift.FLOOR) for a in (0.1, 0.2, 0.4)]).double(), atol=1e-5)
    slow = shift.fine_detail(tones([0.4], frequency=1 / 16))
    assert float(slow) == pytest.approx(math.log(shift.FLOOR), abs=0.1)
    # doubled and halved amplitudes are as far from the base as each other
    base, half, double = (shift.fine_detail(tones([a, 4 * a])) for a in (0.05, 0.025, 0.1))
    assert shift.shift(half, base) == pytest.approx(shift.shift(double, base), rel=1e-2)
    assert shift.shift(double, base) == pytest.approx(math.log(2) / math.log(2), rel=1e-2)  # spread is ln 4 / 2


def test_duplicates_are_pictures_that_another_prompt_nearly_has():
    torch.manual_seed(0)
    different = torch.rand(4, 3, 16, 16)
    rows, prompts = shift.thumbnails(different), ["a", "b", "c", "d"]
    across = shift.distance_across(rows, prompts)
    assert shift.duplicates(rows, prompts, across) == 0.0
    copied = different.clone()
    copied[1] = different[0] + 0.02 * torch.rand(3, 16, 16)  # b shows a's picture: both of them count
    assert shift.duplicates(shift.thumbnails(copied), prompts, across) == 0.5
    assert shift.duplicates(shift.thumbnails(copied), ["a", "a", "c", "d"], across) == 0.0  # inside a prompt: diversity
    assert shift.duplicates(shift.thumbnails(different[:1].expand(4, -1, -1, -1)), prompts, across) == 1.0
    assert math.isnan(shift.duplicates(rows, ["a"] * 4, across))


def test_distances_inside_and_across_prompts_of_points_on_a_line():
    rows, prompts = torch.tensor([[0.0], [1.0], [10.0], [13.0]]), ["a", "a", "b", "b"]
    assert shift.variety(rows, prompts) == pytest.approx((1 + 3) / 2)
    assert shift.distance_across(rows, prompts) == pytest.approx((100 + 169 + 81 + 144) / 4)
    assert math.isnan(shift.variety(rows, ["a", "b", "c", "d"]))
    unit = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=1)
    assert shift.variety(unit, ["a", "a"]) == pytest.approx(2 * math.sin(math.pi / 8))


def test_displacement_is_0_unchanged_and_1_as_unlike_as_another_prompt_s():
    torch.manual_seed(0)
    base, prompts = torch.randn(200, 64), [str(i) for i in range(200)]
    across = shift.distance_across(base, prompts)
    assert shift.displacement(base, base, across) == 0.0
    assert shift.displacement(torch.randn(200, 64), base, across) == pytest.approx(1.0, abs=0.03)
    assert shift.displacement(base + torch.randn(200, 64) / 2, base, across) == pytest.approx(0.125, abs=0.01)


def test_patches_have_the_mean_and_deviation_of_each_colour():
    image = tones([0.25], side=16)
    mean, deviation = shift.patch_statistics(image, cells=8)[0].split(3 * 64)
    assert torch.allclose(mean, torch.full((192,), 0.5).double(), atol=1e-6)  # a cell has one column of each sign
    assert torch.allclose(deviation, torch.full((192,), 0.25).double(), atol=1e-6)
    assert torch.allclose(shift.thumbnails(flat((0.1, 0.2, 0.3)))[0, ::256], torch.tensor([0.1, 0.2, 0.3]).double())


def test_a_ratio_of_means_has_the_standard_error_of_its_pairs():
    base = torch.tensor([1.0, 2.0, 3.0, 2.0])
    assert shift.ratio(base, base) == (1.0, 0.0)
    value, error = shift.ratio(base - torch.tensor([0.0, 0.4, 0.0, 0.4]), base)  # differences 0, .4, 0, .4
    assert value == pytest.approx(0.9)
    assert error == pytest.approx(math.sqrt(4 * 0.04 / 3) / 2 / 2)  # deviation / sqrt(4), in units of the mean 2
    assert all(math.isnan(x) for x in shift.ratio(base, torch.tensor([1.0, -1.0, 1.0, -1.0])))  # nothing to lose


def test_others_are_the_next_different_prompts_and_never_the_own():
    assert shift.others(["a", "a", "b", "c"], 2) == [["b", "c"], ["b", "c"], ["c", "a"], ["a", "b"]]
    assert shift.others(["a", "b"], 8) == [["b"], ["a"]] and shift.others(["a", "a"], 8) == [[], []]

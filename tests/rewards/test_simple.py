"""The closed-form rewards on images whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from palate.rewards import simple

DIFFERENTIABLE = [simple.brightness, simple.warmth, simple.saturation, simple.colourfulness, simple.high_frequency]


def constant(red: float, green: float, blue: float, size: int = 8) -> torch.Tensor:
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1).expand(1, 3, size, size).clone()


def tone(cycles: int, amplitude: float, size: int = 32, axis: int = 1) -> torch.Tensor:
    wave = 0.5 + amplitude * torch.cos(2 * math.pi * cycles * torch.arange(size) / size)
    plane = wave[None, :].expand(size, size) if axis == 1 else wave[:, None].expand(size, size)
    return plane.expand(1, 3, size, size).clone()


def test_a_constant_colour_has_its_textbook_values():
    colour = constant(0.8, 0.4, 0.2)
    assert simple.brightness(colour).item() == pytest.approx(0.299 * 0.8 + 0.587 * 0.4 + 0.114 * 0.2, abs=1e-6)
    assert simple.warmth(colour).item() == pytest.approx(0.6, abs=1e-6)
    assert simple.saturation(colour).item() == pytest.approx(0.75, abs=1e-6)  # (0.8 - 0.2) / 0.8
    assert simple.colourfulness(colour).item() == pytest.approx(0.3 * math.hypot(0.4, 0.4), abs=1e-6)  # no variance
    assert simple.high_frequency(colour).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_grey_has_no_colour(level):
    grey = constant(level, level, level)
    for measure in (simple.warmth, simple.saturation, simple.colourfulness):
        assert measure(grey).item() == pytest.approx(0.0, abs=1e-7)


def test_colourfulness_of_half_red_half_cyan_follows_the_paper():
    image = torch.zeros(1, 3, 4, 4)
    image[:, 0, :, :2] = 1.0  # red: rg = 1, yb = 0.5
    image[:, 1:, :, 2:] = 1.0  # cyan: rg = -1, yb = -0.5
    assert simple.colourfulness(image).item() == pytest.approx(math.sqrt(1 + 0.25), abs=1e-6)  # means are 0
    image[:, 1, :, 2:] = 0.0  # blue: rg = 0, yb = -1
    expected = math.sqrt(0.25 + 0.75**2) + 0.3 * math.hypot(0.5, 0.25)
    assert simple.colourfulness(image).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("axis", [1, 2])
def test_high_frequency_is_the_energy_of_the_tones_above_the_cutoff(axis):
    assert simple.high_frequency(tone(12, 0.3, axis=axis)).item() == pytest.approx(0.3**2 / 2, rel=1e-4)
    assert simple.high_frequency(tone(4, 0.3, axis=axis)).item() == pytest.approx(0.0, abs=1e-9)
    both = tone(12, 0.2, axis=axis) + tone(4, 0.3, axis=axis) - 0.5
    assert simple.high_frequency(both).item() == pytest.approx(0.2**2 / 2, rel=1e-4)
    assert simple.high_frequency(tone(4, 0.3, axis=axis), cutoff=0.1).item() == pytest.approx(0.3**2 / 2, rel=1e-4)


@pytest.mark.parametrize("measure", DIFFERENTIABLE, ids=lambda f: f.__name__)
def test_each_image_is_judged_alone_and_the_gradient_is_the_slope(measure):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    value = measure(images)
    assert torch.allclose(value, torch.cat([measure(image[None]) for image in images]))
    (gradient,) = torch.autograd.grad(value.sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-3
    slope = (measure(images + step * direction) - measure(images - step * direction)).sum() / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("measure", DIFFERENTIABLE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_the_gradient_is_finite_on_black_and_on_grey(measure, level):
    grey = constant(level, level, level).requires_grad_()
    (gradient,) = torch.autograd.grad(measure(grey).sum(), grey)
    assert gradient.isfinite().all()


def test_jpeg_size_counts_bytes_and_has_no_gradient():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sizes = simple.jpeg_size(torch.cat([constant(0.5, 0.5, 0.5, 64), noise]).requires_grad_())
    assert sizes[0] < 1000 < sizes[1] and not sizes.requires_grad
    assert simple.jpeg_size(noise, quality=20) < simple.jpeg_size(noise, quality=90)

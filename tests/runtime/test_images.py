"""Float images and 8-bit pixels: exact there and back, one rounding, pictures as their files mean them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from palate.runtime.images import as_rgb, encode_png, from_pixels, grid, quantise, read_pixels, to_pixels


def test_every_level_survives_the_way_there_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    assert np.array_equal(to_pixels(from_pixels(levels)), levels)
    images = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantise(images), from_pixels(to_pixels(images)))
    assert np.abs(to_pixels(images).astype(float) / 255 - images.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 255 + 1e-7


def test_values_outside_are_clipped_and_half_precision_is_not_rounded_twice():
    images = torch.tensor([-1.0, 2.0, 0.5]).view(1, 3, 1, 1)
    assert to_pixels(images).tolist() == [[[[0, 255, 128]]]]  # 127.5 rounds to the even one
    exact = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert np.array_equal(to_pixels(exact), to_pixels(exact.float()))


def test_a_png_gives_back_its_pixels():
    pixels = np.random.Generator(np.random.Philox(0)).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    for level in (None, 0, 9):
        assert np.array_equal(read_pixels(encode_png(pixels, compress_level=level)), pixels)


def test_transparency_lies_over_white_and_16_bit_greys_keep_their_ramp():
    hidden = Image.new("RGBA", (2, 1), (255, 0, 255, 0))
    hidden.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(as_rgb(hidden)).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    assert np.asarray(as_rgb(Image.new("LA", (1, 1), (0, 0)))).tolist() == [[[255] * 3]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9] * 256)
    stream = io.BytesIO()
    palette.save(stream, "PNG", transparency=0)
    assert read_pixels(stream.getvalue()).tolist() == [[[255] * 3]]
    ramp = (np.arange(256, dtype=np.uint16) * 257)[None]
    stream = io.BytesIO()
    Image.fromarray(ramp).save(stream, "PNG")
    assert read_pixels(stream.getvalue())[0, :, 0].tolist() == list(range(256))


def test_a_grid_shows_each_image_at_its_place_on_white():
    images = torch.arange(3).view(3, 1, 1, 1).expand(3, 3, 2, 2) / 4
    sheet = grid(images, 2, gap=1)
    assert sheet.shape == (5, 5, 3)
    assert [sheet[0, 0, 0], sheet[0, 3, 0], sheet[3, 0, 0], sheet[3, 3, 0], sheet[2, 2, 0]] == [0, 64, 128, 255, 255]


@pytest.mark.parametrize(("form", "tag"), [("JPEG", 6), ("PNG", 8), ("WEBP", 3), ("PNG", 1)])
def test_a_picture_stands_as_its_camera_was_held(form, tag, tmp_path):
    """EXIF's orientation: a phone stores what it sees lying on its side, and says so."""
    upright = Image.new("RGB", (16, 32), "white")
    upright.paste("black", (0, 0, 16, 16))  # the upper half
    stored = upright.transpose({6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
                                3: Image.Transpose.ROTATE_180}[tag]) if tag != 1 else upright  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = tag
    stored.save(tmp_path / "a", form, exif=exif, quality=100)
    found = read_pixels(tmp_path / "a").astype(int)
    assert found.shape == (32, 16, 3) and found[:14].max() < 30 and found[18:].min() > 225
    assert np.asarray(as_rgb(Image.open(tmp_path / "a"))).shape == (32, 16, 3)

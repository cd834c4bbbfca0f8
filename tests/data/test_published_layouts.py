"""Files as people and publishers have them: line ends, quotation marks, layouts, formats, damage."""

from __future__ import annotations

import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from palate.data import captioned_images, check_images, load_images, preference_pairs, read_prompts
from palate.evaluate import read_index
from palate.models.vocabulary import known_words
from palate.runtime.errors import InputError

# What str.splitlines takes for a line end besides \n, \r\n and \r.
SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


def prompt_file(folder, ending, prompts):
    """A prompt file of any kind that holds these prompts, a caption file and the index of a sample folder included."""
    file = folder / f"p{ending}"
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    file.write_text(
        {
            ".txt": "\n".join(prompts),
            ".jsonl": "\r\n".join(rows),
            ".json": json.dumps(prompts, ensure_ascii=False),
            ".csv": "prompt\n" + "\n".join(f'"{prompt}"' for prompt in prompts),
            ".tsv": "prompt\n" + "\n".join(prompts),
        }[ending],
        "utf-8",
    )
    return str(file)


@pytest.mark.parametrize("separator", SEPARATORS, ids=[f"U+{ord(each):04X}" for each in SEPARATORS])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_a_line_ends_at_line_feeds_and_nowhere_else(tmp_path, ending, separator):
    if ending in (".jsonl", ".json") and ord(separator) < 32:
        pytest.skip("JSON allows no such character inside a string")
    prompts = [f"a dog{separator}on blue", "a cat"]
    read = read_prompts(prompt_file(tmp_path, ending, prompts))
    assert [prompt.split() for prompt in read] == [["a", "dog", "on", "blue"], ["a", "cat"]]


@pytest.mark.parametrize("separator", SEPARATORS, ids=[f"U+{ord(each):04X}" for each in SEPARATORS])
def test_captions_and_sample_folders_are_cut_at_line_feeds_alone(tmp_path, separator):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    caption = f"one{separator}two"
    (tmp_path / "captions.txt").write_text(f"a.png\t{caption}\nb.png\tthree\n", "utf-8")
    assert [text for _, text in captioned_images(tmp_path)] == [caption, "three"]
    if ord(separator) >= 32:
        rows = [{"file": "a.png", "prompt": caption, "seed": 0}, {"file": "b.png", "prompt": "three", "seed": 0}]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / "index.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        assert read_index(tmp_path) == rows


def test_a_tsv_has_no_quoting_and_a_csv_has(tmp_path):
    prompts = ['"H E L L O" in chalk', '"an open quote', 'a dog that says "woof"', "a cat"]
    assert read_prompts(prompt_file(tmp_path, ".tsv", prompts)) == prompts
    (tmp_path / "q.csv").write_text('prompt,more\n"a dog, or ""two""",1\na cat,2\n')
    assert read_prompts(str(tmp_path / "q.csv")) == ['a dog, or "two"', "a cat"]


@pytest.mark.parametrize("key", ["file_path", "image_path"])
@pytest.mark.parametrize("place", ["train", "."])
@pytest.mark.parametrize("linked", [False, True])
def test_hpdv2_as_its_readme_says_and_links_to_another_disk(tmp_path, key, place, linked):
    folder, disk = tmp_path / "set", tmp_path / "disk"
    (folder / place).mkdir(parents=True)
    disk.mkdir()
    for name in ("0.jpg", "1.jpg"):
        Image.new("RGB", (8, 8), "red").save(disk / name)
        if linked:
            (folder / place / name).symlink_to(disk / name)
        else:
            (disk / name).rename(folder / place / name)
    row = {"prompt": "an apple", key: ["0.jpg", "1.jpg"], "human_preference": [0, 1]}
    (folder / "train.json").write_text(json.dumps([row]))
    (pair,) = preference_pairs(str(folder / "train.json"))
    assert (pair.prompt, pair.preference) == ("an apple", 0.0)
    check_images([pair.first, pair.second])
    for name in ("../disk/0.jpg", str(disk / "0.jpg")):
        (folder / "train.json").write_text(json.dumps([row | {key: [name, "1.jpg"]}]))
        with pytest.raises(InputError, match="leaves the folder"):
            list(preference_pairs(str(folder / "train.json")))


def encoded(kind, mode="RGB", size=(64, 48), **options):
    """A picture's file with structure in it, so that a cut file misses something."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"], ids=["jpeg", "png", "webp", "gif", "tiff", "bmp"]
)
@pytest.mark.parametrize("how", ["file", "bytes"])
def test_a_picture_that_is_cut_short_is_named_before_anything_loads(tmp_path, kind, how):
    data = encoded(kind)
    whole = tmp_path / "whole"
    whole.write_bytes(data)
    check_images([whole if how == "file" else data])
    for length in (len(data) // 2, len(data) - 64):
        cut = tmp_path / "cut"
        cut.write_bytes(data[:length])
        with pytest.raises(InputError, match="cut" if how == "file" else "bytes of a table"):
            check_images([cut if how == "file" else data[:length]])


def test_a_jpeg_with_something_behind_it_is_whole(tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(encoded("JPEG") + b"\0" * 9000)
    check_images([file])


def test_transparent_pictures_lie_on_white_and_sixteen_bits_keep_their_greys(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 255, 0))
    clear.save(tmp_path / "clear.png")
    ramp = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    (white,) = load_images([tmp_path / "clear.png"], size=8)
    assert float(white.min()) == 1.0
    (grey,) = load_images([tmp_path / "grey.png"], size=64)
    assert float(grey[0, 32, 32]) == pytest.approx(ramp[32, 32] / 65535, abs=1 / 255)


def test_pictures_that_are_not_used_are_counted(tmp_path, caplog):
    for name, kind in (
        ("a.png", "PNG"),
        ("b.jfif", "JPEG"),
        ("c.tiff", "TIFF"),
        ("d.gif", "GIF"),
        ("sub/e.png", "PNG"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(kind))
        (tmp_path / name).with_suffix(".txt").write_text("a cat")
    (tmp_path / "f.heic").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "palate"):
        assert [path.name for path, _ in captioned_images(tmp_path)] == ["a.png", "b.jfif", "c.tiff", "d.gif"]
    assert "uses 4 pictures" in caplog.text and "1 in folders inside" in caplog.text and "f.heic" in caplog.text


@pytest.mark.parametrize("prompt", ["🐶", "a 🎂", "?!", "a tiger ☂️", "…"])
def test_a_prompt_that_would_be_dropped_is_refused(prompt):
    with pytest.raises(InputError):
        known_words(prompt)
    assert known_words("a dog, 3d!") == ["a", "dog", "3d"] and known_words("") == []

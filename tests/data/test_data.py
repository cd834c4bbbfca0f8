"""Prompts, captioned images and preference pairs, read from files in the layouts they are published in."""

from __future__ import annotations

import io
import json
import re
import struct

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from palate import recipe
from palate.algorithms.dpo import DPOSettings
from palate.data import (
    Like,
    Pair,
    RecipeError,
    captioned_images,
    check_images,
    encode_images,
    geneval,
    load_images,
    preference_pairs,
    prompt_rows,
    read_prompts,
    read_rows,
    single_likes,
)  # fmt: skip
from palate.data.buckets import shape_of
from palate.recipe.pictures import kept_likes
from palate.runtime.images import read_pixels

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def png(colour):
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(stream, "PNG")
    return stream.getvalue()


PROMPTS = ["a red fox", 'a sign, "open", in rain', "zwei Füchse"]
WRITE = {
    "p.txt": '# comment\na red fox\n\n  a sign, "open", in rain \nzwei Füchse\n',
    "p.jsonl": "".join(json.dumps({"prompt": p, "id": i}) + "\n\n" for i, p in enumerate(PROMPTS)),
    "anime.json": json.dumps(PROMPTS),  # HPDv2's benchmark
    "test.json": json.dumps([{"prompt": p, "image_path": ["a.jpg"], "rank": [1]} for p in PROMPTS]),  # HPDv2's ranking
    "PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\na red fox\tAnimals\tBasic\t\n"
    'a sign, "open", in rain\tWorld\tWriting\t\nzwei Füchse\tAnimals\tQuantity\t\n',
    "drawbench.csv": '\ufeffPrompts,Category\na red fox,Colors\n"a sign, ""open"", in rain",Text\nzwei Füchse,Count\n',
    "evaluation_metadata.jsonl": "".join(
        json.dumps({"tag": "counting", "include": [{"class": "fox", "count": 2, "color": "red"}], "prompt": p}) + "\n"
        for p in PROMPTS
    ),
}


@pytest.mark.parametrize("name", [*WRITE, "pick.parquet"])
def test_every_layout_gives_the_same_prompts(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"caption": PROMPTS, "jpg_0": [b"x"] * 3}), path, row_group_size=2)
    else:
        path.write_text(WRITE[name], "utf-8")
    assert read_prompts(str(path)) == PROMPTS


def test_what_stands_beside_a_prompt_is_kept(tmp_path):
    (tmp_path / "PartiPrompts.tsv").write_text(WRITE["PartiPrompts.tsv"], "utf-8")
    assert [row["Challenge"] for row, _ in prompt_rows(str(tmp_path / "PartiPrompts.tsv"))] == [
        "Basic",
        "Writing",
        "Quantity",
    ]
    (tmp_path / "g.jsonl").write_text(WRITE["evaluation_metadata.jsonl"], "utf-8")
    rows = geneval(str(tmp_path / "g.jsonl"))
    assert rows[2] == {
        "tag": "counting",
        "include": [{"class": "fox", "count": 2, "color": "red"}],
        "prompt": "zwei Füchse",
    }


def test_pick_a_pic_pairs(tmp_path):
    rows = {
        "caption": ["a", "b", "c", "d"],
        "jpg_0": [png("red")] * 4,
        "jpg_1": [png("blue")] * 4,
        "label_0": [1.0, 0.0, 0.5, 1.0],
        "label_1": [0.0, 1.0, 0.5, 0.0],
        "has_label": [True, True, True, False],
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "train.parquet", row_group_size=2)
    pairs = list(preference_pairs(str(tmp_path / "train.parquet")))
    assert [(p.prompt, p.preference) for p in pairs] == [("a", 1.0), ("b", 0.0), ("c", 0.5)]
    assert load_images([pairs[0].first], size=(4, 6)).shape == (1, 3, 4, 6)
    images = load_images([pairs[0].first, pairs[0].second], size=4)
    assert torch.equal(images[0].amax((1, 2)), torch.tensor([1.0, 0, 0])) and torch.equal(
        images[1].amax((1, 2)), torch.tensor([0, 0, 1.0])
    )


def test_hpdv2_pairs(tmp_path):
    (tmp_path / "train.json").write_text(
        json.dumps(
            [
                {"prompt": "a", "image_path": ["0.jpg", "1.jpg"], "human_preference": [0, 1]},
                {"prompt": "b", "image_path": ["2.jpg", "3.jpg"], "human_preference": [3, 1]},
            ]
        )
    )
    assert list(preference_pairs(str(tmp_path / "train.json"))) == [
        Pair("a", tmp_path / "0.jpg", tmp_path / "1.jpg", 0.0),
        Pair("b", tmp_path / "2.jpg", tmp_path / "3.jpg", 0.75),
    ]


@pytest.mark.parametrize("name", ["likes.jsonl", "likes.csv", "likes.parquet"])
def test_single_likes(tmp_path, name):
    values = {"likes.csv": ["true", "No", "1", "0.0"], "likes.jsonl": [True, False, 1, 0.0]}
    images = [f"{i}.png" for i in range(4)]
    given = values.get(name, [True, False] * 2)
    rows = [{"prompt": f"a  fox {i}", "image": images[i], "like": given[i]} for i in range(4)]
    expected = [Like(f"a fox {i}", tmp_path / images[i], i % 2 == 0) for i in range(4)]
    if name == "likes.jsonl":
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "likes.csv":
        lines = [",".join(map(str, row.values())) for row in rows]
        (tmp_path / name).write_text("\n".join(["prompt,image,like", *lines]))
    else:  # pictures as the datasets library keeps them
        kept = [row | {"image": {"bytes": png("red"), "path": "x.png"}} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(kept), tmp_path / name)
        expected = [one._replace(image=png("red")) for one in expected]
    assert list(single_likes(str(tmp_path / name))) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "image": "x.png"}, 'row 1: expected {"prompt": text, .*it lacks like'),
        ({"prompt": "a", "image": "x.png", "like": 2}, "row 1: a like of '2'; expected true or false"),
        ({"prompt": "a", "image": "../x.png", "like": True}, "leaves the folder"),
        ({"prompt": "a", "image": 3, "like": True}, "row 1: expected a prompt in words, and an image as the name"),
        ({"prompt": "a", "image_path": ["x", "y"], "human_preference": [1, 0]}, "give the file as prompts.pairs"),
    ],
)
def test_bad_likes_name_the_row(tmp_path, row, message):
    (tmp_path / "likes.jsonl").write_text(json.dumps(row))
    with pytest.raises(RecipeError, match=message):
        list(single_likes(str(tmp_path / "likes.jsonl")))
    with pytest.raises(RecipeError, match="does not exist"):
        list(single_likes(str(tmp_path / "absent.jsonl")))


@pytest.mark.parametrize(("liked", "disliked"), [(8, 2), (2, 8), (3, 5), (5, 4)])
def test_the_weight_of_the_rarer_kind_is_told_as_ktos_authors_set_it(tmp_path, caplog, liked, disliked):
    """Either end of what is told makes lambda_D n_D / (lambda_U n_U) 1 or 4/3, and then nothing is told."""
    kinds = [True] * liked + [False] * disliked
    rows = [json.dumps({"prompt": "a", "image": "x.png", "like": like}) for like in kinds]
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "likes.jsonl").write_text("\n".join(rows))

    def told(**weights):
        caplog.clear()
        kept_likes(str(tmp_path / "likes.jsonl"), DPOSettings(loss="kto", **weights))
        return caplog.text

    found = re.search(r"algorithm\.(\w+) between (\S+) and (\S+)", told())
    if liked / disliked == 1.25:
        assert found is None
        return
    assert f"{liked} likes and {disliked} dislikes" in caplog.text
    for value in map(float, found.groups()[1:]):
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, found[1]: value}
        ratio = weights["desirable_weight"] * liked / (weights["undesirable_weight"] * disliked)
        assert min(abs(ratio - 1), abs(ratio - 4 / 3)) < 0.01 and not told(**weights)


def test_likes_in_the_place_of_pairs_are_told_where_they_belong(tmp_path):
    (tmp_path / "likes.jsonl").write_text(json.dumps({"prompt": "a", "image": "x.png", "like": True}))
    with pytest.raises(RecipeError, match=r"give the file as prompts\.likes, with algorithm\.loss=kto"):
        list(preference_pairs(str(tmp_path / "likes.jsonl")))


def test_columns_without_a_name_are_no_open_quotation(tmp_path):
    """As a table with an index and a comma at the end of its lines has them, which used to read as cut short."""
    (tmp_path / "a.csv").write_text(',prompt,\n0,"a fox, red",\n1,a dog,\n')
    assert read_prompts(str(tmp_path / "a.csv")) == ["a fox, red", "a dog"]


@pytest.mark.parametrize(
    "include",
    [[], {}, [{"class": "fox"}], [{"class": "fox", "count": 1, "position": []}],
     [{"class": "fox", "count": 1, "position": "left of"}]],
)  # fmt: skip
def test_genevals_metadata_names_what_must_be_there(tmp_path, include):
    good = {"tag": "position", "include": [{"class": "fox", "count": 1, "position": ["left of", 0]}], "prompt": "a fox"}
    (tmp_path / "g.jsonl").write_text("\n".join(json.dumps(row) for row in (good, good | {"include": include})))
    with pytest.raises(RecipeError, match="row 2: expected GenEval metadata"):
        geneval(str(tmp_path / "g.jsonl"))


BAD = [
    ("a.jsonl", '{"prompt": "x"}\n{broken', "line 2: not JSON"),
    ("a.jsonl", "3\n", "row 1: expected a prompt or a mapping"),
    ("a.jsonl", '{"question": "x"}', "row 1: no prompt in it.*got question"),
    ("a.json", '{"prompt": "x"}', "expected a list"),
    ("a.json", "[" * 100000, "not JSON"),
    ("a.json", "[1]", "row 1"),
    ("a.csv", "Category\nx\n", "no prompt in it"),
    ("a.jsonl", '{"prompt": 3}', "prompt is int; expected text"),
    ("a.jsonl", '{"prompt": " "}', "holds no prompt"),
    ("a.csv", "", "holds no prompt"),
    ("a.csv", 'prompt,Category\n"a dog",x\n"a cat, sitt', "a quotation mark is not closed; is the file cut short"),
    ("a.csv", 'prompt\n"a fox\na dog\na cat\n', "a quotation mark is not closed"),
    ("a.csv", "prompt\na dog\na fox, red, in snow\n", "row 2: more fields than the first line has names"),
    ("a.parquet", "PAR1 no", "not a readable parquet"),
    ("a.tsv", b"\xff\xfe\x00", "not UTF-8"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_bad_prompt_files_name_the_row(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=message) as error:
        read_prompts(str(tmp_path / name))
    assert len(str(error.value)) < 400 and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "image_path": ["../x.jpg", "b.jpg"], "human_preference": [1, 0]}, "leaves the folder"),
        ({"prompt": "a", "image_path": ["x.jpg"], "human_preference": [1, 0]}, "row 1: expected two images"),
        ({"prompt": "a", "image_path": "xy", "human_preference": [1, 0]}, "row 1: expected two images"),
        ({"prompt": "a", "image_path": ["x", 2], "human_preference": [1, 0]}, "row 1: expected two images"),
        ({"prompt": "a", "image_path": ["x", "y"], "human_preference": ["a", "b"]}, "row 1: expected two images"),
        ({"prompt": "a", "image_path": ["x", "y"], "human_preference": 1}, "row 1: expected two images"),
        ({"prompt": 5, "image_path": ["x", "y"], "human_preference": [1, 0]}, "a prompt in words"),
        ({"caption": "a", "jpg_0": "x.jpg", "jpg_1": "y.jpg", "label_0": 1}, "row 1: expected two images as bytes"),
        ({"prompt": "a", "image_path": ["x.jpg", "y.jpg"], "human_preference": [2, -1]}, "row 1: a preference"),
        ({"prompt": "a"}, "neither Pick-a-Pic.*got prompt"),
    ],
)
def test_bad_pairs_name_the_row(tmp_path, row, message):
    (tmp_path / "train.json").write_text(json.dumps([row]))
    with pytest.raises(RecipeError, match=message):
        list(preference_pairs(str(tmp_path / "train.json")))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(RecipeError, match=re.escape(".jsonl, .ndjson, .json, .csv, .tsv, .parquet")):
        read_rows(tmp_path / "a.xlsx")
    with pytest.raises(RecipeError, match="does not exist"):
        list(preference_pairs(str(tmp_path / "absent.parquet")))
    (tmp_path / "g.jsonl").write_text('{"prompt": "x", "tag": "a", "include": [{"class": "fox"}]}')
    with pytest.raises(RecipeError, match="row 1: expected GenEval metadata"):
        geneval(str(tmp_path / "g.jsonl"))
    with pytest.raises(RecipeError, match="cannot read the image 3 bytes of a table"):
        load_images([b"abc"], size=4)


def test_the_prompt_set_that_ships():
    prompts = read_prompts("real")
    assert len(prompts) == len(set(prompts)) >= 200
    assert max(len(p.split()) for p in prompts) <= 40  # far inside every text encoder's limit


GOOD = 'algorithm: {name: srpo, positive: ["3d"], negative: [flat]}\nprompts: {file: real}\n'


def test_published_rewards_are_named_in_recipes(monkeypatch):
    seen = []

    def load(source, **options):
        seen.append((source, options))
        return lambda images, prompts: images.mean((1, 2, 3))

    monkeypatch.setattr("palate.rewards.clip.load_pickscore", load)
    monkeypatch.setattr("palate.rewards.aesthetic.load_aesthetic", load)
    made = recipe.parse(
        GOOD,
        [
            "reward={weights: {pickscore: 2.0, aesthetic: 1.0, warmth: -1.0}}",
            "reward.source.pickscore=/w/pick",
            "reward.dtype=bfloat16",
            "reward.scale.pickscore=[0.25, 0.5]",
            "reward.noised.aesthetic=0.1",
        ],
    )
    assert recipe.parse(recipe.dump(made)) == made
    reward = recipe.build_reward(made.reward)
    assert seen == [("/w/pick", {"dtype": torch.bfloat16}), (None, {"dtype": torch.bfloat16})]
    grey = torch.full((1, 3, 8, 8), 0.75)
    assert float(reward(grey, ["a"])) == pytest.approx(2 * (0.75 - 0.25) / 0.5 + 0.0, abs=0.02)  # the noise has mean 0
    seen.clear()
    recipe.build_reward(recipe.parse(GOOD, ["reward.name=pickscore"]).reward)
    assert seen == [(None, {})]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.name=pickscor"], "did you mean pickscore"),
        (
            ["reward.name=pickscore", "reward.source.hpsv2=/w"],
            r"reward.source.hpsv2: hpsv2 is in neither reward.name nor",
        ),
        (["reward.name=pickscore", "reward.source.warmth=/w"], "reward.source.warmth"),
        (["reward.name=pickscore", "reward.scale.pickscore=[0.1, 0]"], "reward.scale.pickscore.1: .*greater than 0"),
        (["reward.name=aesthetic", "reward.noised.aesthetic=-1"], "reward.noised.aesthetic: .*greater than 0"),
        (["reward.name=pickscore", "reward.dtype=float16"], "reward.dtype"),
        (["reward.name=remote"], "reward.source.remote: give the server's URL"),
    ],
)
def test_bad_reward_settings_name_the_key(overrides, message):
    with pytest.raises(RecipeError, match=message):
        recipe.parse(GOOD, overrides)


def test_images_are_read_and_encoded_a_few_at_a_time(monkeypatch):
    """The pictures of a large set never lie in memory together, the latents keep their order."""
    told, load = [], load_images

    def seen(paths, *, size):
        told.append(("read", len(paths)))
        return load(paths, size=size)

    class Model:
        image_size = 4

        def encode(self, images):
            told.append(("encode", len(images)))
            return images.mean((2, 3), keepdim=True)

    monkeypatch.setattr("palate.data.pictures.load_images", seen)
    shades = range(0, 210, 3)
    latents = encode_images(Model(), [png((shade, 0, 0)) for shade in shades])
    assert told == [(what, count) for count in (32, 32, 6) for what in ("read", "encode")]
    torch.testing.assert_close(latents[:, 0, 0, 0] * 255, torch.tensor([float(shade) for shade in shades]))


def test_a_broken_image_is_found_before_any_weight_loads(tmp_path, monkeypatch):
    for loader in ("reward_and_tower", "build_model"):
        monkeypatch.setattr(f"palate.recipe.builder.{loader}", lambda *_: pytest.fail("weights were read"))
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(png("red"))
        (tmp_path / f"{name}.txt").write_text("a dog")
    check_images(sorted(tmp_path.glob("*.png")))
    whole = png("red")
    for broken in (whole[:-20], b"", b"no picture", whole[:45] + b"\xff" + whole[46:]):
        (tmp_path / "b.png").write_bytes(broken)
        with pytest.raises(RecipeError, match=r"cannot read the image .*b.png.*repair or remove it"):
            recipe.build(recipe.read("srpo-emoji", ["prompts.file=null", f"prompts.images={tmp_path}"]))
    rows = [{"prompt": "a dog", "image_path": ["a.png", "b.png"], "human_preference": [1, 0]}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(RecipeError, match=r"cannot read the image .*b.png"):
        recipe.build(recipe.read("dpo-emoji", ["prompts.file=null", f"prompts.pairs={tmp_path / 'train.json'}"]))


def test_greys_in_fractions_are_not_black(tmp_path):
    """A TIFF of floats from 0 to 1; one of floats up to 255 is as it was."""
    for scale in (1, 255):
        Image.fromarray(np.full((8, 8), 0.5 * scale, np.float32)).save(tmp_path / "grey.tif")
        assert float(load_images([tmp_path / "grey.tif"], size=8).mean()) == pytest.approx(0.5, abs=0.003)


@pytest.mark.parametrize(("tag", "shape"), [(6, (12, 8)), (9, (8, 12)), (0, (8, 12)), (b"6", (8, 12))])
def test_the_shape_of_a_picture_is_that_of_what_is_loaded(tag, shape):
    """A tag that no camera writes turns nothing, as PIL has it."""
    kind, value = (2, tag) if isinstance(tag, bytes) else (3, tag.to_bytes(2, "little"))  # a text, or 16 bits
    entry = struct.pack("<HHI4s", ExifTags.Base.Orientation, kind, 1, value)
    stream = io.BytesIO()
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    Image.new("RGB", (12, 8)).save(stream, "JPEG", exif=exif)
    assert shape_of(stream.getvalue()) == shape == read_pixels(stream.getvalue()).shape[:2]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "metadata.jsonl"])
def test_half_of_a_character_in_a_prompt_is_named(tmp_path, name):
    """Captions that were cut by a program that counts in UTF-16."""
    row = json.dumps({"prompt": "a \ud83d dog", "file_name": "a.png", "text": "a \ud83d dog"})
    (tmp_path / name).write_text(f"[{row}]" if name == "p.json" else row)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(RecipeError, match=rf"{name}(, line 1)?: .*it has half of a character, .ud83d"):
        captioned_images(tmp_path) if name == "metadata.jsonl" else read_prompts(str(tmp_path / name))


def test_labelled_pairs_without_a_picture_are_left_out_and_counted(tmp_path, caplog):
    columns = {"caption": ["a", "b", "c"], "jpg_0": [png("red"), None, None], "jpg_1": [png("blue")] * 3,
               "label_0": [1.0] * 3, "has_label": [True, True, False]}  # fmt: skip
    parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")
    assert [pair.prompt for pair in preference_pairs(str(tmp_path / "pairs.parquet"))] == ["a"]
    assert "prompts.pairs: 1 rows of" in caplog.text

"""Scenes of several things: captions true of their pictures, words that are read back, tasks and their scores."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

import palate.models.vocabulary as words
from palate.models.vocabulary import Caption, Subject, parse_prompt, plural, vocabulary, with_article
from palate.rewards.detector import Cells, Detection, Detector
from palate.rewards.tasks import TASKS, TaskReward, requirements, task_prompts, task_scores

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
data, recolour = pytest.importorskip("data"), pytest.importorskip("recolour")
PAINTS = ["red", "orange", "yellow", "green", "blue", "purple", "pink"]


@pytest.fixture(scope="module")
def scenic(tmp_path_factory):
    """An assets folder whose vocabulary can say scenes: the package's drawings, with their main colours."""
    root = tmp_path_factory.mktemp("package")
    atlas = root / "assets/atlas"
    atlas.mkdir(parents=True)
    packaged = Path(str(files("palate"))) / "assets/atlas"
    (atlas / "sprites.webp").write_bytes((packaged / "sprites.webp").read_bytes())
    table = json.loads((packaged / "vocabulary.json").read_text())
    table["glue"] = [*dict.fromkeys([*table["glue"], "and", "to", "of"])]
    table["synonyms"] = {k: v for k, v in table["synonyms"].items() if k not in ("above", "below", "and")}
    table |= {"counts": ["two", "three", "four"], "relations": ["above", "below"], "paints": PAINTS, "max_words": 20}
    table["turnable"] = ["car", "apple", *table["concepts"][:30]]
    (atlas / "vocabulary.json").write_text(json.dumps(table))
    sheet = json.loads((packaged / "sprites.json").read_text())
    patch = pytest.MonkeyPatch()
    patch.setattr(words, "files", lambda package: root)
    vocabulary.cache_clear()
    try:
        (atlas / "sprites.json").write_text(json.dumps(sheet))
        pixels = data.Atlas.load(root / "assets").pixels
        for row, drawing in zip(sheet["sprites"], pixels, strict=True):
            row[3] = None if row[1] == "outline" else recolour.main_colour(drawing)
        (atlas / "sprites.json").write_text(json.dumps(sheet))
        yield data.Composer(data.Atlas.load(root / "assets"))
    finally:
        patch.undo()
        vocabulary.cache_clear()


@pytest.fixture(scope="module")
def samples(scenic):
    return scenic.compose(np.random.default_rng(0), 300)


def test_the_words_of_scenes_are_read(scenic):
    assert parse_prompt("a blue car on a yellow background") == Caption("car", None, "yellow", paint="blue")
    assert parse_prompt("three red apples, flat style on white") == Caption(
        "apple", "flat", "white", None, None, "red", 3
    )
    assert parse_prompt("a red cat to the left of a green rocket on blue") == Caption(
        "cat", None, "blue", paint="red", relation="left", second=Subject("rocket", "green")
    )
    assert parse_prompt("a cat at the left").position == "left" and parse_prompt("a cat at the left").relation is None
    assert parse_prompt("outline. a dog above a cat") == Caption(
        "dog", "outline", relation="above", second=Subject("cat")
    )
    assert parse_prompt("a dog on blue").background == "blue" and parse_prompt("a blue dog").background is None


def test_plurals_and_articles_are_read_back(scenic):
    for concept in vocabulary().concepts:
        assert parse_prompt(f"two {plural(concept)}")[::6] == (concept, 2)
    assert with_article("orange car") == "an orange car" and with_article("unicorn") == "a unicorn"


def test_captions_are_true_of_their_scenes(scenic, samples):
    vocab, kinds = vocabulary(), set()
    for scene in samples.scenes:
        caption = parse_prompt(scene.caption)
        names = [vocab.concepts[thing.concept] for thing in scene.things]
        kinds.add(scene.kind)
        assert caption.concept == names[0]
        assert caption.number == (len(names) if scene.kind == "count" else None)
        assert (caption.second.concept if caption.second else None) == (names[1] if scene.kind == "two" else None)
        for subject, thing in zip([caption, caption.second], scene.things, strict=False):
            if subject and subject.paint:
                assert list(vocab.colours)[thing.paint] == subject.paint != list(vocab.colours)[scene.background]
        if caption.relation:
            axis, sign = {"left": (3, -1), "right": (3, 1), "above": (4, -1), "below": (4, 1)}[caption.relation]
            assert sign * (scene.things[0][axis] - scene.things[1][axis]) > 0.4
    assert kinds == {"one", "two", "count"}


def test_things_of_a_scene_do_not_cover_each_other(samples):
    for scene in samples.scenes:
        for k, one in enumerate(scene.things):
            for other in scene.things[:k]:
                apart = max(abs(one.x - other.x), abs(one.y - other.y))
                assert apart > 0.99 * (one.scale + other.scale), scene


def test_a_painted_drawing_has_the_colour_that_is_named(scenic):
    """The main part of the drawing is nearer to its paint than to any other, in OKLab."""
    vocab, atlas = vocabulary(), scenic.atlas
    palette = torch.tensor([vocab.colours[name] for name in PAINTS]) / 255
    goals = recolour.to_oklab(palette[:, :, None, None])[..., 0, 0]
    rows = [row for row in range(len(atlas.main)) if not atlas.main[row].isnan().any()][::7]
    right = []
    for k, row in enumerate(rows):
        turned = recolour.turn(atlas.pixels[row : row + 1], atlas.main[row : row + 1], palette[k % 7 : k % 7 + 1])[0]
        lab = recolour.to_oklab(turned[:3])[:, turned[3] > 0.5]
        own = recolour.to_oklab(atlas.pixels[row, :3])[:, turned[3] > 0.5]
        hue = torch.atan2(own[2], own[1]) - atlas.main[row, 2]
        main = (torch.remainder(hue + torch.pi, 2 * torch.pi) - torch.pi).abs() < 0.5
        main &= own[1:].norm(dim=0) > 0.06
        right.append(int((goals - lab[:, main].mean(1)).norm(dim=1).argmin()) == k % 7)
    assert len(right) > 15 and np.mean(right) >= 0.95


def test_turning_a_colour_to_itself_changes_nothing():
    red = torch.tensor([[0.8, 0.2, 0.2]])
    drawing = torch.ones(1, 4, 8, 8)
    drawing[:, :3] = red[:, :, None, None] * torch.linspace(0.7, 1, 8)
    main = torch.tensor([recolour.main_colour(drawing[0])])
    goal = recolour.to_rgb(
        torch.stack([main[:, 0], main[:, 1] * main[:, 2].cos(), main[:, 1] * main[:, 2].sin()], 1)[:, :, None, None]
    )[..., 0, 0]
    assert torch.allclose(recolour.turn(drawing, main, goal), drawing, atol=2e-3)
    assert torch.allclose(recolour.to_rgb(recolour.to_oklab(drawing[:, :3])), drawing[:, :3], atol=1e-3)


def _thing(concept, paint=None, x=0.0, y=0.0):
    return Detection(concept, paint, x, y, 0.5, 0.9)


@pytest.mark.parametrize(
    ("prompt", "found", "met"),
    [
        ("a cat", [_thing("cat")], [True]),
        ("a cat", [_thing("dog")], [False]),
        ("a cat and a dog", [_thing("dog"), _thing("cat")], [True, True]),
        ("three cats", [_thing("cat")] * 3 + [_thing("dog")], [True, True]),
        ("three cats", [_thing("cat")] * 4, [True, False]),
        ("a red car", [_thing("car", "blue")], [True, False]),
        ("a red car and a blue apple", [_thing("car", "blue"), _thing("apple", "red")], [True, True, False, False]),
        ("a cat to the left of a dog", [_thing("cat", x=-0.5), _thing("dog", x=0.5)], [True, True, True]),
        ("a cat to the right of a dog", [_thing("cat", x=-0.5), _thing("dog", x=0.5)], [True, True, False]),
        ("a cat above a dog", [_thing("cat", y=-0.5), _thing("dog", y=0.5)], [True, True, True]),
        ("a cat below a dog", [_thing("cat", y=-0.5), _thing("dog", y=0.5)], [True, True, False]),
        ("a cat left of a dog", [_thing("cat", x=-0.5)], [True, False, False]),
    ],
)
def test_what_a_prompt_names_is_checked_one_by_one(scenic, prompt, found, met):
    assert requirements(parse_prompt(prompt), found) == met


def test_task_prompts_ask_for_what_their_task_checks(scenic):
    prompts = task_prompts()
    assert tuple(prompts) == TASKS and prompts == task_prompts() != task_prompts(seed=1)
    read = {task: [parse_prompt(prompt) for prompt in asked] for task, asked in prompts.items()}
    assert all(len(asked) == len(set(asked)) >= 20 for asked in prompts.values())
    assert all(c.number is None and c.second is None and c.paint is None for c in read["single object"])
    assert {c.number for c in read["counting"]} == {2, 3, 4}
    assert {c.relation for c in read["position"]} == {"left", "right", "above", "below"}
    assert all(c.second and c.second.concept != c.concept for t in TASKS[1::4] for c in read[t])
    assert all(c.paint in PAINTS for t in ("colours", "binding") for c in read[t])
    assert all(c.second.paint != c.paint for c in read["binding"])


def test_the_reward_of_tasks_is_the_part_that_is_met(scenic):
    class Sees:
        def detect(self, images):
            return [[_thing("car", "blue"), _thing("apple", "red")], []]

    images, prompts = torch.zeros(2, 3, 64, 64), ["a blue car and a blue apple", "a cat"]
    assert TaskReward(Sees())(images, prompts).tolist() == [0.75, 0.0]
    assert TaskReward(Sees(), strict=True)(images, prompts).tolist() == [0.0, 0.0]
    assert task_scores({"a": [""], "b": [""]}, {"a": [1, 0], "b": [1, 1]}) == {"a": 0.5, "b": 1.0, "mean": 0.75}


def test_the_detector_reads_its_cells(tmp_path):
    """Two middles that are peaks are two things, at their exact places; what is below the threshold is none."""
    torch.manual_seed(0)
    detector = Detector(["cat", "dog"], ["red", "blue"], width=8)
    middle = torch.full((1, 16, 16), -6.0)
    middle[0, 4, 10], middle[0, 4, 11], middle[0, 12, 2], middle[0, 8, 8] = 3.0, 1.0, 4.0, -1.0
    concept, paint, place = torch.zeros(1, 2, 16, 16), torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    concept[0, 1, 4, 10], concept[0, 0, 12, 2], paint[0, 1, 4, 10], paint[0, 2, 12, 2] = 5.0, 5.0, 5.0, 5.0
    place[0, :, 4, 10] = torch.tensor([0.25, -0.5, 0.4])
    detector.forward = lambda images: Cells(middle, concept, paint, place)
    first, second = detector.detect(torch.zeros(1, 3, 64, 64))[0]
    assert (first.concept, first.paint, second.concept, second.paint) == ("cat", None, "dog", "blue")
    assert (first.x, first.y) == (2.5 / 8 - 1, 12.5 / 8 - 1) and second[2:4] == (10.75 / 8 - 1, 4 / 8 - 1)
    assert second.side == pytest.approx(0.4)
    saved = Detector(["cat", "dog"], ["red", "blue"], width=8)
    saved.save(tmp_path)
    again, images = Detector.load(tmp_path), torch.rand(2, 3, 64, 64)
    assert torch.allclose(again(images).concept, saved(images).concept, atol=2e-2)


def test_lessons_of_a_scene_put_each_middle_into_its_cell(scenic, samples):
    trained = pytest.importorskip("train_detector")
    lessons = trained.Lessons(scenic.atlas)
    maps = lessons.middles(samples.scenes)
    assert maps.shape == (300, 16, 16)
    for n, scene in enumerate(samples.scenes):
        assert int((maps[n] == 1).sum()) == len(scene.things)
        for thing in scene.things:
            assert maps[n, int((thing.y + 1) * 8), int((thing.x + 1) * 8)] == 1
    named = [t for s in samples.scenes for t in s.things if t.paint is not None]
    assert named and all(lessons.paint(t) == lessons.paints.index(t.paint) for t in named)


def test_fresh_compositions_join_a_batch_and_are_what_their_scenes_say(scenic, samples):
    shown = pytest.importorskip("shown")
    before = shown.Shown.of(samples.images[:20].mul(255).round().byte(), samples.scenes[:20])
    whole = before.with_fresh(scenic, 60, np.random.default_rng(5))
    assert torch.equal(whole.images[:20], before.images) and whole.scenes[:20] == before.scenes
    fresh = whole.scenes[20:]
    assert len(fresh) == 60 and whole.concept[20:].tolist() == [scene.things[0].concept for scene in fresh]
    apart = (scenic.paint(fresh) - whole.images[20:].float() / 255).abs().mean((1, 2, 3))
    assert float(apart.median()) < 0.03 and float(apart.max()) > 0.01  # weathered, and of these scenes
    again = before.with_fresh(scenic, 60, np.random.default_rng(6))
    assert again.scenes[20:] != fresh


def test_a_scene_that_is_moved_is_what_its_image_shows(scenic, samples):
    """Painted anew, it is the moved image (bilinear where it is zoomed), and its caption is true of it."""
    shown = pytest.importorskip("shown")
    shown.read.cache_clear()
    before = shown.Shown.of(samples.images[:120].mul(255).round().byte(), samples.scenes[:120])
    after = shown.varied(before, np.random.default_rng(0))
    apart = (scenic.paint(after.scenes) - after.images.float() / 255).abs().mean((1, 2, 3))
    firsts = [(now.things[0], was.things[0]) for now, was in zip(after.scenes, before.scenes, strict=True)]
    kept = torch.tensor([now.scale == was.scale for now, was in firsts])
    assert 40 < int(kept.sum()) < 80 and 40 < sum(now.flip != was.flip for now, was in firsts) < 80
    assert float(apart[kept].median()) < 0.004 and float(apart[~kept].median()) < 0.02
    own = torch.arange(120)
    assert shown.true_of([scene.caption for scene in after.scenes], after)[own, own].all()
    stale = shown.true_of([scene.caption for scene in before.scenes], after)[own, own]
    assert stale.float().mean() < 0.97  # sides have changed
    shown.read.cache_clear()


def test_wrong_captions_are_wrong_and_true_ones_true(scenic, samples):
    shown = pytest.importorskip("shown")
    shown.read.cache_clear()
    seen = shown.Shown.of(torch.zeros(len(samples.scenes), dtype=torch.uint8), samples.scenes)
    lies = [shown.wrong(scene, np.random.default_rng(k)) for k, scene in enumerate(samples.scenes)]
    own = torch.arange(len(lies))
    assert shown.true_of(samples.captions, seen)[own, own].all()
    for kind in range(4):
        told = shown.true_of([row[kind] for row in lies], seen)[own, own]
        assert told.float().mean() < 0.05, (kind, [lies[k][kind] for k in told.nonzero()[:5, 0].tolist()])
    shown.read.cache_clear()

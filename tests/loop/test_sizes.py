"""Train small, judge large, and sizes in turn: every step one size, resumed exactly, planned at the largest."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.loop import Elastic, rows, run, same, tensors
from support.tiny_families import saved

from palate import plan, recipe
from palate.core import DrawsOtherSizes, Loss
from palate.data.buckets import Bucket, assign, nearest, shape_of
from palate.models.sizes import at_size, largest
from palate.models.stable_diffusion import StableDiffusion
from palate.recipe import SampleSettings
from palate.runtime import checkpoint
from palate.runtime.distributed import Ranks
from palate.runtime.errors import InputError
from palate.testing import PROMPTS, TinyFlow, tiny_reward
from palate.train.batches import Batches
from palate.train.job import Job, check_settings
from palate.train.start import run_job

SIZES = [8, (8, 16), (16, 8)]


class Shapes:
    """Maximises brightness, and notes the size of the images of each step."""

    trains = ("policy",)
    any_size = True

    def __init__(self):
        self.seen = []

    def step(self, model, reward, batch, rng):
        noise = rng.normal("x", model.latent_shape)
        images = model.decode(model.predict(noise, torch.full((len(noise),), 0.5), batch.cond).x0)
        self.seen.append(tuple(images.shape[-2:]))
        yield Loss(-images.mean(), {}, "policy")


def trained(folder, **options):
    algorithm = Shapes()
    model, outcome = run(folder, model=Elastic(), algorithm=algorithm, sizes=SIZES, **options)
    return model, outcome, algorithm.seen


def test_each_step_draws_one_of_the_sizes_and_all_of_them_come(tmp_path):
    model, _, seen = trained(tmp_path, steps=12)
    assert set(seen) == {(8, 8), (8, 16), (16, 8)} and len(seen) == 12
    assert (model.latent_shape, model.image_size) == (TinyFlow().latent_shape, TinyFlow().image_size)  # as it was


def test_a_run_that_goes_on_draws_the_sizes_that_it_would_have_drawn(tmp_path):
    whole = trained(tmp_path / "whole", steps=6)[2]
    begun = trained(tmp_path / "halves", steps=3)[2]
    went_on = trained(tmp_path / "halves", steps=6, resume=True)[2]
    assert begun + went_on == whole
    assert same(tensors(tmp_path / "halves", 6), tensors(tmp_path / "whole", 6))
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


def test_a_size_is_a_function_of_seed_and_step_alone_and_even():
    def batches(seed, size):
        return Batches(Elastic(), PROMPTS, None, seed=seed, size=size, micro_batches=1, ranks=Ranks()).of_sizes(
            SIZES, []
        )

    one = [batches(0, 4).size_of(step) for step in range(1, 301)]
    assert one == [batches(0, 2).size_of(step) for step in range(1, 301)]  # not of the batch
    assert one != [batches(1, 4).size_of(step) for step in range(1, 301)]
    assert all(70 < one.count(size) < 130 for size in SIZES)
    assert batches(0, 4).samples(3).size == one[2]


def test_previews_are_drawn_at_a_size_of_their_own(tmp_path):
    algorithm = Shapes()
    sample = SampleSettings(steps=2, image_size=(16, 24))
    run(tmp_path, model=Elastic(), algorithm=algorithm, steps=2, preview_every=1, preview_prompts=2, sample=sample)
    assert set(algorithm.seen) == {(8, 8)}  # training keeps its own
    for folder in sorted((tmp_path / "samples").iterdir()):
        assert np.asarray(Image.open(folder / "0000.png")).shape == (16, 24, 3)


def test_what_cannot_be_is_said_before_the_first_step(tmp_path):
    with pytest.raises(InputError, match=r"prompts.sizes got 9; needs a multiple of 2"):
        run(tmp_path / "a", model=Elastic(), algorithm=Shapes(), sizes=[8, 9])
    with pytest.raises(InputError, match=r"sample.image_size got 7; needs a multiple of 2"):
        run(tmp_path / "b", model=Elastic(), algorithm=Shapes(), preview_every=1, sample=SampleSettings(image_size=7))
    with pytest.raises(InputError, match=r"prompts.sizes: TinyFlow draws one size only"):
        run(tmp_path / "c", model=TinyFlow(), algorithm=Shapes(), sizes=[8])

    class Keeps(Shapes):
        any_size = False

    with pytest.raises(InputError, match=r"prompts.sizes: Keeps trains on one size"):
        run(tmp_path / "d", model=Elastic(), algorithm=Keeps(), sizes=[8])
    assert not any((tmp_path / x / "checkpoints").exists() for x in "abcd")


def test_a_step_that_is_not_finite_is_repeated_at_its_size(tmp_path):
    class Breaks(Shapes):
        def step(self, model, reward, batch, rng):
            for loss in super().step(model, reward, batch, rng):
                bad = self.seen[-1] == (8, 16)
                yield loss._replace(value=loss.value * float("nan")) if bad else loss

    from palate.train import reproduce_step

    run(tmp_path, model=Elastic(), algorithm=Breaks(), sizes=SIZES, steps=6)
    (folder,) = sorted((tmp_path / "failures").iterdir())
    again = Breaks()
    _, problem = reproduce_step(Elastic(), again, tiny_reward, checkpoint.load(folder))
    assert again.seen == [(8, 16)] and "loss" in problem


def test_a_family_over_a_folder_draws_other_sizes_and_is_then_as_it_was():
    model = StableDiffusion.load(saved("stable-diffusion")[0], image_size=32, training="none", dtype="float32")
    assert isinstance(model, DrawsOtherSizes)
    before = model.latent_shape, model.image_size
    with model.at_size((64, 32)):
        assert model.image_size == (64, 32)
        latents = torch.zeros(1, *model.latent_shape)
        assert model.decode(latents).shape == (1, 3, 64, 32)
        cond = model.encode_prompts(["a cat"])
        assert model.predict(latents, torch.tensor([0.5]), cond).x0.shape == latents.shape
    assert (model.latent_shape, model.image_size) == before
    told = r"sample.image_size got 33; stable-diffusion needs a multiple of"
    with pytest.raises(InputError, match=told), at_size(model, 33):
        pass
    assert (model.latent_shape, model.image_size) == before


def test_the_plan_is_that_of_the_largest_size(monkeypatch):
    assert largest([512, (1024, 256), (640, 640)]) == (640, 640) and largest([]) is None
    tree = {
        "model": {"name": "sdxl", "folder": "owner/base", "image_size": 512},
        "algorithm": {"name": "draft", "K": 1, "n": 0, "steps": 2}, "reward": {"name": "pickscore"},
        "prompts": {"list": ["a cat"], "sizes": [512, [1024, 768], [768, 768]]},
    }  # fmt: skip
    read = recipe.parse(json.dumps(tree))
    assert read.prompts.sizes == [512, (1024, 768), (768, 768)]
    seen = []

    def measure(planned):
        seen.append(planned.model.image_size)
        raise InterruptedError

    monkeypatch.setattr("palate.plan.memory.measure", measure)
    with pytest.raises(InterruptedError):
        plan.plan(read)
    assert seen == [(1024, 768)]


def test_older_runs_have_the_identity_that_they_had():
    tree = {"model": {"name": "sdxl", "folder": "owner/base"}, "algorithm": {"name": "draft", "K": 1, "n": 0},
            "reward": {"name": "pickscore"}, "prompts": {"list": ["a cat"]},
            "trainer": {"guard": {"every": 0}}}  # fmt: skip

    def identity(*overrides):
        return recipe.fingerprint(recipe.parse(json.dumps(tree), overrides))

    assert identity() != identity("prompts.sizes=[64]")
    assert identity() == identity("sample.image_size=128")  # how it is looked at is no part of a run
    watched = identity("trainer.guard.every=5")  # but a guard decides by what it sees
    assert len({watched, identity("trainer.guard.every=5", "sample.image_size=128"), identity()}) == 3
    assert watched == identity("trainer.guard.every=5", "sample.steps=7", "sample.guidance=2")


def test_what_has_one_size_is_said_when_the_recipe_is_read():
    read = ["prompts.sizes=[64]", "sample.image_size=128"]
    with pytest.raises(ValueError, match=r"prompts.sizes: emoji draws one size only; leave it out\nsample.image_size:"):
        recipe.read("draft-emoji", read)
    assert recipe.read("dpo-sd15-released", ["prompts.sizes=[512, 640]"]).prompts.sizes == [512, 640]


# ------------------------------------------------------------------------------------ captioned pictures of many shapes


def picture(folder, name, height, width, colour=128, **options):
    path = folder / f"{name}.png"
    Image.fromarray(np.full((height, width, 3), colour, np.uint8)).save(path, **options)
    (folder / f"{name}.txt").write_text(f"picture {name}")
    return path


def test_a_picture_goes_to_the_size_that_it_loses_the_least_to(tmp_path):
    sizes = [64, (64, 128), (128, 64)]
    for shape, expected in (
        ((100, 100), 0), ((300, 900), 1), ((50, 71), 1), ((50, 70), 0), ((71, 50), 2), ((4000, 10), 2)
    ):  # fmt: skip
        assert nearest([shape], sizes) == expected, shape  # the border is the ratio sqrt(2)
    assert nearest([(10, 10)], [32, (64, 64)]) == 0
    for pair, expected in (([(10, 12), (10, 60)], 1), ([(10, 10), (10, 11)], 0), ([(60, 10), (11, 10)], 2)):
        assert nearest(pair, sizes) == nearest(pair[::-1], sizes) == expected, pair  # both lose the least together
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright: stored lying, shown standing
    wide, standing = picture(tmp_path, "a", 10, 30), picture(tmp_path, "b", 10, 30, exif=turned)
    assert (shape_of(wide), shape_of(standing)) == ((10, 30), (30, 10))
    assert assign([standing, wide, wide], [(0,), (1,), (2,)], sizes) == {1: [1, 2], 2: [0]}
    assert assign([standing, wide, wide], [(1, 2), (2, 1), (0, 0)], sizes) == {1: [0, 1], 2: [2]}


def pictures(model):
    """Three wide pictures and one square one, as buckets; every latent holds the picture's number."""
    found = []
    for size, own in (((8, 16), [0, 2, 3]), (8, [1])):
        with model.at_size(size):
            shape = model.latent_shape
        found.append(Bucket(size, own, torch.stack([torch.full(shape, float(row)) for row in own])))
    return found


class Offline(Shapes):
    """Notes which picture each sample is, and that its caption came along."""

    def step(self, model, reward, batch, rng):
        assert batch.latents.shape[1:] == model.latent_shape
        numbers = batch.latents[:, 0, 0, 0].int().tolist()
        assert batch.prompts == [f"picture {number}" for number in numbers]
        self.seen.append((model.image_size, tuple(numbers)))
        yield Loss(model.predict(batch.latents, torch.full((len(numbers),), 0.5), batch.cond).x0.square().mean(), {},
                   "policy")  # fmt: skip


def offline(folder, steps, **options):
    model, algorithm = Elastic(), Offline()
    settings = check_settings(None, {"steps": steps, "batch_size": 2, "lr": 1e-2, "seed": 3, "checkpoint_every": 1})
    captions = [f"picture {i}" for i in range(4)]
    job = Job(model, algorithm, tiny_reward, captions, folder, settings, captions, buckets=pictures(model))
    run_job(job, progress=False, **options)
    return algorithm.seen


def test_a_batch_is_of_one_size_with_its_captions_and_a_run_goes_on_exactly(tmp_path):
    whole = offline(tmp_path / "whole", 10)
    assert {size for size, _ in whole} == {(8, 16), (8, 8)}
    assert all(set(numbers) == {1} for size, numbers in whole if size == (8, 8))
    wide = [number for size, numbers in whole if size == (8, 16) for number in numbers]
    assert all(sorted(wide[i : i + 3]) == [0, 2, 3] for i in range(0, len(wide) - 2, 3))  # each once an epoch
    begun = offline(tmp_path / "halves", 4)
    assert begun + offline(tmp_path / "halves", 10, resume=True) == whole
    assert same(tensors(tmp_path / "halves", 10), tensors(tmp_path / "whole", 10))


def test_each_picture_is_as_likely_as_any_other():
    model = Elastic()
    options = {"seed": 0, "size": 2, "micro_batches": 1, "ranks": Ranks()}
    batches = Batches(model, [f"picture {i}" for i in range(4)], None, **options).of_sizes([], pictures(model))
    steps = [batches.samples(step).size for step in range(1, 401)]
    assert 0.19 < steps.count(8) / 400 < 0.31  # one picture of four
    again = Batches(model, [f"picture {i}" for i in range(4)], None, **options).of_sizes([], pictures(model))
    assert again.samples(350).prompts == batches.samples(350).prompts  # no matter which steps were asked for before
    assert len(batches.used_prompts(1)) == 4


def test_a_recipe_with_pictures_and_sizes_has_buckets(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name, height, width in (("a", 40, 80), ("b", 64, 64), ("c", 30, 90)):
        picture(tmp_path / "pictures", name, height, width)
    text = {
        "model": {"name": "stable-diffusion", "folder": str(saved("stable-diffusion")[0]), "image_size": 32,
                  "dtype": "float32", "device": "cpu", "lora_rank": 2, "text_cache": str(tmp_path / "text")},
        "algorithm": {"name": "refl", "T": 3, "T1": 1, "T2": 2, "pretrain": 0.5}, "reward": {"name": "brightness"},
        "prompts": {"images": str(tmp_path / "pictures"), "sizes": [32, [32, 64]]},
    }  # fmt: skip
    parts = recipe.build(recipe.parse(json.dumps(text)))
    assert parts.latents is None and parts.prompts == ["picture a", "picture b", "picture c"]
    assert [(bucket.size, bucket.rows) for bucket in parts.buckets] == [(32, [1]), ((32, 64), [0, 2])]
    height, width = parts.buckets[1].latents.shape[-2:]
    assert width == 2 * height and len(parts.buckets[1].latents) == 2


def pairs_file(folder):
    """Three pairs as HPDv2 has them: wide, square (a tie), wide."""
    shapes = {"a": (40, 80), "b": (40, 90), "c": (64, 64), "d": (60, 64), "e": (30, 60), "f": (32, 64)}
    for k, (name, (height, width)) in enumerate(shapes.items()):
        image = np.tile(np.linspace(30 * k, 30 * k + 60, width, dtype=np.uint8)[None, :, None], (height, 1, 3))
        Image.fromarray(image).save(folder / f"{name}.png")
    rows = [
        {"prompt": f"pair {k}", "file_path": [f"{x}.png", f"{y}.png"], "human_preference": votes}
        for k, (x, y, votes) in enumerate((("a", "b", [1, 0]), ("c", "d", [1, 1]), ("e", "f", [0, 1])))
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def test_a_like_goes_to_the_size_of_its_one_picture(tmp_path):
    files = [picture(tmp_path, "wide", 32, 64), picture(tmp_path, "square", 32, 32)]
    assert assign(files, [(0, -1), (-1, 1), (-1, 0)], [32, (32, 64)]) == {0: [1], 1: [0, 2]}


def of_pairs(tmp_path, *, sizes=None, image_size=32, **algorithm):
    prompts = {"pairs": str(pairs_file(tmp_path)), **({"sizes": sizes} if sizes else {})}
    return json.dumps({
        "model": {"name": "stable-diffusion", "folder": str(saved("stable-diffusion")[0]), "image_size": image_size,
                  "dtype": "float32", "device": "cpu", "lora_rank": 2, "text_cache": str(tmp_path / "text")},
        "algorithm": {"name": "dpo", **algorithm}, "reward": {"name": "brightness"}, "prompts": prompts,
        "trainer": {"steps": 8, "batch_size": 2, "guard": {"every": 0}}, "run": {"folder": str(tmp_path / "run")},
    })  # fmt: skip


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("posterior", [False, True])
def test_pairs_of_a_size_are_those_of_a_model_of_this_size(flip, posterior, tmp_path):
    """The preferred picture first, a tie in both orders, mirror images with their captions; at each size to the bit
    what the pictures are that a recipe of that size alone has."""
    how = {"flip": flip, "posterior": posterior, "ties": "equal"}
    parts = recipe.build(recipe.parse(of_pairs(tmp_path, sizes=[32, [32, 64]], **how)))
    square, wide = parts.buckets
    assert (parts.latents, square.size, wide.size) == (None, 32, (32, 64))
    captions = [[parts.prompts[row] for row in bucket.rows] for bucket in parts.buckets]
    views = 2 if flip else 1
    assert captions == [["pair 1", "pair 1"] * views, ["pair 0", "pair 0", "pair 2", "pair 2"] * views]
    for bucket, size in ((square, 32), (wide, [32, 64])):
        alone = recipe.build(recipe.parse(of_pairs(tmp_path, image_size=size, **how)))
        assert alone.prompts == parts.prompts and torch.equal(bucket.latents, alone.latents[bucket.rows])
    assert torch.equal(square.latents[0], square.latents[1].flip(0)) and bool(square.latents[0].isfinite().all())


def test_dpo_trains_on_pairs_of_several_sizes(tmp_path):
    seen = []
    made = recipe.parse(of_pairs(tmp_path, sizes=[32, [32, 64]], ties="equal", posterior=True))
    parts = recipe.build(made)
    step = parts.algorithm.step

    def noted(model, reward, batch, rng):
        seen.append((model.image_size, batch.latents.shape[-1] // batch.latents.shape[-2]))
        return step(model, reward, batch, rng)

    parts.algorithm.step = noted
    job = Job(parts.model, parts.algorithm, parts.reward, parts.prompts, tmp_path / "run", made.trainer, parts.prompts,
              buckets=parts.buckets)  # fmt: skip
    assert run_job(job, progress=False).reason == "finished"
    assert set(seen) == {((32, 32), 1), ((32, 64), 2)}

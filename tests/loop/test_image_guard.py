"""The guard without a judge: images of before and now in a run, kept in its checkpoints, its limits, its rewards."""

from __future__ import annotations

import math

import pytest
import torch
from support.loop import Quadratic, rows, run, same, srpo, tensors
from torch import Tensor

import palate
from palate import recipe
from palate.core import EmbedsImages
from palate.evaluate.monitor import ImageMonitor, measures
from palate.models.emoji import EmojiModel
from palate.recipe import GuardSettings
from palate.testing import PROMPTS, TinyFlow
from palate.train import broken_limits
from palate.train.guard import Job, measure_of
from palate.train.job import check_settings

SHARES = ("variety_ratio", "fit_ratio")
LIMITS = ("cast_shift", "saturation_shift", "detail_shift", "drift", "latent_drift", "duplicates_rise", "heldout_fall",
          *SHARES)  # fmt: skip
PAIRS = [prompt for prompt in PROMPTS for _ in range(2)]


def unwatched(**limits) -> GuardSettings:
    """Only the given limits."""
    return GuardSettings(**{"every": 2, "prompts": 8, "diversity_ratio": 0.0, **dict.fromkeys(LIMITS), **limits})


class Painted:
    """A model whose images are what a function makes of TinyFlow's."""

    def __init__(self, paint=lambda images: images):
        self.inner, self.paint = TinyFlow(), paint

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def decode(self, latents: Tensor) -> Tensor:
        return self.paint(self.inner.decode(latents)).clamp(0, 1)


def looks(paint, **options) -> dict[str, float]:
    """What a monitor measures when the images become what `paint` makes of them."""
    model, monitor = Painted(), ImageMonitor(seed=0, **options)
    first = monitor(model, PAIRS, range(len(PAIRS)))
    zero = [value for key, value in first.items() if "shift" in key or "drift" in key or key == "heldout_fall"]
    assert zero and not any(zero), "nothing has moved at the first look"
    model.paint = paint
    return monitor(model, PAIRS, range(len(PAIRS)))


def test_each_hack_moves_its_own_measure():
    still = looks(lambda images: images)
    assert still["drift"] == still["cast_shift"] == still["latent_drift"] == 0
    tinted = looks(lambda images: images + torch.tensor([0.2, 0.0, -0.2])[:, None, None])
    assert tinted["cast_shift"] > 2 and tinted["latent_drift"] == 0
    grey = looks(lambda images: images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    assert grey["saturation_shift"] > 1 and grey["saturation"] == 0
    checker = 0.3 * (torch.arange(8) % 2 * 2.0 - 1)
    noisy = looks(lambda images: images + checker)
    assert noisy["detail_shift"] > 1 and noisy["cast_shift"] < 0.3
    one = looks(lambda images: images[:1].expand_as(images))
    assert one["duplicates"] == 1 and one["variety"] == pytest.approx(0, abs=1e-6) and one["drift"] > 0.3


def test_the_tower_of_the_reward_is_asked_for_distances_and_the_held_out_reward_for_its_mean():
    class Tower:
        def embed_images(self, images):
            return torch.nn.functional.normalize(images.mean((2, 3)) - 0.5, dim=1)

    def red(images, prompts):
        return images[:, 0].mean((1, 2))

    assert isinstance(Tower(), EmbedsImages)
    darker = looks(lambda images: 0.5 + 0.5 * (images - 0.5), tower=Tower(), heldout=red)
    assert darker["drift"] == pytest.approx(0, abs=1e-9)  # unit vectors: the direction is what it was
    opposite = looks(lambda images: 1 - images, tower=Tower(), heldout=red)
    assert opposite["drift"] > 1
    base, now = looks(lambda images: images, heldout=red), looks(lambda images: images - 0.1, heldout=red)
    assert base["heldout"] - now["heldout"] == pytest.approx(0.1, abs=0.02) and now["heldout_fall"] > 0.5


def test_an_image_fits_its_prompt_by_its_lead_over_other_prompts():
    class Reward:
        """Cosine of the mean colour and of the prompt's."""

        def image_features(self, images):
            return torch.nn.functional.normalize(images.mean((2, 3)), dim=1)

        embed_images = image_features

        def score(self, seen, prompts):
            return (seen * torch.eye(3)[[int(prompt) for prompt in prompts]]).sum(1)

        def __call__(self, images, prompts):
            return self.score(self.image_features(images), prompts)

    prompts = ["0", "0", "1", "1", "2", "2"]
    clean = torch.eye(3).repeat_interleave(2, 0)[..., None, None].expand(-1, -1, 8, 8)
    monitor = ImageMonitor(seed=0, tower=Reward())
    seen = monitor._seen(clean, prompts, [[p for p in "012" if p != own] for own in prompts])
    assert torch.equal(seen["fit"], torch.ones(6))  # own prompt 1, every other 0
    swapped = monitor._seen(clean.flip(1), prompts, [[p for p in "012" if p != own] for own in prompts])
    assert swapped["fit"].tolist() == [-0.5, -0.5, 1, 1, -0.5, -0.5]  # 0 and 2 show each other's colour
    rows = {"features": torch.eye(6), "pictures": torch.rand(6, 12), "latents": torch.eye(6)}
    rows |= {"cast": torch.zeros(6, 2), "saturation": torch.zeros(6), "detail": torch.zeros(6)}
    found = measures({**rows, "fit": swapped["fit"]}, {**rows, "fit": seen["fit"]}, prompts)
    assert found["fit"] == 0.0 and found["fit_error"] == pytest.approx(math.sqrt(6 * 0.5 / 5) / math.sqrt(6))
    assert broken_limits({"fit": 0.87, "fit_error": 0.02}, {"fit": 1.0}, GuardSettings())
    assert not broken_limits({"fit": 0.87, "fit_error": 0.04}, {"fit": 1.0}, GuardSettings())  # within its error


def test_a_look_depends_on_seed_and_ids_and_not_on_how_many_are_drawn_at_once():
    class Reward:
        """How red, as many times as the prompt has letters."""

        def image_features(self, images):
            return images.mean((2, 3))

        embed_images = image_features

        def score(self, seen, prompts):
            return seen[:, 0] * torch.tensor([float(len(prompt)) for prompt in prompts])

        def __call__(self, images, prompts):
            return self.score(self.image_features(images), prompts)

    def look(seed=1, first=0, batch_size=32):
        monitor = ImageMonitor(seed=seed, tower=Reward(), heldout=Reward(), batch_size=batch_size)
        return monitor.look(TinyFlow(), PAIRS, range(first, first + len(PAIRS)))

    whole, parts = look(), look(batch_size=3)
    assert {"fit", "heldout", "latents", "pictures"} < whole.keys() == parts.keys()
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)
    assert not torch.allclose(look(seed=2)["latents"], whole["latents"], atol=1e-2)
    assert not torch.allclose(look(first=1)["latents"], whole["latents"], atol=1e-2)


def test_latents_are_compared_by_the_noise_that_they_came_from():
    base = {"features": torch.eye(4), "pictures": torch.rand(4, 12), "latents": torch.eye(4)}
    base |= {"cast": torch.zeros(4, 2), "saturation": torch.zeros(4), "detail": torch.zeros(4)}
    moved = {**base, "latents": torch.eye(4)[[1, 0, 3, 2]]}  # each where another prompt's was
    assert measures(moved, base, ["a", "b", "c", "d"])["latent_drift"] == pytest.approx(1.0)
    assert measures(base, base, ["a", "b", "c", "d"])["latent_drift"] == 0


@pytest.mark.parametrize("key", [*LIMITS, "diversity"])
def test_each_limit_by_itself_names_what_broke_it_and_can_be_switched_off(key):
    value = {"duplicates_rise": "duplicates", "variety_ratio": "variety", "fit_ratio": "fit"}.get(key, key)
    base = {"duplicates": 0.1, "diversity": 0.5, "variety": 1.0, "fit": 1.0, "fit_error": 0.0}
    base |= {k: 0.0 for k in LIMITS if not k.endswith(("_rise", "_ratio"))}
    now = {**base, value: 0.1 if value in ("diversity", "variety", "fit") else 3.0}
    (broken,) = broken_limits(now, base, GuardSettings())
    assert broken.startswith(value)
    assert broken_limits(base, base, GuardSettings()) == []
    assert broken_limits(now, base, unwatched()) == []
    (broken,) = broken_limits({**base, value: float("nan")}, base, GuardSettings())
    assert broken.startswith(value)


def test_a_held_out_reward_is_judged_by_its_spread_where_that_was_taken_and_else_in_its_own_units():
    base, now = {"heldout": 20.0}, {"heldout": 19.0}
    assert broken_limits(now, base, GuardSettings(heldout_drop=0.1))
    spread = {"heldout_fall": 0.0}
    assert not broken_limits({**now, "heldout_fall": 0.2}, {**base, **spread}, GuardSettings(heldout_drop=0.1))
    assert broken_limits({**now, "heldout_fall": 0.7}, {**base, **spread}, GuardSettings(heldout_drop=0.1))


def test_a_run_that_goes_on_compares_with_the_same_images_of_before(tmp_path):
    guard = unwatched(action="warn")
    run(tmp_path / "whole", guard=guard, steps=6)
    run(tmp_path / "halves", guard=guard, steps=3)
    run(tmp_path / "halves", guard=guard, steps=6, resume=True)
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    assert same(tensors(tmp_path / "halves", 6), tensors(tmp_path / "whole", 6))
    kept = {key for key in tensors(tmp_path / "whole", 6) if key.startswith("guard/")}
    assert kept == {f"guard/{name}" for name in ("cast", "saturation", "detail", "features", "pictures", "latents")}
    last = [row for row in rows(tmp_path / "whole") if row["event"] == "guard"][-1]
    assert last["step"] == 6 and last["drift"] > 0 and last["latent_drift"] > 0


def test_a_run_that_drifts_is_stopped_and_keeps_the_last_step_inside(tmp_path):
    _, outcome = run(tmp_path, algorithm=Quadratic(), guard=unwatched(latent_drift=0.02), steps=40, lr=0.3)
    checks = [row for row in rows(tmp_path) if row["event"] == "guard"]
    assert outcome.reason.startswith("guard: latent_drift") and outcome.step < 40
    assert [row["verdict"] == "ok" for row in checks[1:]] == [True] * (len(checks) - 2) + [False]
    assert checks[-1]["best_step"] == outcome.step - 2


def test_looking_changes_nothing_of_the_training(tmp_path):
    run(tmp_path / "a", guard=GuardSettings(every=0))
    run(tmp_path / "b", guard=unwatched(every=1, action="warn"))
    after = [{k: v for k, v in tensors(tmp_path / x).items() if not k.startswith("guard/")} for x in "ab"]
    assert same(*after)


def test_who_measures(tmp_path):
    def job(model, reward=lambda images, prompts: images.mean((1, 2, 3)), **guard):
        settings = check_settings(None, {"guard": GuardSettings(**guard), "batch_size": 6, "micro_batches": 3})
        return Job(model, srpo(), reward, PROMPTS, tmp_path, settings, PROMPTS)

    emoji = EmojiModel.load(lora_rank=1)
    assert not isinstance(measure_of(job(emoji), None), ImageMonitor)
    asked = measure_of(job(emoji, reward=palate.load_reward("emoji"), measures="images"), None)
    assert isinstance(asked, ImageMonitor) and asked.tower is not None and asked.batch_size == 2
    other = measure_of(job(TinyFlow()), None)
    assert isinstance(other, ImageMonitor) and other.tower is None


def test_the_guard_is_on_in_every_recipe_of_a_real_model():
    for name in recipe.published():
        read = recipe.read(name)
        if read.model.name != "emoji":
            assert read.trainer.guard.every, name
            assert (read.trainer.guard.action == "warn") == (name.endswith("-released") or name.startswith("distar-"))

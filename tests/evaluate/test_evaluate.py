"""The metrics on features whose answer is known, and the evaluation as a deterministic, paired measurement."""

from __future__ import annotations

import json
import math
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from palate import evaluate, runs
from palate.evaluate import EvaluationPanel, measurement
from palate.evaluate import samples as sample_files
from palate.evaluate.samples import Drawing, generate_parts
from palate.models.emoji import EmojiModel
from palate.path import Prediction, flow_schedule
from palate.runs import protocol
from palate.runtime.errors import InputError
from palate.runtime.images import encode_png
from palate.runtime.trust import remember
from palate.testing import TinyFlow


class FakeClassifier:
    """Concept = is the image bright in red; style = is it bright in green. Features = the pooled image."""

    concepts = ("apple", "dog")
    styles = ("flat", "3d")

    def features(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    def concept(self, images):
        return (images[:, 0].mean((1, 2)) > 0.5).long()

    def style(self, images):
        return (images[:, 1].mean((1, 2)) > 0.5).long()


COLOURS = ["black", "blue"]


def parse(prompt):
    words = prompt.split()
    pick = lambda names: next((word for word in words if word in names), None)  # noqa: E731
    named = {
        "concept": FakeClassifier.concepts,
        "style": FakeClassifier.styles,
        "background": COLOURS,
        "position": ["left", "bottom"],
    }
    return SimpleNamespace(**{kind: pick(names) for kind, names in named.items()})


def background(images):
    return (images[:, 2, 0, 0] > 0.5).long()


def panel() -> EvaluationPanel:
    rewards = {
        "emoji": lambda images, prompts: images.mean((1, 2, 3)),
        "emoji-heldout": lambda images, prompts: images[:, 2].mean((1, 2)),
    }
    return EvaluationPanel(rewards, "emoji-heldout", FakeClassifier(), parse, background, COLOURS)


def flat_image(red, green, blue, size=8):
    return torch.tensor([red, green, blue], dtype=torch.float32).view(3, 1, 1).expand(3, size, size)


class FakeModel:
    """The image is the latent's pixels; the policy's pictures are brighter than the reference's by `lift`."""

    schedule = staticmethod(flow_schedule)
    latent_shape = (3, 8, 8)
    image_size = 8
    default_steps, default_guidance = 1, 1.0
    device = torch.device("cpu")

    def __init__(self, lift: float = 0.2):
        self.lift = lift

    def encode_prompts(self, prompts):
        return list(prompts)

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents.clamp(0, 1)

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        alpha, sigma = flow_schedule(t)
        target = 0.4 + 0.2 * torch.tanh(xt) + (self.lift if weights == "policy" else 0.0)
        return Prediction(target, (xt - alpha * target) / sigma)

    def parameters(self, weights="policy"):
        return []


# --- pure metrics ---


def test_vendi_counts_orthogonal_features_and_ignores_copies():
    assert evaluate.vendi(torch.ones(7, 4)) == pytest.approx(1.0, abs=1e-9)
    assert evaluate.vendi(torch.eye(6) * 3.0) == pytest.approx(6.0, abs=1e-9)
    assert evaluate.vendi(torch.eye(3).repeat(5, 1)) == pytest.approx(3.0, abs=1e-9)  # N > D: the other Gram matrix
    unequal = torch.eye(2)[[0, 0, 0, 1]]  # shares 3/4 and 1/4: exp of their entropy
    assert evaluate.vendi(unequal) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_diversity_is_the_mean_pairwise_cosine_distance_inside_each_prompt():
    angle = math.pi / 3
    features = torch.tensor([[1.0, 0], [2.0, 0], [1.0, 0], [math.cos(angle), math.sin(angle)], [0, 5.0], [1.0, 0]])
    values = evaluate.diversity(features, ["a", "a", "b", "b", "c", "d"])
    assert values[:2].tolist() == pytest.approx([0.0, 1 - math.cos(angle)], abs=1e-7)
    assert values[2:].isnan().all()  # one image has no pair
    assert evaluate.diversity(torch.eye(5), "xxxxx").item() == pytest.approx(1.0)
    brute = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    cosines = torch.corrcoef(torch.cat([brute, -brute], 1))  # rows have mean 0, so correlation = cosine
    expected = 1 - (cosines.sum() - 9) / 72
    assert evaluate.diversity(brute, [0] * 9).item() == pytest.approx(expected.item(), abs=1e-6)


def test_frechet_distance_of_known_gaussians():
    """Samples whitened to have exactly the mean and covariance that were meant; the closed forms of commuting
    covariances, of a shift, and of a turned plane (2 x 2: tr (C D)^1/2 = sqrt(tr C D + 2 sqrt(det C D)))."""
    raw = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    scale = torch.tensor([3.0, 0.5], dtype=torch.float64)
    assert evaluate.frechet_distance(white, white) == pytest.approx(0, abs=1e-12)
    assert evaluate.frechet_distance(white, white + torch.tensor([3.0, 4.0])) == pytest.approx(25, abs=1e-9)
    assert evaluate.frechet_distance(white * scale, torch.zeros(400, 2)) == pytest.approx(9.25, abs=1e-9)
    assert evaluate.frechet_distance(white * scale, white) == pytest.approx((3 - 1) ** 2 + (0.5 - 1) ** 2, abs=1e-9)
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    c, d = torch.diag(scale**2), turn @ torch.diag(scale**2) @ turn.T
    cross = ((c @ d).trace() + 2 * (c @ d).det().sqrt()).sqrt()
    expected = float(c.trace() + d.trace() - 2 * cross)
    assert evaluate.frechet_distance(white * scale, (white * scale) @ turn.T) == pytest.approx(expected, abs=1e-9)


def test_drift_of_identical_images_is_nothing_and_of_known_changes_is_known():
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = images.flatten(1)
    same = evaluate.drift(images, images, features, features)
    assert same.pop("feature_distance") == pytest.approx(0, abs=1e-9) and same.pop("colour_cast") == 0
    assert all(value == 1.0 for value in same.values())
    half = evaluate.drift(
        images * torch.tensor([0.5, 1, 1]).view(3, 1, 1), images, torch.eye(4), torch.eye(4).roll(1, 0)
    )
    assert half["feature_distance"] == pytest.approx(1.0)
    assert half["red_ratio"] == pytest.approx(0.5) and half["blue_ratio"] == pytest.approx(1.0)
    assert evaluate.drift(images * 0.5, images, features, features)["high_frequency_ratio"] == pytest.approx(
        0.25, rel=1e-5
    )


@pytest.mark.parametrize("count", [2, 4, 6, 12])
def test_intervals_of_few_prompts_hold_the_mean_as_often(count):
    """The plain percentiles of 2, 4, 6 and 12 values miss it in 50, 25, 14 and 9 of 100 cases. Sizes differ."""
    rng, sizes = np.random.default_rng(1), np.arange(count) % 2 + 1
    groups = np.repeat(np.arange(count), sizes).tolist()
    missed = 0
    for trial in range(300):
        values = np.repeat(rng.normal(0, 1, count), sizes)
        low, high = evaluate.bootstrap_interval(torch.tensor(values), groups=groups, resamples=500, seed=trial)
        missed += not low <= 0 <= high
    assert 0.01 <= missed / 300 <= 0.09


def test_bootstrap_covers_the_known_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(100):
        low, high = evaluate.bootstrap_interval(3 + torch.randn(60, generator=generator), resamples=400, seed=trial)
        hits += low <= 3 <= high
    assert 87 <= hits <= 99  # 95 expected, sd 2.2
    values = torch.randn(4000, generator=generator, dtype=torch.float64)
    low, high = evaluate.bootstrap_interval(values)
    assert high - low == pytest.approx(
        2 * 1.96 * values.std().item() / 4000**0.5, rel=0.06
    )  # a 90 % one is 16 % narrower


def test_bootstrap_is_paired_seeded_and_resamples_whole_groups():
    base = 10 * torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = evaluate.bootstrap_interval(base + 1, base)
    assert low == pytest.approx(1, abs=1e-9) and high == pytest.approx(1, abs=1e-9)  # the common part cancels
    assert evaluate.bootstrap_interval(base) == evaluate.bootstrap_interval(base)
    assert evaluate.bootstrap_interval(base, seed=1) != evaluate.bootstrap_interval(base)
    # 5 copies of each value in a group carry no more information than one
    grouped = evaluate.bootstrap_interval(base.repeat_interleave(5), groups=[i // 5 for i in range(250)])
    assert grouped == pytest.approx(evaluate.bootstrap_interval(base), abs=1e-9)
    with_gap = torch.cat([base, torch.tensor([math.nan])])
    assert evaluate.bootstrap_interval(with_gap) == pytest.approx(evaluate.bootstrap_interval(base), abs=1e-9)


def test_the_interval_is_of_the_mean_over_pictures_where_prompts_have_more_or_fewer():
    """Fifty prompts of nine ones and fifty of one zero: .9, not the mean of the prompts' means."""
    values = torch.tensor(([1.0] * 9 + [0.0]) * 50)
    groups = [f"{k // 10} {'alone' if k % 10 == 9 else 'nine'}" for k in range(500)]
    low, high = evaluate.bootstrap_interval(values, groups=groups)
    assert 0.85 < low < 0.9 < high < 0.95


def test_where_one_prompt_alone_asks_the_interval_is_that_of_its_pictures():
    """Whether the others were asked something else, or are not there at all."""
    values = torch.tensor([0.0, 1.0, 0.0, 1.0])
    alone = evaluate.bootstrap_interval(values, groups=["a"] * 4)
    among = evaluate.bootstrap_interval(torch.cat([values, torch.full((4,), math.nan)]), groups=[*"aaaabbcc"])
    assert alone == among == evaluate.bootstrap_interval(values) and among[0] < among[1]


def test_concept_accuracy_reads_the_judge():
    images = torch.stack(
        [flat_image(0.9, 0.9, 0.9), flat_image(0.9, 0.1, 0.1), flat_image(0.1, 0.9, 0.1), flat_image(0.1, 0.9, 0.9)]
    )
    captions = [parse(prompt) for prompt in ("dog blue", "dog blue", "dog", "apple blue")]
    assert evaluate.concept_accuracy(FakeClassifier(), images, captions) == pytest.approx(0.75)


# --- evaluation ---


def only(rewards):
    """A panel of these rewards that reads no prompt."""
    return evaluate.EvaluationPanel(rewards, "", FakeClassifier())


def judged(images, prompts, seeds, base=None):
    r = panel()
    return evaluate.evaluate_images(images, prompts, seeds, r, base=base)


def test_evaluation_by_hand():
    images = torch.stack([flat_image(0.9, 0.9, 0.9), flat_image(0.9, 0.1, 0.1), flat_image(0.9, 0.9, 0.0)])
    base = torch.stack([flat_image(0.9, 0.1, 0.9), flat_image(0.9, 0.1, 0.1), flat_image(0.1, 0.1, 0.9)])
    result = judged(images, ["dog blue", "dog blue", "3d dog"], [0, 1, 0], base)
    metrics = result.summary["metrics"]
    assert (
        metrics["style/3d"]["value"] == 0.5 and metrics["style/3d"]["base"] == 0.0
    )  # the third prompt names its style
    assert metrics["style_named"]["value"] == 1.0 and metrics["style_named"]["change"] == 1.0
    assert metrics["concept"]["value"] == 1.0 and metrics["concept"]["base"] == pytest.approx(2 / 3, abs=1e-6)
    assert metrics["background"]["value"] == 0.5
    assert metrics["reward/emoji-heldout"]["change"] == pytest.approx((0 + 0 - 0.9) / 3, abs=1e-6)
    assert result.rows[1]["feature_distance"] == 0.0 and "background" not in result.rows[2]
    assert list(json.loads(evaluate.to_json(result.to_dict()))) == [
        "by_prompt",
        "drift",
        "failed",
        "images",
        "metrics",
        "prompts",
        "rows",
        "seeds",
    ]


def test_a_reward_of_the_wrong_shape_is_named():
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="'bad' returned shape"):
        evaluate.evaluate_images(
            images,
            ["a", "b"],
            [0, 0],
            only({"bad": lambda i, p: torch.zeros(2, 1)}),
        )


def test_a_reward_that_breaks_is_named():
    def broken(images, prompts):
        raise RuntimeError("the service answered 503")

    with pytest.raises(RuntimeError, match="reward 'far' failed on 2 images, the first of 'a': the service answered"):
        evaluate.evaluate_images(torch.rand(2, 3, 8, 8), ["a", "b"], [0, 0], only({"far": broken}))


def picky(images, prompts):
    """Refuses the word "dog", cannot say a number for dark images."""
    if "dog" in prompts:
        raise ValueError("I do not know dogs")
    return torch.where(images.mean((1, 2, 3)) > 0.2, images.mean((1, 2, 3)), math.nan)


def test_a_reward_may_raise_an_error_that_takes_more_than_a_text():
    """As those of the hub, which are OSErrors: what it says must not be lost to how it is made."""

    class TheirError(RuntimeError):
        def __init__(self, text, *, response):
            super().__init__(text)

    def broken(images, prompts):
        raise TheirError("no such weights", response=404)

    own = panel()._replace(rewards={**panel().rewards, "mine": broken})
    with pytest.raises(RuntimeError, match=r"reward 'mine' failed on 1 image, the first of 'dog': no such weights"):
        evaluate.evaluate_images(torch.rand(1, 3, 8, 8), ["dog"], [0], own)


@pytest.mark.parametrize("fits, at_once, on_cpu", [(64, 6, False), (2, 1, False), (0, 6, True)])
def test_rewards_look_on_the_panels_device_as_far_as_its_memory_goes(fits, at_once, on_cpu, caplog):
    """meta stands for a GPU that holds so many images; half of what does not fit is tried, at the end the CPU."""
    asked = []

    def reward(images, prompts):
        assert len(images) == len(prompts)
        if images.device.type == "meta" and len(images) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        asked.append((images.device.type, len(images)))
        return torch.tensor([float(prompt) for prompt in prompts])

    class Classifier(FakeClassifier):
        styles = ()

        def features(self, images):
            return reward(images, ["1"] * len(images)).expand(4, -1).T

    device, prompts = torch.device("meta"), [str(i) for i in range(6)]
    judges = EvaluationPanel({"emoji-heldout": reward}, "emoji-heldout", Classifier(), device=device)
    found = evaluate.evaluate_images(torch.rand(6, 3, 8, 8), prompts, range(6), judges)
    assert [row["reward/emoji-heldout"] for row in found.rows] == [0, 1, 2, 3, 4, 5]
    assert asked == [("cpu" if on_cpu else "meta", at_once)] * (12 // at_once)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == on_cpu * [
        "reward emoji-heldout: one image does not fit on meta",
        "the images' features: one image does not fit on meta",
    ]


def test_what_does_not_fit_on_the_cpu_either_is_an_error():
    def reward(images, prompts):
        raise torch.OutOfMemoryError("nothing left")

    judges = panel()._replace(rewards={"emoji-heldout": reward})
    with pytest.raises(RuntimeError, match=r"reward 'emoji-heldout' failed on 1 image.*nothing left"):
        evaluate.evaluate_images(torch.rand(1, 3, 8, 8), ["dog"], [0], judges)


def test_images_that_a_reward_fails_on_are_named_and_left_out_on_both_sides():
    images = torch.stack([flat_image(g, g, g) for g in (0.5, 0.6, 0.1, 0.8)])
    base = torch.stack([flat_image(g, g, g) for g in (0.3, 0.3, 0.3, 0.1)])
    prompts = ["apple", "dog", "apple blue", "a"]
    rewards = {"picky": picky, "sure": lambda i, p: i.mean((1, 2, 3))}
    asked = evaluate.EvaluationPanel(rewards, "", FakeClassifier(), parse)
    result = evaluate.evaluate_images(images, prompts, [0, 1, 2, 3], asked, base=base).to_dict()
    found = {(f["metric"], f["side"], f["prompt"], f["seed"]): f["why"] for f in result["failed"]}
    assert found == {
        ("reward/picky", "base", "dog", 1): "I do not know dogs",
        ("reward/picky", "result", "dog", 1): "I do not know dogs",
        ("reward/picky", "result", "apple blue", 2): "the value nan is not finite",
        ("reward/picky", "base", "a", 3): "the value nan is not finite",
    }
    metric = result["metrics"]["reward/picky"]  # of the first image alone
    assert (metric["base"], metric["value"], metric["change"]) == pytest.approx((0.3, 0.5, 0.2))
    assert result["metrics"]["reward/sure"]["value"] == pytest.approx(0.5)
    assert "reward/picky" not in result["rows"][3] and "reward/picky" in result["rows"][0]
    said = evaluate.verdict(result["metrics"], ["sure"], "picky", result["failed"])["warnings"]
    assert any("reward/picky failed on 4 images" in text and "'dog', seed 1" in text for text in said)
    with pytest.raises(
        ValueError, match="'picky' failed on every image, in image 0 of the base because I do not know dogs"
    ):
        evaluate.evaluate_images(images, ["dog"] * 4, [0, 1, 2, 3], asked, base=base)

    many = torch.stack([flat_image(0.5, 0.5, 0.5)] * 70 + [flat_image(0.1, 0.1, 0.1)])  # more than one batch
    late = evaluate.evaluate_images(many, ["a"] * 71, range(71), only({"picky": picky}))
    assert [(f["image"], f["seed"]) for f in late.summary["failed"]] == [(70, 70)]

    def dead(images, prompts):
        raise RuntimeError("the service is down")  # not about one image: it ends the evaluation

    with pytest.raises(RuntimeError, match="service"):
        evaluate.evaluate_images(images, prompts, [0] * 4, only({"dead": dead}))
    with pytest.raises(ValueError, match="reward 'emoji' failed for prompt 'dog': I do not know dogs"):
        strict = panel()._replace(rewards={"emoji": picky, "emoji-heldout": picky})
        evaluate.measure_for_guard(FakeModel(), ["apple", "dog"], [0, 1], seed=0, panel=strict)


def test_what_the_prompt_names_is_checked_part_by_part_and_as_a_whole():
    centres = torch.tensor([[-0.3, 0.4], [0.3, 0.4], [-0.3, -0.1], [math.nan, math.nan]])
    assert evaluate.position_correct(centres, ["left"] * 4).tolist() == [1, 0, 1, 0]
    assert evaluate.position_correct(centres, ["right", "right", "top", "bottom"]).tolist() == [0, 1, 1, 0]
    assert evaluate.position_correct(centres, [None, "bottom", "top", None]).isnan().tolist() == [
        True,
        False,
        False,
        True,
    ]
    assert evaluate.position_correct(torch.tensor([[0.3, -0.1], [-0.3, 0.1]]), ["top", "bottom"]).tolist() == [1, 1]
    images = torch.stack([flat_image(0.9, 0.9, 0.9), flat_image(0.1, 0.9, 0.9), flat_image(0.9, 0.1, 0.1)])
    r = panel()._replace(position=lambda images: torch.tensor([[-0.3, 0.0], [0.2, 0.3], [0.1, 0.1]]))
    prompts = ["3d dog left blue", "dog bottom", "nothing said"]
    metrics = evaluate.evaluate_images(images, prompts, [0, 0, 0], r).summary["metrics"]
    right = {name: metrics[name]["value"] for name in ("concept", "background", "style_named", "position", "correct")}
    assert right == {"concept": 0.5, "background": 1.0, "style_named": 1.0, "position": 1.0, "correct": 0.5}


def test_copies_are_pictures_that_another_prompt_has_too():
    one, other = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.stack([one, one, other, (one + 0.01).clamp(0, 1), other.flip(-1)])
    assert evaluate.cross_prompt_duplicates(images, ["a", "a", "b", "c", "c"]).tolist() == [1, 1, 0, 1, 0]
    assert evaluate.cross_prompt_duplicates(images[:2], ["a", "a"]).isnan().all()  # nothing to be a copy of
    grey = torch.full((2, 3, 8, 8), 0.5)
    grey[1] += torch.tensor([0.0499, 0.0499, 0.0499]).view(3, 1, 1)  # the difference is the distance
    assert evaluate.cross_prompt_duplicates(grey, "ab").tolist() == [1, 1]
    grey[1] += 0.0002
    assert evaluate.cross_prompt_duplicates(grey, "ab").tolist() == [0, 0]


def test_a_colour_cast_is_the_coloured_part_of_the_mean_shift():
    images = torch.full((2, 3, 8, 8), 0.4)
    features = torch.eye(2)
    lighter = evaluate.drift(images + 0.2, images, features, features)
    assert lighter["colour_cast"] == pytest.approx(0, abs=1e-7)
    magenta = evaluate.drift(images + torch.tensor([0.3, 0.0, 0.3]).view(3, 1, 1), images, features, features)
    assert magenta["colour_cast"] == pytest.approx((0.1**2 + 0.2**2 + 0.1**2) ** 0.5, abs=1e-6)


def test_noise_belongs_to_prompt_and_seed_whatever_the_batch_or_the_weights():
    model, prompts = FakeModel(lift=0.0), ["dog", "apple", "dog blue"]
    images = evaluate.generate(model, prompts, [3, 5])
    assert torch.equal(images, evaluate.generate(model, prompts, [3, 5], batch_size=4))
    assert torch.equal(
        images, evaluate.generate(model, prompts, [3, 5], weights="reference")
    )  # lift 0: the same network
    assert torch.equal(images[1::2], evaluate.generate(model, prompts, [5]))
    assert evaluate.pairs(prompts, [3, 5]) == (["dog", "dog", "apple", "apple", "dog blue", "dog blue"], [3, 5] * 3)
    assert len({image.sum().item() for image in images}) == 6


def test_quick_check_agrees_with_the_full_evaluation():
    prompts, ids = ["dog", "dog", "apple blue", "3d apple"], [4, 9, 2, 7]
    result = evaluate.measure_for_guard(FakeModel(), prompts, ids, seed=1, panel=panel())
    assert result == evaluate.measure_for_guard(FakeModel(), prompts, ids, seed=1, panel=panel())
    assert set(result) == {
        "reward",
        "heldout",
        "concept",
        "background",
        "diversity",
        "saturation",
        "style/flat",
        "style/3d",
    }
    assert result["style/flat"] + result["style/3d"] == pytest.approx(1)
    shuffled = [2, 0, 3, 1]  # the noise follows the id, not the place
    again = evaluate.measure_for_guard(
        FakeModel(), [prompts[i] for i in shuffled], [ids[i] for i in shuffled], seed=1, panel=panel()
    )
    assert again == pytest.approx(result, rel=1e-4)
    assert result != evaluate.measure_for_guard(FakeModel(), prompts, ids, seed=2, panel=panel())


def test_evaluate_run_measures_the_result_against_the_base_and_repeats_to_the_byte(tmp_path):
    (tmp_path / "recipe.yaml").write_text(ALGORITHM + "reward: {name: emoji}\nprompts: {list: [dog]}\n")
    ask = {"prompts": ["dog", "apple blue"], "seeds": [0, 1], "panel": panel()}
    result = runs.evaluate_run(tmp_path, model=FakeModel(0.2), **ask)
    first = (tmp_path / "evaluation.json").read_bytes()
    assert result["metrics"]["reward/emoji"]["change"] == pytest.approx(0.2, abs=0.003)  # 8-bit PNG
    assert result["optimised"] == ["emoji"] and result["verdict"]["text"].startswith("Optimised reward")
    runs.evaluate_run(tmp_path, model=FakeModel(0.2), **ask)
    assert (tmp_path / "evaluation.json").read_bytes() == first
    again = runs.evaluate_samples(
        tmp_path / "evaluation/result", base_folder=tmp_path / "evaluation/base", panel=panel()
    )
    assert again["metrics"] == result["metrics"]  # the stored images are the judged images


def test_two_at_once_do_not_mix_their_pictures(tmp_path):
    """Neither of one process nor of two."""
    folder = run_folder(tmp_path / "a")

    class Meanwhile(FakeModel):
        def decode(self, latents):
            with pytest.raises(InputError, match="is being evaluated by another process"):
                runs.evaluate_run(folder, model=FakeModel(0.2), prompts=["apple"], seeds=[0], panel=panel())
            return super().decode(latents)

    found = runs.evaluate_run(folder, model=Meanwhile(0.2), prompts=["dog"], seeds=[0, 1], panel=panel())
    assert found["images"] == 2
    runs.evaluate_run(folder, model=FakeModel(0.2), prompts=["apple"], seeds=[0], panel=panel())


def test_pictures_that_were_not_judged_have_no_step_of_an_earlier_evaluation(tmp_path):
    """`stored` after a reward that failed: what evaluation.json says is of the pictures before."""
    folder, ask = run_folder(tmp_path / "a"), {"prompts": ["dog", "apple"], "seeds": [0]}
    checkpoints = folder / "checkpoints"
    (checkpoints / "step-000050").mkdir(parents=True)
    assert runs.evaluate_run(folder, model=FakeModel(0.2), panel=panel(), **ask)["checkpoint"].endswith("000050")
    assert runs.evaluate_run(folder, panel=panel(), stored=True)["checkpoint"].endswith("000050")
    (checkpoints / "step-000200").mkdir()
    broken = panel()._replace(rewards={**panel().rewards, "emoji": lambda images, prompts: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        runs.evaluate_run(folder, model=FakeModel(0.3), panel=broken, **ask)
    assert runs.evaluate_run(folder, panel=panel(), stored=True)["checkpoint"] is None


def test_nothing_to_draw_is_said_before_an_evaluation_is_touched(tmp_path):
    folder = run_folder(tmp_path / "a")
    runs.evaluate_run(folder, model=FakeModel(0.2), prompts=["dog"], seeds=[0], panel=panel())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for prompts, seeds in (([], [0]), (["dog"], [])):
        with pytest.raises(InputError, match="give at least one of each"):
            runs.evaluate_run(folder, model=FakeModel(0.2), prompts=prompts, seeds=seeds, panel=panel())
    for steps in (0, -1):  # 0 is not "the model's own"
        with pytest.raises(InputError, match=f"steps is {steps}; expected 1 or more"):
            evaluate.generate(FakeModel(), ["dog"], [0], steps=steps)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_single_text_is_not_taken_for_its_letters(tmp_path):
    folder = run_folder(tmp_path / "a")
    for ask in (
        lambda: evaluate.generate(FakeModel(), "dog", [0]),
        lambda: runs.evaluate_run(folder, model=FakeModel(), prompts="dog", seeds=[0], panel=panel()),
        lambda: runs.evaluate_runs([folder], prompts="dog", seeds=[0], panel=panel(), load=load),
    ):
        with pytest.raises(InputError, match=r"expected a list of prompts, got the text 'dog'; write \['dog'\]"):
            ask()


ALGORITHM = "algorithm: {name: ddpo}\n"  # one without control words


def run_folder(
    path, text="reward: {name: emoji}\nevaluate: {prompts: 2, seeds: 2}\nprompts: {list: [dog, apple blue, apple]}\n"
):
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(text if "algorithm" in text else ALGORITHM + text)
    return path


LIFTS = {"a": 0.2, "b": 0.3}


def load(folder):
    return FakeModel(LIFTS[folder.name]), None


def test_several_runs_are_paired_on_the_same_prompts_and_noise(tmp_path):
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    found = runs.evaluate_runs([a, b], panel=panel(), load=load)
    assert found["first"] == "a" and list(found["runs"]) == ["a", "b"] and list(found["between"]) == ["b"]
    gain = found["between"]["b"]["reward/emoji"]
    assert (
        gain["change"] == pytest.approx(0.1, abs=0.003) and gain["change_low"] <= gain["change"] <= gain["change_high"]
    )
    assert gain["change_high"] - gain["change_low"] < 0.004  # what the noise does to both cancels
    values = [found["runs"][n]["metrics"]["reward/emoji"]["value"] for n in "ab"]
    assert [gain["base"], gain["value"]] == pytest.approx(values, rel=3e-6)  # files hold six digits
    vendi = {n: [entry["vendi"] for entry in found["runs"][n]["by_prompt"]] for n in "ab"}
    expected = (sum(vendi["b"]) - sum(vendi["a"])) / 2
    assert found["between"]["b"]["vendi"]["change"] == pytest.approx(expected, rel=1e-4)
    text = (a / "evaluation.json").read_bytes()
    again = runs.evaluate_runs([a, b], panel=panel(), load=load)
    assert evaluate.to_json(again) == evaluate.to_json(found) and (a / "evaluation.json").read_bytes() == text
    stored = runs.evaluate_runs([a, b], panel=panel(), stored=True)  # the images that lie there, no model
    assert evaluate.to_json(stored) == evaluate.to_json(found)


def test_the_networks_are_gone_when_the_judges_look(tmp_path):
    """A GPU that holds a network may have no room for them beside it, nor for the next run's once they are there."""
    made = []

    def loads(folder):
        model = FakeModel()
        made.append(weakref.ref(model))
        return model, None

    def reward(images, prompts):
        assert [model() for model in made] == [None, None]
        return images.mean((1, 2, 3))

    judges = panel()._replace(rewards={"emoji": reward, "emoji-heldout": reward})
    runs.evaluate_runs([run_folder(tmp_path / "a"), run_folder(tmp_path / "b")], panel=judges, load=loads)


def test_relative_rewards_of_other_words_are_other_questions(tmp_path):
    text = "reward: {name: emoji}\nprompts: {list: [dog, apple]}\n"
    words = {"a": "algorithm: {name: srpo, positive: [3d]}\n", "b": "algorithm: {name: srpo, positive: [flat]}\n"}
    folders = [run_folder(tmp_path / name, text + own) for name, own in words.items()]
    between = runs.evaluate_runs(folders, panel=panel(), load=load)["between"]["b"]
    assert "reward/emoji" in between and not any(key.endswith("-relative") for key in between)


def test_sums_of_other_weights_are_other_questions_and_other_guidance_is_said(tmp_path):
    text = (
        "reward: {{weights: {{emoji: 1, warmth: {0}}}}}\nsample: {{guidance: {1}}}\nprompts: {{list: [dog, apple]}}\n"
    )
    cases = {"same": ((5, 3), (5, 3)), "weights": ((5, 3), (50, 3)), "guidance": ((5, 3), (5, 1))}
    for case, kinds in cases.items():
        folders, said = (
            [run_folder(tmp_path / case / n, text.format(*kind)) for n, kind in zip("ab", kinds, strict=False)],
            [],
        )
        between = runs.evaluate_runs(folders, panel=panel(), load=load, warn=said.append)["between"]["b"]
        assert ("reward/weighted" in between) == (case != "weights") and "reward/warmth" in between
        assert bool(said) == (case == "guidance") and all("a is drawn with guidance 3" in line for line in said)


def test_prompts_that_are_given_are_all_asked(tmp_path):
    text = "reward: {{name: emoji}}\nprompts: {{list: [a]}}\nevaluate: {{prompts: {0}}}\n"
    folders = [run_folder(tmp_path / name, text.format(count)) for name, count in (("a", 2), ("b", 3))]
    prompts = ["dog", "apple", "apple blue", "dog blue"]
    found = runs.evaluate_runs(folders, prompts=prompts, seeds=[0], panel=panel(), load=load)["runs"]
    assert all([row["prompt"] for row in run["rows"]] == prompts for run in found.values())


def test_what_one_run_optimised_is_asked_of_all(tmp_path):
    a = run_folder(tmp_path / "a", "reward: {name: warmth}\nprompts: {list: [dog, apple]}\n")
    b = run_folder(tmp_path / "b", "reward: {name: emoji, scale: {emoji: [0.5, 0.1]}}\nprompts: {list: [dog, apple]}\n")
    found = runs.evaluate_runs([a, b], panel=panel(), load=load)
    assert found["runs"]["a"]["optimised"] == ["warmth"] and "reward/warmth" in found["between"]["b"]


def test_a_run_is_asked_its_own_reward_where_another_has_one_of_that_name(tmp_path):
    """As two tastes have, or two files: each run by its own, one that optimised neither by the first's."""
    for code, value in (("one", 0.25), ("two", 0.75)):
        (tmp_path / code).mkdir()
        code_text = f"def nice(x, prompts):\n    return 0 * x.mean((1, 2, 3)) + {value}\n"
        (tmp_path / code / "score.py").write_text(code_text)
        remember(tmp_path / code / "score.py")
    rewards = {"a": f"{tmp_path}/one/score.py:nice", "b": f"{tmp_path}/two/score.py:nice", "c": "emoji"}
    rewards["d"] = rewards["a"]
    text = "reward: {{name: {0}}}\nprompts: {{list: [dog, apple]}}\n"
    folders = [run_folder(tmp_path / name, text.format(reward)) for name, reward in rewards.items()]
    found = runs.evaluate_runs(folders, panel=panel(), load=lambda folder: (FakeModel(0.2), None))
    (key,) = (key for key in found["runs"]["a"]["metrics"] if key.endswith("nice"))
    assert {name: one["metrics"][key]["value"] for name, one in found["runs"].items()} == {
        "a": 0.25, "b": 0.75, "c": 0.25, "d": 0.25}  # fmt: skip
    assert [key in found["between"][name] for name in "bcd"] == [False, True, True]
    kept = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    assert not runs.same_meaning(kept[:2], key) and runs.same_meaning([kept[0], *kept[2:]], key)


def test_runs_on_other_prompts_or_seeds_are_refused_before_anything_is_drawn(tmp_path):
    def never(folder):
        raise AssertionError("drawn")

    a, b = (
        run_folder(tmp_path / "a"),
        run_folder(tmp_path / "b", "reward: {name: emoji}\nprompts: {list: [dog, apple]}\n"),
    )
    with pytest.raises(
        ValueError, match="a and b cannot be paired: prompt of row 2 is 'apple blue' in the first, 'dog' in"
    ):
        runs.evaluate_runs([a, b], panel=panel(), load=never)
    with pytest.raises(ValueError, match="given twice"):
        runs.evaluate_runs([a, tmp_path / "b" / ".." / "a"], panel=panel(), load=never)
    with pytest.raises(ValueError, match="no stored images of the base; run palate evaluate"):
        runs.evaluate_runs([a], panel=panel(), stored=True)
    runs.evaluate_runs([a], panel=panel(), load=load)
    runs.evaluate_runs([b], panel=panel(), load=load, seeds=[7], prompts=["apple"])
    with pytest.raises(ValueError, match="no prompt and seed in common"):
        runs.evaluate_runs([a, b], panel=panel(), stored=True)
    (a / "evaluation/result/0001.png").unlink()
    with pytest.raises(ValueError, match=r"0001.png is missing"):
        runs.evaluate_runs([a], panel=panel(), stored=True)


def test_a_source_goes_to_the_runs_whose_recipes_name_its_reward(tmp_path, monkeypatch):
    text = "reward: {name: %s}\nprompts: {list: [dog]}\n"
    folders = [run_folder(tmp_path / name, text % reward) for name, reward in (("a", "pickscore"), ("b", "hpsv2"))]
    count = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    asked = panel()._replace(rewards={**panel().rewards, "pickscore": count, "hpsv2": count})
    given = ["evaluate.seeds=1", "reward.source.pickscore=x", "reward.source.hpsv2=y"]
    found = runs.evaluate_runs(folders, panel=asked, load=load, overrides=given)["runs"]
    assert [found[name]["optimised"] for name in "ab"] == [["pickscore"], ["hpsv2"]] and found["a"]["images"] == 1
    with pytest.raises(InputError, match=r"reward.source.aesthetic: aesthetic is in neither reward.name"):
        runs.evaluate_runs(folders, panel=asked, load=load, overrides=["reward.source.aesthetic=z"])
    monkeypatch.setattr(protocol, "protocol_panel", lambda runs, found: asked)
    monkeypatch.setattr(runs.RunFolder, "model", lambda run, warn: load(run.path))
    more = [*given, "reward.source.aesthetic=z"]  # published, and so asked of both
    found = runs.evaluate_protocol(folders, "drawbench", {"dog": ""}, overrides=more)["runs"]
    assert [found[name]["optimised"] for name in "ab"] == [["pickscore"], ["hpsv2"]]


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path):
    assert runs.run_names([tmp_path / "x/a", tmp_path / "b"]) == ["a", "b"]
    assert runs.run_names([tmp_path / "x/a", tmp_path / "y/a"]) == [str(tmp_path / "x/a"), str(tmp_path / "y/a")]


def test_the_verdict_warns_of_over_optimisation():
    def metric(base, value, margin=0.01):
        change = value - base
        return {
            "base": base,
            "value": value,
            "change": change,
            "change_low": change - margin,
            "change_high": change + margin,
        }

    good = {
        "reward/r": metric(1, 2),
        "reward/h": metric(1, 1.005),
        "concept": metric(0.98, 0.97),
        "diversity": metric(0.2, 0.19),
    }
    assert evaluate.verdict(good, ["r"], "h") == {
        "text": "Optimised reward up (1 to 2), held-out reward unchanged (1 to 1), "
        "concept 0.98 to 0.97, diversity x 0.95.",
        "warnings": [],
        "notes": [],
    }
    bad = {
        "reward/r": metric(1, 3),
        "reward/h": metric(1, 0.5),
        "concept": metric(0.98, 0.6),
        "diversity": metric(0.2, 0.1),
    }
    result = evaluate.verdict(bad, ["r"], "h")
    assert "held-out reward down" in result["text"] and len(result["warnings"]) == 3
    few = evaluate.verdict(bad, ["r"], "h", num_prompts=2)  # two prompts agree by chance in half of all cases
    assert few["warnings"] == [] and "2 prompts, too few" in few["notes"][0] and "down" not in few["text"]
    for lost, warned in ((0.02, False), (0.04, True)):  # the limits are .03 of concepts, .85 of the diversity
        found = evaluate.verdict(good | {"concept": metric(0.98, 0.98 - lost)}, ["r"], "h")["warnings"]
        assert bool(found) == warned
    for left, warned in ((0.18, False), (0.16, True)):
        found = evaluate.verdict(good | {"diversity": metric(0.2, left)}, ["r"], "h")["warnings"]
        assert bool(found) == warned
    unsure = {"reward/r": metric(1, 3), "reward/h": metric(1, 0.5, 0.6), "concept": metric(0.98, 0.6, 0.5),
              "diversity": metric(0.2, 0.1, 0.2)}  # fmt: skip
    result = evaluate.verdict(unsure, ["r"], "h")
    assert result["warnings"] == [] and len(result["notes"]) == 2


def test_a_change_of_style_is_not_over_optimisation_because_the_plain_held_out_reward_fell():
    def metric(base, value, margin=0.01):
        low, high = value - base - margin, value - base + margin
        return {"base": base, "value": value, "change": value - base, "change_low": low, "change_high": high}

    run = {
        "reward/r": metric(0.08, 0.27),
        "reward/h": metric(0.785, 0.753),
        "reward/h-relative": metric(0.142, 0.214),
        "diversity": metric(0.086, 0.060),
        "diversity_same_style": metric(0.047, 0.052, 0.001),
    }
    result = evaluate.verdict(run, ["r"], "h")
    assert result["warnings"] == [] and "name no style" in result["notes"][0] and "fewer styles" in result["notes"][1]
    hacked = run | {"reward/h-relative": metric(0.142, 0.10)}  # only the optimised reward likes the result
    assert "preference for the words fell: over-optimised" in evaluate.verdict(hacked, ["r"], "h")["warnings"][0]
    dearer = run | {"reward/h": metric(0.785, 0.60)}  # the fall is larger than the rise of the preference
    assert "over-optimised" in evaluate.verdict(dearer, ["r"], "h")["warnings"][0]
    assert evaluate.verdict(dearer, ["r"], "h", may_fall=0.2)["warnings"] == []  # a taste has no words to prefer
    assert "guard lets it" in evaluate.verdict(dearer, ["r"], "h", may_fall=0.2)["notes"][0]
    assert "over-optimised" in evaluate.verdict(dearer, ["r"], "h", may_fall=0.1)["warnings"][0]
    narrow = run | {"diversity_same_style": metric(0.047, 0.030, 0.001)}  # variety is lost within the style too
    assert "less than 0.85" in evaluate.verdict(narrow, ["r"], "h")["warnings"][0]


def test_words_in_force_follow_the_steering(tmp_path):
    words = "algorithm: {name: srpo, positive: [3d], negative: [flat]}\nreward: {name: emoji}\nprompts: {list: [dog]}\n"
    folder = run_folder(tmp_path / "run", words)
    assert runs.RunFolder(folder).words() == (["3d"], ["flat"])
    (folder / "metrics.jsonl").write_text(
        '{"event": "step", "step": 1}\n{"event": "steer", "step": 2, "positive": ["outline"], "negative": null}\n'
    )
    run = runs.RunFolder(folder)
    assert run.words() == (["outline"], ["flat"])
    assert run.objective().pairs == (("outline", "flat"),)


STEERED = "algorithm: {name: srpo, positive: [3d], negative: [flat]}\nreward: {name: emoji}\nprompts: {list: [dog]}\n"


def test_words_that_the_result_never_saw_are_not_its_words(tmp_path):
    """Those that were steered to after the step that the guard went back to, or after the newest checkpoint."""
    folder = run_folder(tmp_path / "run", STEERED)
    (folder / "checkpoints" / "step-000050").mkdir(parents=True)
    steer = [{"event": "steer", "step": step, "positive": [word]} for step, word in ((45, "outline"), (55, "noto"))]
    for action, words in ({}, "outline"), ({"action": "stop"}, "3d"), ({"action": "rollback"}, "3d"):
        guard = {"event": "guard", "step": 50, "verdict": "ok", "best_step": 40} | action
        rows = (steer[0], guard, steer[1])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = runs.RunFolder(folder)
        assert run.words() == ([words], ["flat"])
        assert run.objective().pairs == ((words, "flat"),) and run.words(60)[0] == ["noto"]


def test_stored_pictures_are_judged_with_the_words_of_their_step(tmp_path):
    folder = run_folder(tmp_path / "run", STEERED)
    (folder / "checkpoints" / "step-000050").mkdir(parents=True)
    runs.evaluate_run(folder, model=FakeModel(0.2), prompts=["dog"], seeds=[0], panel=panel())
    before = (folder / "evaluation.json").read_bytes()
    (folder / "checkpoints" / "step-000060").mkdir()
    (folder / "metrics.jsonl").write_text('{"event": "steer", "step": 55, "positive": ["outline"]}\n')
    found = runs.evaluate_run(folder, panel=panel(), stored=True)
    assert found["words"]["positive"] == ["3d"] and (folder / "evaluation.json").read_bytes() == before
    (folder / "evaluation.json").write_text(json.dumps({**found, "manifest": "of other weights of that step"}))
    (folder / "metrics.jsonl").write_text('{"event": "steer", "step": 45, "positive": ["outline"]}\n')
    again = runs.evaluate_run(folder, panel=panel(), stored=True)
    assert again["words"]["positive"] == ["3d"] and again["manifest"] == "of other weights of that step"


def test_the_relative_reward_of_a_recipe_is_evaluated_as_it_was_optimised(tmp_path):
    text = "reward: {name: emoji, relative: {positive: 3d, k: 0.5}}\nprompts: {list: [dog]}\n"
    run = runs.RunFolder(run_folder(tmp_path / "run", text))
    assert run.words() == (["3d"], [])
    count = lambda images, prompts: torch.tensor([len(prompts[0]) * 1.0])  # noqa: E731
    rewards, optimised = run.objective().rewards({"emoji": count, "other": count}, "other")
    assert optimised == ["emoji-relative", "emoji"]
    for name in ("emoji-relative", "other-relative"):
        assert float(rewards[name](torch.zeros(1, 3, 2, 2), ["dog"])) == 1.5 * len("3d. dog") - len("dog")


# --- sample folders ---


def samples(folder, prompts=("dog", "apple"), seeds=(0, 1)):
    words, numbers = evaluate.pairs(prompts, seeds)
    images = torch.rand(len(words), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    runs.write_samples(folder, images, words, numbers, guidance=3.0, steps=8)
    return folder


def test_samples_come_back_as_written(tmp_path):
    folder = samples(tmp_path / "a", prompts=("dog\x00<b>", "{{ 1 }}\u202e"))
    images, rows = runs.read_samples(folder)
    expected = evaluate.quantise(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(images, expected)
    assert [row["prompt"] for row in rows[1:3]] == ["dog\x00<b>", "{{ 1 }}\u202e"]


def test_runs_with_other_prompts_or_seeds_are_not_paired(tmp_path):
    a = samples(tmp_path / "a")
    cases = {"prompt of row 2 is 'apple'.*'dog blue'": ("dog", "dog blue"), "4 and 2 images.*'apple' seed 0": ("dog",)}
    for words, prompts in cases.items():
        with pytest.raises(ValueError, match=words):
            runs.evaluate_samples(a, base_folder=samples(tmp_path / prompts[-1], prompts), panel=panel())
    with pytest.raises(ValueError, match="seed of row 1 is 1 in the first, 7 in the second"):
        runs.evaluate_samples(a, base_folder=samples(tmp_path / "s", seeds=(0, 7)), panel=panel())


def test_a_set_that_was_cut_short_is_not_taken_for_whole(tmp_path):
    """Nor for the older one that lay there: some of its pictures are those of the new one now."""
    folder = samples(tmp_path / "a")

    def parts():
        yield torch.rand(1, 3, 8, 8)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        runs.write_samples(folder, parts(), ["dog"] * 4, range(4), guidance=3.0, steps=8)
    with pytest.raises(ValueError, match=r"index.jsonl is missing"):
        runs.read_samples(folder)


def test_missing_and_broken_images_are_named(tmp_path):
    folder = samples(tmp_path / "a")
    png = (folder / "0002.png").read_bytes()
    for content in (b"", b"not a picture", png[: len(png) // 2]):
        (folder / "0002.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"0002.png cannot be read"):
            runs.read_samples(folder)
    (folder / "0002.png").write_bytes(encode_png(np.zeros((8, 16, 3), np.uint8)))
    with pytest.raises(InputError, match=r"0002.png is 16x8; expected 8x8 as the first"):
        runs.read_samples(folder)
    (folder / "0002.png").unlink()
    with pytest.raises(ValueError, match=r"0002.png is missing"):
        runs.read_samples(folder)
    for line in ("{", '{"file": "../x.png", "prompt": "a", "seed": 0}', '{"prompt": "a", "seed": 0}', "[1]"):
        (folder / "index.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=r"index.jsonl line 1"):
            runs.read_samples(folder)
    with pytest.raises(ValueError, match=r"index.jsonl is missing"):
        runs.read_samples(tmp_path / "nowhere")


def test_diversity_of_one_style_leaves_the_distance_between_styles_out():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    groups = ["a", "a", "a", "a", "b"]
    assert float(evaluate.diversity(features, groups)[0]) == pytest.approx(4 / 6)  # four of six pairs are orthogonal
    same = evaluate.diversity(features, groups, ["x", "x", "y", "y", "x"])
    assert float(same[0]) == 0.0 and same[1].isnan()
    assert float(evaluate.diversity(features, groups, ["x", "y", "x", "y", "x"])[0]) == 1.0


def test_500_images_are_judged_by_every_embedded_metric_in_a_minute():
    images = torch.rand(500, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = [f"a {concept} on a blue background" for concept in ("cat", "dog", "key", "bee", "wolf")] * 100
    panel = evaluate.embedded_panel()
    began = time.process_time()
    found = evaluate.evaluate_images(images, sorted(prompts), [i % 100 for i in range(500)], panel)
    assert found.summary["images"] == 500 and len(found.rows) == 500
    assert time.process_time() - began < 60


def test_an_evaluation_on_other_prompts_or_seeds_keeps_the_older_one(tmp_path):
    """Asked for again it comes back, and two runs are compared on the prompts and seeds that both have."""
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    ask = {"panel": panel(), "load": load}
    runs.evaluate_runs([a], prompts=["dog", "apple", "apple blue"], seeds=[0, 1], **ask)
    whole = (a / "evaluation.json").read_bytes()
    pictures = {path.name: path.read_bytes() for path in (a / "evaluation/result").iterdir()}
    runs.evaluate_runs([a], prompts=["dog"], seeds=[1], **ask)
    kept = [path for path in (a / "evaluations").iterdir()]
    assert [(path / "evaluation.json").read_bytes() for path in kept] == [whole]
    assert {path.name: path.read_bytes() for path in (kept[0] / "evaluation/result").iterdir()} == pictures
    runs.evaluate_runs([b], prompts=["apple", "dog"], seeds=[1, 2], **ask)
    found = runs.evaluate_runs([a, b], panel=panel(), stored=True)["between"]["b"]
    rows = [json.loads((run / "evaluation.json").read_text())["rows"] for run in (a, b)]
    assert runs.common_rows(*rows) == [(0, 2)]  # ("dog", 1)
    values = [rows[0][0]["reward/emoji"], rows[1][2]["reward/emoji"]]
    assert found["reward/emoji"]["change"] == pytest.approx(values[1] - values[0], abs=1e-6)
    assert "vendi" not in found  # of other sets of images
    runs.evaluate_runs([a], prompts=["dog", "apple", "apple blue"], seeds=[0, 1], **ask)
    assert (a / "evaluation.json").read_bytes() == whole
    assert [path.name for path in (a / "evaluations").iterdir()] == [runs.evaluation_key(["dog"], [1])]


def test_overrides_judge_a_finished_run_and_change_nothing_of_it(tmp_path):
    folder = run_folder(tmp_path / "a")
    run = runs.RunFolder(folder, ["evaluate.seeds=1", "sample.steps=3"])
    assert (run.recipe.evaluate.seeds, run.recipe.sample.steps) == (1, 3)
    for change in ("trainer.lr=1", "reward.name=warmth", "algorithm.name=dpo", "prompts.list=a"):
        with pytest.raises(InputError, match="start a new run"):
            runs.RunFolder(folder, [change])


def test_large_images_are_drawn_a_few_at_a_time():
    class Seen(TinyFlow):
        def __init__(self, side):
            super().__init__()
            self.image_size, self.rows = side, []

        def decode(self, latents):
            self.rows.append(len(latents))
            return super().decode(latents)

    for side, rows in ((8, [20]), (1024, [8, 8, 4]), ([2048, 4096], [1] * 20)):
        model = Seen(side)
        evaluate.generate(model, [f"{i} foxes" for i in range(20)], [0], steps=1)
        assert model.rows == rows


def test_images_drawn_in_parts_are_those_drawn_at_once(tmp_path):
    """Whatever room there is, bit for bit, and so are the files."""
    model = EmojiModel.load(training="none")
    prompts, seeds = ["a dog", "a cat", "an apple"], [0, 5]
    whole = evaluate.generate(model, prompts, seeds, steps=2, batch_size=2)
    how = Drawing(steps=2, batch_size=2)
    parts = list(generate_parts(model, prompts, seeds, how, room=12 * 64 * 64 * 3))
    assert [len(part) for part in parts] == [2, 2, 2] and torch.equal(torch.cat(parts), whole)
    evaluate.write_samples(tmp_path / "a", whole, *evaluate.pairs(prompts, seeds), guidance=3.0, steps=2)
    evaluate.write_samples(tmp_path / "b", parts, *evaluate.pairs(prompts, seeds), guidance=3.0, steps=2)
    assert [(tmp_path / "a" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "b").iterdir()] == [True] * 7


def test_images_that_stay_in_their_files_are_judged_alike(tmp_path, monkeypatch):
    """Every number of an evaluation, whether its pictures are in memory or read a batch at a time."""
    generator = torch.Generator().manual_seed(0)
    words, numbers = evaluate.pairs([f"a dog on a {c} background" for c in ("red", "blue", "green")], range(50))
    for side in ("base", "result"):
        images = torch.rand(150, 3, 64, 64, generator=generator)
        evaluate.write_samples(tmp_path / side, images, words, numbers, guidance=1.0, steps=1)
    panel = evaluate.embedded_panel()
    whole = evaluate.evaluate_samples(tmp_path / "result", base_folder=tmp_path / "base", panel=panel)
    read = []
    real = sample_files.StoredImages.__getitem__
    monkeypatch.setattr(
        sample_files.StoredImages, "__getitem__", lambda self, rows: read.append(rows) or real(self, rows)
    )
    monkeypatch.setattr(measurement, "open_samples", lambda folder: sample_files.open_samples(folder, room=0))
    assert evaluate.evaluate_samples(tmp_path / "result", base_folder=tmp_path / "base", panel=panel) == whole
    assert read and all(rows.stop - rows.start <= 64 for rows in read)
    (tmp_path / "result" / "0149.png").unlink()
    with pytest.raises(InputError, match=r"0149.png is missing, though index.jsonl lists it"):
        evaluate.evaluate_samples(tmp_path / "result", base_folder=tmp_path / "base", panel=panel)
